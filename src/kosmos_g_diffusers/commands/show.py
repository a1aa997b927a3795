"""Show what an image file says about itself: prompt, mark, settings.

The settings are in every PNG that was made here, and kosmos-g generate --from FILE takes them. The mark says that a model
drew the image; other programs write and read it too, in PNG, JPEG and WebP. A signed manifest (C2PA) is checked against
the image if c2pa-python is installed. No pixels are decoded, and nothing is fetched.

examples:
  kosmos-g show out.png
"""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..generation.settings import GenerationSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="PNG, JPEG or WebP")


def run(arguments: argparse.Namespace) -> None:
    from ..generation.png import NoSettings, read_settings
    from ..provenance import TERMS, describe_manifest, read_mark

    mark, manifest = read_mark(arguments.file), describe_manifest(arguments.file)
    try:
        settings = read_settings(arguments.file)
    except NoSettings:
        settings = None
    if settings is not None:
        print("prompt:", _as_line(settings.prompt))
    said = "none" if mark is None else mark.source_type.removeprefix(TERMS)
    print("mark:", _as_line(f"{said}, {mark.software}" if mark and mark.software else said))
    if manifest is not None:
        print("manifest:", _as_line(manifest))
    print("settings:", "none" if settings is None else as_text(settings))


def as_text(settings: "GenerationSettings") -> str:
    """Settings as JSON; with everything beyond ASCII escaped if something in it could steer a terminal."""
    text = json.dumps(settings.as_record(), indent=2, ensure_ascii=False)
    if all(character.isprintable() or character == "\n" for character in text):
        return text
    return json.dumps(settings.as_record(), indent=2)


def _as_line(text):
    """Text in one line, in quotes and escaped if something in it could steer a terminal."""
    return text if text.isprintable() else json.dumps(text)
