"""PNGs that carry what they were made from, and the files of a run.

The settings are one JSON object in the PNG's text chunk `kosmos_g`, next to the mark of provenance.py. A PNG may come from
anywhere, so reading one runs nothing and decodes no pixels: it takes JSON of known keys, types and ranges, and refuses the
rest.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import check_output_file
from ..provenance import MARKED, Marker, read_info
from .settings import FILES, GenerationSettings

if TYPE_CHECKING:
    import PIL.Image

PNG_KEY = "kosmos_g"
# settings in which an image that is kept may differ from those of the run
MAY_DIFFER = ("device", "offload", "versions", "index")


class NoSettings(ValueError):
    """A file that carries no settings of kosmos-g."""


def write_png(
    image: "PIL.Image.Image",
    path: str | Path,
    settings: GenerationSettings,
    overwrite: bool = False,
    marker: Marker = MARKED,
) -> None:
    """Write a PIL image that a model drew with its settings and the mark of a `Marker`, atomically.

    Every drawn image of `kosmos-g generate`, the app and `kosmos-g evaluate` goes through here, enlarged copies and grids too.

    Raises:
        FileExistsError: `path` is there and is not to be overwritten.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already and was not overwritten.")
    marker.save(image, path, settings.is_composite, {PNG_KEY: settings.to_json()})


def read_settings(path: str | Path) -> GenerationSettings:
    """The settings in a PNG that `write_png` wrote.

    Raises:
        NoSettings: it is not a PNG, or carries none.
        ValueError: it is not there, is damaged, or carries something that is not settings.
    """
    advice = "Pass a PNG that kosmos-g wrote."
    info = read_info(path, ["PNG"], advice)
    if info is None:
        raise NoSettings(f"{str(path)!r} cannot be read as PNG. {advice}")
    text = info.get(PNG_KEY)
    if not isinstance(text, str):
        raise NoSettings(f"{str(path)!r} carries no settings of kosmos-g. {advice}")
    try:
        settings = GenerationSettings.from_json(text)
        places = [settings.model, settings.unet, *(lora.path for lora in settings.all_loras)]
        places += [file.path for file in settings.files]
        places += [control.controlnet for control in settings.controls]
        for place in places:
            # on Windows, only looking at a path like this makes it log in at a server that the PNG names
            if place is not None and place.startswith(("//", "\\\\")):
                raise ValueError(f"{place!r} is a path on another machine.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"The settings in {str(path)!r} cannot be used: {error}") from error
    return settings


def maps_path(path: Path) -> Path:
    """Where the maps of an image go: out_maps.png next to out.png."""
    return path.with_stem(path.stem + "_maps")


def output_paths(
    output: str | Path, num_images: int, overwrite: bool = True, enlarged: int = 1, maps: bool = False
) -> list[Path]:
    """Files of a run: `out.png` for one image; `out_0.png`, `out_1.png`, ... and the grid `out.png` for several.

    With `enlarged` above 1 `out_enlarged.png`, a copy of `out.png`, comes last. With `maps` the `maps_path` of each image is
    checked as well, and not among them.

    Raises:
        ValueError: `output` does not end in .png, or cannot be written; see `check_output_file`.
        FileExistsError: one of them is there already and `overwrite` is False.
    """
    checked = partial(check_output_file, suffix=".png", why=", whose files carry settings")
    output = checked(output)
    names = [f"_{index}" for index in range(num_images if num_images > 1 else 0)]
    names += ["", "_enlarged"] if enlarged > 1 else [""]
    paths = [checked(output.with_stem(output.stem + name)) for name in names]
    asked = [*paths, *map(maps_path, paths[:num_images] if maps else ())]
    existing = ", ".join(str(path) for path in asked if path.exists())
    if existing and not overwrite:
        raise FileExistsError(
            f"{existing} would be overwritten. Pass --force, --resume to keep what is there and draw the rest, or another "
            "--output."
        )
    return paths


# A run that is resumed -----------------------------------------------------------------------------------------------


def find_run(paths: Sequence[Path], num_images: int) -> GenerationSettings | None:
    """The settings of the first image of a run that is there, with the seed of the run; None if there is none.

    Args:
        paths: of `output_paths`.
        num_images: of the run.

    Raises:
        ValueError: see `read_settings`.
    """
    for index, path in enumerate(paths):
        if path.exists():
            # grid and enlarged copy have the seed of the first image
            found = read_settings(path)
            return replace(found, seed=max(0, found.seed - (index if index < num_images else 0)))
    return None


def read_kept(settings: GenerationSettings, paths: Sequence[Path]) -> dict[Path, GenerationSettings]:
    """The images of a run that are there, checked against its settings -> {path: RGB PIL image}.

    Args:
        settings: of the run; None as height and width stands for any.
        paths: of `output_paths`.

    Raises:
        ValueError: one cannot be read, or was made with other settings; the first that differs is named. Where (device, offload),
            by which versions and at which place of a run an image was made may differ.
    """
    import PIL.Image

    kept, count = {}, settings.num_images
    for index, path in enumerate(paths):
        if not path.exists():
            continue
        made = {"seed": settings.seed + index, "num_images": 1} if index < count else {}
        _check_same(path, read_settings(path), replace(settings, **made))
        try:
            with PIL.Image.open(path, formats=["PNG"]) as image:
                kept[path] = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}). Delete it, and it is drawn again.") from error
    return kept


def _check_same(path, found, expected):
    for entry in fields(GenerationSettings):
        name, (old, new) = entry.name, (getattr(settings, entry.name) for settings in (found, expected))
        if old == new or name in MAY_DIFFER or (new is None and name in ("height", "width")):
            continue
        was, now = (textwrap.shorten(repr(value), 100) for value in (old, new))
        difference = f"{name} is {was} in it and {now} now"
        if name in FILES and [file.path for file in old] == [file.path for file in new]:
            difference = f"the contents of its {name} have changed since"
        raise ValueError(
            f"{path} was made with other settings: {difference}. --resume continues a run of the same settings: repeat them, "
            "or pass --force or another --output."
        )
