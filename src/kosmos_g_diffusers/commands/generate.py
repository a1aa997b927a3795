"""Make images from a prompt of words and images.

Write <i> where an image stands and give one --image for each, in that order. Every PNG carries its settings, so an
image can be made again from itself; flags given with --from change what they name. One image is written to --output;
several go to out_0.png, out_1.png, ... with seeds that count up from --seed, and a grid of them to out.png.
The same command with --resume continues a run that was stopped.
Images and model are stored as the paths you write.

examples:
  kosmos-g generate "<i> in the suit of <i>" --image dog.png --image suit.png --model ./kosmos-g
  kosmos-g generate "<i> in the jungle" --image dog.png --model ./kosmos-g --num-images 4 --seed 1 \\
      --steps 30 --guidance 6 --scheduler dpm --negative "blurry, low quality" --output jungle.png
  kosmos-g generate "<i>" --image dog.png --model ./kosmos-g --control canny:photo.png --control-scale 0.8 \\
      --control depth:@depth.png --control-scale 0.5
  kosmos-g generate "<my-dog> in the snow" --image-words my-dog.safetensors --model ./kosmos-g \\
      --unet anime.safetensors --lora watercolour.safetensors --lora-scale 0.8 --lora grain.safetensors
  kosmos-g generate "<i> and <i> on a white background" --image star.png --image heart.png --maps --binding 1 \\
      --region 0,0,0.5,1 --region 0.5,0,1,1
  kosmos-g generate "<i> on a beach" --image dog.png --model ./kosmos-g --init-image photo.png --mask hole.png
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
from ..fields import add_flags, check_value
from ..generation import memory
from ..generation.settings import ControlInput, GenerationSettings, InputImage, LoraInput
from ..maps.boxes import read_region
from ..provenance import add_flags as add_mark_flags
from ..provenance import read_flags as read_mark_flags
from ..sprites.pretrained import SPRITES_NOTE, with_small_model
from .show import as_text

ENLARGED = 4  # times, for the small model: 64 pixels are a speck in a viewer
MOST_ENLARGED = 64
# setting of a ControlInput -> its flag, which belongs to a --control
CONTROL_FLAGS = {
    entry.name: entry.name if entry.name == "controlnet" else f"control_{entry.name}"
    for entry in fields(ControlInput)
    if entry.metadata.get("help")
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
            _add_belonging(parser, flag, "controls", kind, entry)
    region = (
        "X0,Y0,X1,Y1: where the next image of the prompt shall be, in fractions; none: anywhere; repeat it"
    )
    repeated("--region", dest="regions", metavar="BOX", help=region)
    change = "image to change (--strength); with --mask a part of it"
    add("--init-image", metavar="FILE", help=change)
    hole = "image of the same shape: its transparent parts, or else its light ones, are drawn anew"
    add("--mask", metavar="FILE", help=hole)
    words = "image words that the prompt uses (pipe.save_image_words, kosmos-g app); repeat it"
    repeated("--image-words", help=words)
    add("--output", default="out.png", metavar="FILE", help="PNG to write (default: out.png)")
    existing = parser.add_mutually_exclusive_group().add_argument
    flag = {"action": "store_true", "default": False}
    existing("--force", help="overwrite files that are there", **flag)
    resume = "keep the images of this run that are there and draw the rest; the seed is theirs"
    existing("--resume", help=resume, **flag)
    enlarge = f"times of an enlarged copy of --output next to it (default: {ENLARGED}; with --model 1, none)"
    add("--enlarge", type=int, default=None, metavar="N", help=enlarge)
    maps = "also write where each image of the prompt went: out_maps.png next to out.png"
    add("--maps", action="store_true", default=False, help=maps)
    add("--from", dest="source", default=None, metavar="FILE", help="take the settings of a PNG made here")
    add("--show", action="store_true", default=False, help="print the settings as JSON and stop")
    add_mark_flags(add)
    lora, lora_scale = (entry for entry in fields(GenerationSettings) if entry.name in ("lora", "lora_scale"))
    metavar, text = (lora.metadata[name] for name in ("metavar", "help"))
    add("--lora", action="append", dest="loras", metavar=metavar, help=text)
    _add_belonging(parser, "--lora-scale", "loras", float, lora_scale)
    add_flags(parser, GenerationSettings, leave_out=("lora", "lora_scale"))
    memory.add_flag(add)


def _flag(name):
    return "--" + name.replace("_", "-")


def _add_belonging(parser, flag, owner, kind, entry):
    """A flag that is repeated, whose values know how many of another, which has the destination `owner`, came before."""

    class Belonging(argparse.Action):
        def __call__(self, parser, namespace, value, option_string=None):
            before = getattr(namespace, self.dest, [])
            setattr(namespace, self.dest, [*before, (len(getattr(namespace, owner, [])), value)])

    metavar, text = (entry.metadata[name] for name in ("metavar", "help"))
    parser.add_argument(flag, action=Belonging, type=kind, metavar=metavar, help=text)


def _belonging(values, records, flag, owner):
    """Values of such a flag by the place of the record that each belongs to, which came with the flag `owner`."""
    places = [before - 1 for before, _ in values]
    if len(values) == len(records):  # as all of them at the end of the line
        places = list(range(len(records)))
    if -1 in places or len(set(places)) < len(places):
        raise ValueError(
            f"{len(values)} {flag} and {len(records)} {owner} were given. A {flag} belongs to the {owner} before it: pass at "
            f"most one behind each {owner}, or one for each in the same order."
        )
    return {place: value for place, (_, value) in zip(places, values, strict=True)}


def run(arguments: argparse.Namespace) -> None:
    settings, images, control_images, changed = _read(vars(arguments))
    if arguments.show:
        return print(as_text(settings))
    from ..generation.generate import encode_first, generate_files, load_pipeline
    from ..generation.png import find_run, output_paths, read_kept

    marker, force, resume, enlarged = (
        read_mark_flags(arguments),
        arguments.force,
        arguments.resume,
        arguments.enlarge,
    )
    if enlarged is None:
        enlarged = ENLARGED if settings.model is None else 1
    check_value("--enlarge", enlarged, int, low=1, high=MOST_ENLARGED)
    paths = output_paths(arguments.output, settings.num_images, force or resume, enlarged, arguments.maps)
    begun = find_run(paths, settings.num_images) if resume and arguments.source is None else None
    if begun is not None and "seed" not in arguments:
        settings = replace(settings, seed=begun.seed)
    encode = memory.TOGETHER
    if (budget := memory.find_budget(arguments.memory, settings.device)) is not None:
        # what a PNG says of its weights decides its image
        if begun is not None:
            named = [name for name in memory.OF_IMAGES if name not in arguments]
            settings = replace(settings, **{name: getattr(begun, name) for name in named})
        is_drawn = begun is not None or arguments.source is not None
        fixed = {*vars(arguments), *(memory.OF_IMAGES if is_drawn else ())}
        encodes_first = not (arguments.maps or settings.is_guided or changed)
        plan = memory.plan_memory(
            with_small_model(settings), budget, fixed=fixed, encodes_first=encodes_first
        )
        print(plan, file=sys.stderr)
        settings, encode = plan.applied_to(settings), plan.encode
    if resume:
        read_kept(settings, paths)  # what is wrong is said before a model is loaded
    loaded, encoded = with_small_model(settings), None
    if encode != memory.TOGETHER:
        encoded = encode_first(loaded, images, by_layer=encode == memory.BY_LAYER)
    pipe = load_pipeline(loaded, encoded is not None)
    options = {"overwrite": force, "resume": resume, "enlarged": enlarged, "marker": marker}
    options |= {"maps": arguments.maps, "encoded": encoded}
    for path in generate_files(pipe, settings, paths, images, control_images, changed, **options):
        print(path)
    if settings.model is None:
        print(SPRITES_NOTE, file=sys.stderr)


def _read(arguments):
    """Flags, over the settings of --from, over defaults -> settings, and the paths of images, of control images, and of what is changed."""
    names = [entry.name for entry in fields(GenerationSettings) if entry.name in arguments]
    given = {name: arguments[name] for name in names if name not in ("loras", "lora_scale")}
    images = given.get("images", [])
    if "regions" in given:
        given["regions"] = tuple(read_region(text, "--region") for text in given["regions"])
    given["images"] = tuple(InputImage.from_file(path) for path in images)
    if "image_words" in given:
        given["image_words"] = tuple(InputImage.from_file(path) for path in given["image_words"])
    changed = {name: given[name] for name in ("init_image", "mask") if name in given}
    given.update({name: InputImage.from_file(path) for name, path in changed.items()})
    if arguments["source"] is None:
        if "prompt" not in given:
            example = 'kosmos-g generate "<i> in the snow" --image x.png'
            raise ValueError(f"Neither a prompt nor --from was given. Try: {example}")
        given.setdefault("seed", secrets.randbelow(2**32))
        given.setdefault("device", default_device())
        given["controls"], control_images = _read_controls(arguments)
        given.update(_read_loras(arguments))
        settings = GenerationSettings(**given, versions=package_versions())  # checks the device's name
        if "dtype" not in given:
            settings = replace(settings, dtype=default_dtype(settings.device))
        return settings, images, control_images, list(changed.values())
    from ..generation.png import read_settings
    from ..processing_kosmos_g import IMAGE_MARK

    recorded = read_settings(arguments["source"])
    if arguments["show"]:
        return recorded, [], [], []
    folder = Path(arguments["source"]).parent
    # a new prompt of words alone drops them
    if not images and IMAGE_MARK in given.get("prompt", IMAGE_MARK):
        del given["images"]
        images = [image.find(folder) for image in recorded.images]
    # a PNG may come from a stranger: what it names is not downloaded unless the user says so
    if "prompt" in given and IMAGE_MARK not in given["prompt"]:
        given.setdefault("regions", ())
    named = [("model", "model", recorded.model), ("unet", "U-Net", recorded.unet)]
    named += [("loras", "LoRA", lora.path) for lora in recorded.all_loras]
    for name, label, place in named:
        if name not in arguments and place is not None and not Path(place).exists():
            raise _not_here(label, place, name.rstrip("s"))
    given.update(_read_loras(arguments, recorded.all_loras))
    if "image_words" not in given:
        found = [words.find(folder, "Pass --image-words anew.") for words in recorded.image_words]
        given["image_words"] = tuple(InputImage.from_file(path) for path in found)
    given["controls"], control_images = _read_controls(arguments, recorded.controls)
    for name in ("init_image", "mask"):
        if name not in changed and (file := getattr(recorded, name)) is not None:
            changed[name] = file.find(folder, f"Pass {_flag(name)} anew.")
    versions = package_versions()
    written = recorded.versions.items()
    other = [f"{name!r} {version!r}" for name, version in written if versions.get(name) != version]
    if other:
        print(f"Note: made with other versions ({', '.join(other)}): pixels may differ.", file=sys.stderr)
    settings = replace(recorded, **given, index=None, versions=versions)
    paths = [changed[name] for name in ("init_image", "mask") if name in changed]
    return settings, images, control_images, paths


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
        values = _belonging(arguments.get(flag, ()), controls, _flag(flag), "--control")
        for place, value in values.items():
            controls[place] = replace(controls[place], **{name: value})
    return tuple(controls), paths


def _read_loras(arguments, recorded=()):
    """Flags, over the LoRAs of --from -> what they change in the settings."""
    if "loras" not in arguments and "lora_scale" not in arguments:
        return {}
    loras = [LoraInput(path) for path in arguments.get("loras", ())]
    if not loras:
        loras = list(recorded)
    elif len(loras) == len(recorded):  # the same ones at other places: their scales stay
        loras = [replace(lora, scale=before.scale) for lora, before in zip(loras, recorded, strict=True)]
    values = _belonging(arguments.get("lora_scale", ()), loras, "--lora-scale", "--lora")
    for place, value in values.items():
        loras[place] = replace(loras[place], scale=value)
    return GenerationSettings.lora_fields(loras)
