"""The text encoder for programs without torch: two graphs, the tokenizer, and a file that runs them."""

from typing import TYPE_CHECKING

from ..environment import lazy_names

if TYPE_CHECKING:
    from .folder import export_encoder
    from .graphs import trace

__all__ = ["export_encoder", "trace"]

__getattr__, __dir__ = lazy_names(__name__, {".folder": "export_encoder", ".graphs": "trace"})
