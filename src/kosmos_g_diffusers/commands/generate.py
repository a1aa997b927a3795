"""Make images from a prompt of words and images.

Write <i> where an image stands and give one --image for each, in that order. Every PNG carries its settings, so an
image can be made again from itself; flags given with --from change what they name. One image is written to --output;
several go to out_0.png, out_1.png, ... with seeds that count up from --seed, and a grid of them to out.png.
Images and model are stored as the paths you write.

examples:
  kosmos-g generate "<i> in the suit of <i>" --image dog.png --image suit.png --model ./kosmos-g
  kosmos-g generate "<i> in the jungle" --image dog.png --model ./kosmos-g --num-images 4 --seed 1 \\
      --steps 30 --guidance 6 --scheduler dpm --negative "blurry, low quality" --output jungle.png
  kosmos-g generate "<i>" --image dog.png --model ./kosmos-g --control canny:photo.png --control-scale 0.8 \\
      --control depth:@depth.png --control-scale 0.5
  kosmos-g generate "<my-dog> in the snow" --image-words my-dog.safetensors --model ./kosmos-g \\
      --unet anime.safetensors --lora watercolour.safetensors --lora-scale 0.8
  kosmos-g generate --from jungle_2.png --output again.png
  kosmos-g generate --from jungle_2.png --steps 100 --height 768 --output finer.png
  kosmos-g generate --from jungle_2.png --show
"""

import argparse
import secrets
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from ..environment import default_device, default_dtype, package_versions
from ..fields import add_flags
from ..generation.settings import ControlInput, GenerationSettings, InputImage
from ..provenance import add_flags as add_mark_flags
from ..provenance import read_flags as read_mark_flags
from ..sprites.pretrained import SPRITES_NOTE, with_small_model
from .show import as_text

# setting of a ControlInput -> its flag, which is given once for each --control
CONTROL_FLAGS = {
    entry.name: entry.name if entry.name == "controlnet" else f"control_{entry.name}"
    for entry in fields(ControlInput)
    if entry.metadata.get("help")
}


def add_arguments(parser):
    # a flag that was not given leaves the settings of --from alone
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("prompt", nargs="?", help='words, and <i> for each image: "<i> in the suit of <i>"')
    repeated = partial(add, action="append", metavar="FILE")
    repeated("--image", dest="images", help="image of the next <i>; repeat it")
    add("--negative", dest="negative_prompt", metavar="TEXT", help="what the images should not show")
    control = (
        "make the control image of FILE (kosmos-g control --list); KIND:@FILE takes FILE as it is; repeat it"
    )
    repeated("--control", dest="controls", metavar="KIND:FILE", help=control)
    for entry in fields(ControlInput):
        if entry.name in CONTROL_FLAGS:
            flag, kind = _flag(CONTROL_FLAGS[entry.name]), float if entry.type is float else str
            repeated(flag, type=kind, metavar=entry.metadata["metavar"], help=entry.metadata["help"])
    words = "image words that the prompt uses (pipe.save_image_words, kosmos-g app); repeat it"
    repeated("--image-words", help=words)
    add("--output", default="out.png", metavar="FILE", help="PNG to write (default: out.png)")
    add("--force", action="store_true", default=False, help="overwrite files that are there")
    add("--from", dest="source", default=None, metavar="FILE", help="take the settings of a PNG made here")
    add("--show", action="store_true", default=False, help="print the settings as JSON and stop")
    add_mark_flags(add)
    add_flags(parser, GenerationSettings)


def _flag(name):
    return "--" + name.replace("_", "-")


def run(arguments):
    settings, images, control_images = _read(vars(arguments))
    if arguments.show:
        return print(as_text(settings))
    from ..generation.generate import generate_files, load_pipeline
    from ..generation.png import output_paths

    marker = read_mark_flags(arguments)
    paths = output_paths(arguments.output, settings.num_images, arguments.force)
    pipe = load_pipeline(with_small_model(settings))
    for path in generate_files(pipe, settings, paths, images, control_images, arguments.force, marker):
        print(path)
    if settings.model is None:
        print(SPRITES_NOTE, file=sys.stderr)


