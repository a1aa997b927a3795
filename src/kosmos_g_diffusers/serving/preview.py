"""What the latents of a step look like, without the VAE: three colours of each latent pixel, by a linear map."""

from typing import TYPE_CHECKING

import PIL.Image
import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SAMPLES = 4  # latents that the map is fitted to
SIDE = 16  # of them, in latent pixels; larger ones cost seconds of a Stable Diffusion VAE on a CPU


class LatentPreview:
    """Linear map from C latent channels to RGB, fitted by least squares to what the VAE of a pipeline decodes.

    The fit works for any VAE; for that of Stable Diffusion it plays the part of the factors that other tools carry as
    constants. It reads random latents, smooth ones, since a latent pixel's colour depends on its neighbours.

    Args:
        vae: AutoencoderKL, on any device.
    """

    factors: torch.Tensor

    @torch.no_grad()
    def __init__(self, vae: "AutoencoderKL"):
        generator = torch.Generator("cpu").manual_seed(0)
        channels = vae.config.latent_channels
        coarse = torch.randn(SAMPLES, channels, SIDE // 4, SIDE // 4, generator=generator)
        latents = torch.nn.functional.interpolate(coarse, SIDE, mode="bicubic")
        latents = latents / latents.std()  # as Stable Diffusion's, (SAMPLES, C, SIDE, SIDE) of unit variance
        scaled = (latents / vae.config.scaling_factor).to(vae.device, vae.dtype)
        # one by one: the VAE's memory is what limits the size of images
        images = torch.cat([vae.decode(sample[None]).sample.float().cpu() for sample in scaled])
        colours = torch.nn.functional.adaptive_avg_pool2d(images, SIDE)  # (SAMPLES, 3, SIDE, SIDE) in [-1, 1]
        features = _features(latents)
        self.factors = torch.linalg.lstsq(features, colours.movedim(1, -1).reshape(-1, 3)).solution

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> PIL.Image.Image:
        """Latents (1, C, H, W) of any step -> RGB PIL image of W x H pixels."""
        latents = latents.float().cpu()
        # schedulers that count in sigmas give latents up to 14 times as wide as those that the map knows
        latents = latents / latents.std().clamp(min=1)
        height, width = latents.shape[-2:]
        colours = (_features(latents) @ self.factors).reshape(height, width, 3)
        return PIL.Image.fromarray(((colours / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy())


def _features(latents):
    """(B, C, H, W) -> (B * H * W, C + 1): the channels of each latent pixel, and 1."""
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
