"""PNGs that carry what they were made from, and the files of a run.

The settings are one JSON object in the PNG's text chunk `kosmos_g`. A PNG may come from anywhere, so reading one runs
nothing and decodes no pixels: it takes JSON of known keys, types and ranges, and refuses the rest.
"""

from pathlib import Path

import PIL.Image
import PIL.PngImagePlugin

from ..files import written_atomically
from .settings import FILES, GenerationSettings

PNG_KEY = "kosmos_g"


def write_png(image, path, settings, overwrite=False):
    """Write a PIL image with its settings atomically. Raises FileExistsError if `path` is there and is not to be overwritten."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already and was not overwritten.")
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text(PNG_KEY, settings.to_json())
    with written_atomically(path) as file:
        image.save(file, format="PNG", pnginfo=text)


def read_settings(path):
    """The settings in a PNG that `write_png` wrote.

    Raises:
        ValueError: the file is not a PNG, carries no settings, or carries something that is not settings.
    """
    advice = "Pass a PNG that kosmos-g wrote."
    try:
        # reads the chunks before the pixels, and no more
        with PIL.Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(PNG_KEY)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file at {str(path)!r}. {advice}") from error
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as PNG ({error}). {advice}") from error
    if not isinstance(text, str):
        raise ValueError(f"{str(path)!r} carries no settings of kosmos-g. {advice}")
    try:
        settings = GenerationSettings.from_json(text)
        places = [settings.model, settings.unet, settings.lora]
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
        ValueError: `output` does not end in .png, or its folder is not there.
        FileExistsError: one of them is there already and `overwrite` is False.
    """
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"The output {str(output)!r} does not end in .png, whose files carry settings.")
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {str(output.parent)!r} to write into. Make it first.")
    several = range(num_images if num_images > 1 else 0)
    paths = [*(output.with_stem(f"{output.stem}_{index}") for index in several), output]
    existing = ", ".join(str(path) for path in paths if path.exists())
    if existing and not overwrite:
        raise FileExistsError(f"{existing} would be overwritten. Pass --force, or another --output.")
    return paths