def _read(arguments):
    """Flags, over the settings of --from, over defaults -> settings, and the paths of images and of control images."""
    names = [entry.name for entry in fields(GenerationSettings) if entry.name in arguments]
    given = {name: arguments[name] for name in names}
    images = given.get("images", [])
    given["images"] = tuple(InputImage.from_file(path) for path in images)
    if "image_words" in given:
        given["image_words"] = tuple(InputImage.from_file(path) for path in given["image_words"])
    if arguments["source"] is None:
        if "prompt" not in given:
            example = 'kosmos-g generate "<i> in the snow" --image x.png'
            raise ValueError(f"Neither a prompt nor --from was given. Try: {example}")
        given.setdefault("seed", secrets.randbelow(2**32))
        given.setdefault("device", default_device())
        given["controls"], control_images = _read_controls(arguments)
        settings = GenerationSettings(**given, versions=package_versions())  # checks the device's name
        if "dtype" not in given:
            settings = replace(settings, dtype=default_dtype(settings.device))
        return settings, images, control_images
    from ..generation.png import read_settings
    from ..processing_kosmos_g import IMAGE_MARK

    recorded = read_settings(arguments["source"])
    if arguments["show"]:
        return recorded, [], []
    folder = Path(arguments["source"]).parent
    # a new prompt of words alone drops them
    if not images and IMAGE_MARK in given.get("prompt", IMAGE_MARK):
        del given["images"]
        images = [image.find(folder) for image in recorded.images]
    # a PNG may come from a stranger: what it names is not downloaded unless the user says so
    for name, label in (("model", "model"), ("unet", "U-Net"), ("lora", "LoRA")):
        place = getattr(recorded, name)
        if name not in given and place is not None and not Path(place).exists():
            raise _not_here(label, place, name)
    if "image_words" not in given:
        found = [words.find(folder, "Pass --image-words anew.") for words in recorded.image_words]
        given["image_words"] = tuple(InputImage.from_file(path) for path in found)
    given["controls"], control_images = _read_controls(arguments, recorded.controls)
    versions = package_versions()
    written = recorded.versions.items()
    other = [f"{name!r} {version!r}" for name, version in written if versions.get(name) != version]
    if other:
        print(f"Note: made with other versions ({', '.join(other)}): pixels may differ.", file=sys.stderr)
    return replace(recorded, **given, index=None, versions=versions), images, control_images


def _not_here(label, place, flag):
    return ValueError(f"The PNG names the {label} {place!r}, which is not here. Pass it with --{flag}.")


def _read_controls(arguments, recorded=()):
    """Flags, over the controls of --from -> controls, and the paths of their images."""
    controls, paths = [], []
    for text in arguments.get("controls", ()):
        name, colon, path = text.partition(":")
        if not colon or not path:
            expected = "KIND:FILE, such as canny:photo.png or canny:@edges.png"
            raise ValueError(f"--control {text!r} is not of the form {expected}.")
        ready = path.startswith("@")
        paths.append(path.removeprefix("@"))
        controls.append(ControlInput(name, InputImage.from_file(paths[-1]), ready))
    if not controls and recorded:
        controls, folder = list(recorded), Path(arguments["source"]).parent
        paths = [control.picture.find(folder, "Pass --control anew.") for control in controls]
        for control in controls:
            # as for the model: nothing that a stranger's PNG names is downloaded
            if "controlnet" not in arguments and control.controlnet and not Path(control.controlnet).exists():
                raise _not_here("ControlNet", control.controlnet, "controlnet")
    for name, flag in CONTROL_FLAGS.items():
        values = arguments.get(flag)
        if values is None:
            continue
        if len(values) != len(controls):
            raise ValueError(
                f"{len(values)} {_flag(flag)} and {len(controls)} --control were given. Pass one for each control, in the "
                "same order."
            )
        pairs = zip(controls, values, strict=True)
        controls = [replace(control, **{name: value}) for control, value in pairs]
    return tuple(controls), paths
