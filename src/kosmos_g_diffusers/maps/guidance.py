"""What maps are used for while an image is drawn: to bind each image of a prompt to a region of its own, and to place it.

Three things, of which the first two cost next to nothing:

- Scores of the cross-attention are changed: states of an image count for less where another image is, and for more within its
  region, as Bounded Attention (Dahary et al. 2024, arXiv 2403.16990) and Dense Diffusion (Kim et al. 2023, arXiv 2308.12964) do
  for words.
- Where images are drawn the classifier-free guidance is softened: it leads past the colours that an image has.
- At a few of the first steps the latents are moved along the gradient of a loss of the maps, as Attend-and-Excite (Chefer et al.
  2023, arXiv 2301.13826) and Bounded Attention do: each image gets places of its own, and all of them one image.

Letters as in observer.py; P the images of a prompt.
"""

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

SEPARATION = 5.0  # taken from the scores of an image's states where all is another's, at weight 1
SOFTENING = 0.6  # of the guidance where all is drawn by images, at weight 1
STEP = 0.2  # of a move of the latents, in their standard deviations, at weight 1
PLACED_STEP = 0.1  # the same, into regions
MOVES, PLACED_MOVES = (1, 2), (0, 1)  # calls of the U-Net before which latents are moved
RECENT = 3  # calls whose maps say where the images are
PLACED_WITHIN, PLACED_OUTSIDE = 3.0, 5.0  # added to the scores within a region, taken from them outside
PLACED_UNTIL = 0.5  # of the steps
DRAWN = 0.5  # share of a place from which on images draw it


def own_shares(maps: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(B, S, h, w) maps -> (B, S, h, w): the share of each image among the images of its prompt; 0 for all else.

    Args:
        counts: (B,), images of each prompt: its first sources.
    """
    images = maps * is_image(maps, counts)
    return images / images.sum(1, keepdim=True).clamp_min(1e-6)


def is_image(maps: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(B, S, 1, 1) bool: which sources of each prompt are images."""
    numbers = torch.arange(maps.shape[1], device=maps.device)
    return (numbers < counts[:, None])[..., None, None]


def separating_bias(
    sources: torch.Tensor, maps: torch.Tensor, counts: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """What is added to the scores of a layer of `size` places: (B, h * w, K), 0 where no other image is."""
    maps = interpolate(maps, size=size, mode="bilinear", align_corners=False)
    others = is_image(maps, counts) * (1 - own_shares(maps, counts))
    return -SEPARATION * torch.einsum("bks,bsx->bxk", sources, others.flatten(2))


def placing_bias(sources: torch.Tensor, regions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The same for regions (B, S, H, W) in [0, 1]; one that is NaN leaves its source free."""
    regions = adaptive_avg_pool2d(regions, size).flatten(2)
    wanted = PLACED_WITHIN * regions - PLACED_OUTSIDE * (1 - regions)
    return torch.einsum("bks,bsx->bxk", sources, wanted.nan_to_num(0.0))


def soften(noise_pred: torch.Tensor, maps: torch.Tensor, counts: torch.Tensor, weight: float) -> torch.Tensor:
    """Noise of a call under classifier-free guidance, (2 B, C, H, W), with that of the prompts nearer to the other half."""
    free, prompted = noise_pred.chunk(2)
    drawn = (maps * is_image(maps, counts)).sum(1, keepdim=True) * (counts > 1)[:, None, None, None]
    drawn = interpolate(drawn, size=noise_pred.shape[-2:], mode="bilinear", align_corners=False)
    kept = 1 - SOFTENING * min(weight, 1.0) * drawn.to(noise_pred)
    return torch.cat([free, free + kept * (prompted - free)])


def mixing_loss(maps: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(B,): how far images are from having places of their own. Low where each draws some places alone."""
    images = maps * is_image(maps, counts)
    drawn = images.sum(1, keepdim=True).detach() > DRAWN
    largest = (
        images.detach().argmax(1, keepdim=True)
        == torch.arange(maps.shape[1], device=maps.device)[:, None, None]
    )
    within, outside = ((images * place).sum((2, 3)) for place in (largest & drawn, ~largest & drawn))
    leak = outside / (within + outside + 1e-6)
    places = max(1, maps.shape[-1] * maps.shape[-2] // 16)
    missing = 1 - images.flatten(2).topk(places, -1).values.mean(-1)
    return ((leak + missing) * is_image(maps, counts)[..., 0, 0]).sum(1)


def placing_loss(maps: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """(B,): how much of what images draw is outside their regions (B, S, H, W); NaN as in `placing_bias`."""
    regions = adaptive_avg_pool2d(regions, maps.shape[-2:])
    is_free = regions.isnan()
    inside = (maps * regions.masked_fill(is_free, 1)).sum((2, 3)) / maps.sum((2, 3)).clamp_min(1e-6)
    return (1 - inside).square().sum(1)
