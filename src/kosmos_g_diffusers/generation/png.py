"""PNGs that carry what they were made from, and the files of a run.

The settings are one JSON object in the PNG's text chunk `kosmos_g`, next to the mark of provenance.py. A PNG may come from anywhere, so reading one runs
nothing and decodes no pixels: it takes JSON of known keys, types and ranges, and refuses the rest.
"""

from functools import partial
from pathlib import Path

from ..files import check_output_file
from ..provenance import MARKED, read_info
from .settings import FILES, GenerationSettings

PNG_KEY = "kosmos_g"


class NoSettings(ValueError):
    """A file that carries no settings of kosmos-g."""


def write_png(image, path, settings, overwrite=False, marker=MARKED):
    """Write a PIL image that a model drew with its settings and the mark of a `Marker`, atomically.

    Every drawn image of `kosmos-g generate`, the app and `kosmos-g evaluate` goes through here, enlarged copies and grids too.

    Raises:
        FileExistsError: `path` is there and is not to be overwritten.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already and was not overwritten.")
    marker.save(image, path, settings.is_composite, {PNG_KEY: settings.to_json()})


def read_settings(path):
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
        places += [file.path for name in FILES for file in getattr(settings, name)]
        for control in settings.controls:
            places += [control.picture.path, control.controlnet]
        for place in places:
            # on Windows, only looking at a path like this makes it log in at a server that the PNG names
            if place is not None and place.startswith(("//", "\\\\")):
                raise ValueError(f"{place!r} is a path on another machine.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"The settings in {str(path)!r} cannot be used: {error}") from error
    return settings


def output_paths(output, num_images, overwrite=True):
    """Files of a run: `out.png` for one image; `out_0.png`, `out_1.png`, ... and the grid `out.png` for several.

    Raises:
        ValueError: `output` does not end in .png, or cannot be written; see `check_output_file`.
        FileExistsError: one of them is there already and `overwrite` is False.
    """
    checked = partial(check_output_file, suffix=".png", why=", whose files carry settings")
    output = checked(output)
    several = range(num_images if num_images > 1 else 0)
    paths = [*(output.with_stem(f"{output.stem}_{index}") for index in several), output]
    existing = ", ".join(str(path) for path in map(checked, paths) if path.exists())
    if existing and not overwrite:
        raise FileExistsError(f"{existing} would be overwritten. Pass --force, or another --output.")
    return paths
