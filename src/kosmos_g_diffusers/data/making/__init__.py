"""Making training data: edits from InstructPix2Pix, compositions from images alone. docs/making-data.md shows how."""

from ..settings import ComposeSettings, EditSettings, ImportSettings
from .compose import Captioner, Composer, compose
from .contact_sheet import write_contact_sheet
from .cutouts import Segmenter, cut_out
from .entities import EntityFinder, parse_entities
from .importing import import_data
from .instructpix2pix import instructpix2pix
from .show import show

__all__ = [
    "Captioner",
    "ComposeSettings",
    "Composer",
    "EditSettings",
    "EntityFinder",
    "ImportSettings",
    "Segmenter",
    "compose",
    "cut_out",
    "import_data",
    "instructpix2pix",
    "parse_entities",
    "show",
    "write_contact_sheet",
]
