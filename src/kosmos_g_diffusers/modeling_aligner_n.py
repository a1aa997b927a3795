"""AlignerNet N, the inverse projection from the condition to the language model's states, for the alignment stage alone.

Letters of the shapes: B prompts, L tokens, K states of the condition (77), A their width (768), D width of the language
model (2048).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .files import follow_umask
from .modeling_kosmos_g import AlignerNet

if TYPE_CHECKING:
    from .modeling_kosmos_g import KosmosGTextEncoderConfig

# not one of the names that diffusers downloads from the Hub with a pipeline, whatever folder they are in: none reads it
FILE = "aligner_n.safetensors"
EARLIER_FILE = "model.safetensors"  # what version 0.1.0 wrote


class AlignerNetN(nn.Module):
    """Rebuilds the language model's states from the condition (sec. 2.2; unilm/models/aligner.py of the official code).

    As many learned queries as there are tokens read the condition through query layers; encoder layers then turn them
    into states of the language model. The layers are those of AlignerNet M in the other order. Nothing is masked.

    Args:
        config: KosmosGTextEncoderConfig of the encoder it belongs to.
    """

    query_embeds: nn.Parameter
    query_layers: nn.ModuleList
    query_layer_norm: nn.LayerNorm
    position_embedding: nn.Embedding
    output_layers: nn.ModuleList
    output_layer_norm: nn.LayerNorm
    output_projection: nn.Linear

    def __init__(self, config: "KosmosGTextEncoderConfig"):
        super().__init__()
        mirror = AlignerNet(config)
        width, eps = config.aligner_hidden_size, config.text_config.layer_norm_eps
        self.query_embeds = nn.Parameter(torch.randn(config.aligner_max_positions, width))
        self.query_layers = mirror.query_layers
        self.query_layer_norm = nn.LayerNorm(width, eps=eps)
        # as in AlignerNet M, the first two rows are never read
        self.position_embedding = nn.Embedding(config.aligner_max_positions, width)
        self.output_layers = mirror.encoder_layers
        self.output_layer_norm = nn.LayerNorm(width, eps=eps)
        self.output_projection = nn.Linear(width, config.text_config.embed_dim)

    def forward(self, condition: torch.Tensor, length: int) -> torch.Tensor:
        """(B, K, A) condition -> (B, length, D)."""
        states = self.query_embeds[:length].expand(len(condition), -1, -1)
        for layer in self.query_layers:
            states = layer(states, None, condition)
        positions = torch.arange(2, 2 + length, device=condition.device)
        states = self.query_layer_norm(states) + self.position_embedding(positions)
        for layer in self.output_layers:
            states = layer(states, None)
        return self.output_projection(self.output_layer_norm(states))

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: "KosmosGTextEncoderConfig") -> "AlignerNetN":
        """Read what `save_pretrained` or the conversion of an alignment-stage checkpoint wrote, in float32.

        Raises:
            ValueError: there is no such file, or its weights are not those of `config`.
        """
        path = next((path for name in (FILE, EARLIER_FILE) if (path := Path(folder) / name).is_file()), None)
        if path is None:
            raise ValueError(
                f"There is no AlignerNet N at {Path(folder) / FILE}. Pass the folder aligner_n of an alignment run or of a converted "
                "alignment-stage checkpoint; final-stage checkpoints hold none."
            )
        model = cls(config)
        try:
            model.load_state_dict(load_file(path), strict=True)
        except RuntimeError as error:
            raise ValueError(
                f"The weights in {path} are not those of an AlignerNet N of the encoder's sizes ({error}). Pass the "
                "folder that was saved with this encoder."
            ) from error
        return model

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write `aligner_n.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, folder / FILE, metadata={"format": "pt"})
        follow_umask(folder)
