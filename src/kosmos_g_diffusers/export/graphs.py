"""The text encoder as two graphs of torch.export, for any number of prompts, tokens and images.

Letters of the shapes as in modeling_kosmos_g: B prompts, L tokens, N images, Q states an image, D width of the language model,
S image size, A width of the condition, K its length.
"""

import copy

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from ..modeling_kosmos_g import KosmosGTextEncoder

SHORTEST = (
    2  # tokens; a single one would be a constant of the graph, so the null condition is `<s>` and a padding
)


def _part(encoder, *names):
    """The encoder with some of its modules alone: a graph keeps every weight that it is given."""
    part = copy.copy(encoder)
    part._modules = {name: module for name, module in encoder.named_children() if name in names}
    return part


class Vision(nn.Module):
    """`get_image_features`, float32 outside whatever the dtype of the weights is."""

    def __init__(self, encoder: KosmosGTextEncoder):
        super().__init__()
        self.encoder = _part(encoder, "vision_model", "image_to_text_projection")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, Q, D)."""
        return self.encoder.get_image_features(pixel_values.to(self.encoder.dtype)).float()


class Condition(nn.Module):
    """`get_condition`, float32 outside whatever the dtype of the weights is."""

    def __init__(self, encoder: KosmosGTextEncoder):
        super().__init__()
        self.encoder = _part(encoder, "language_model", "aligner")

    def forward(
        self,
        input_ids: torch.Tensor,
        image_embeds: torch.Tensor,
        image_token_mask: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """(B, L) int64, (N, Q, D), (B, L) bool, (B, L) bool -> (B, K, A); N may be 0."""
        image_embeds = image_embeds.to(self.encoder.dtype)
        return self.encoder.get_condition(input_ids, image_embeds, image_token_mask, attention_mask).float()


@torch.no_grad()
def trace(text_encoder: KosmosGTextEncoder) -> dict[str, ExportedProgram]:
    """The graphs of an encoder in evaluation mode.

    Returns:
        "vision": pixel_values (N, 3, S, S) -> image_embeds (N, Q, D), N from 1 on.
        "condition": input_ids (B, L) int64 without image words, image_embeds (N, Q, D), image_token_mask (B, L) bool,
        attention_mask (B, L) bool -> condition (B, K, A); L from SHORTEST to the model's longest, N from 0 on. All states float32.
    """
    config = text_encoder.config
    images, size, q = 2, config.vision_config.image_size, config.latent_query_num
    # two rows of one image each, as long as three columns more
    length = q + 4
    ids = torch.full((2, length), config.text_config.bos_token_id)
    slots = torch.zeros(2, length, dtype=torch.bool)
    slots[:, 2 : 2 + q] = True
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -1] = False
    rows = {0: Dim("prompts"), 1: Dim("tokens", min=SHORTEST, max=config.text_config.max_position_embeddings)}
    some = {0: Dim("images")}
    states = torch.zeros(images, q, config.text_config.embed_dim)
    pixels = torch.zeros(images, 3, size, size)
    return {
        "vision": export(Vision(text_encoder), (pixels,), dynamic_shapes={"pixel_values": some}),
        "condition": export(
            Condition(text_encoder),
            (ids, states, slots, mask),
            dynamic_shapes={
                "input_ids": rows,
                "image_embeds": some,
                "image_token_mask": rows,
                "attention_mask": rows,
            },
        ),
    }
