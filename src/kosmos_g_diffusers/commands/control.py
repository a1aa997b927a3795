"""Make the control image of an image, as a ControlNet reads it.

The control image has the size of the image, both sides rounded down to multiples of 8, unless --short-side says otherwise. Look
at it, change it in a paint program, and pass it to kosmos-g generate --control NAME:@edges.png. For inpaint the holes are
its transparent pixels.

examples:
  kosmos-g control --list
  kosmos-g control canny photo.png --output edges.png
  kosmos-g control canny photo.png --low 50 --high 150 --short-side 512 --output edges.png
  kosmos-g control inpaint photo.png --mask mask.png --output holes.png
"""

import argparse

from ..control.table import CONTROLS
from ..environment import check_device
from ..fields import add_flag
from ..files import check_output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="kind of control; --list shows them")
    add("image", nargs="?", metavar="IMAGE", help="file to make it of")
    add("--list", action="store_true", help="print the table of controls and stop")
    add("-o", "--output", default="control.png", metavar="FILE", help="PNG to write (default: control.png)")
    add("--force", action="store_true", help="overwrite the file if it is there")
    add("--mask", metavar="FILE", help="for inpaint: image that is white where something new belongs")
    add("--short-side", type=int, metavar="PIXELS", help="of the control image (default: the image's own)")
    add("--weights", metavar="FOLDER", help="files of the annotator (default: from the Hub)")
    add("--device", default="cpu", help="where the annotator runs: cpu, cuda, mps, ... (default: cpu)")
    for name, controls in _controls_by_parameter().items():
        parameter = CONTROLS[controls[0]].parameters[name]
        text = f"{', '.join(controls)}: {parameter.help} (default: {parameter.default})"
        add_flag(parser, name, type(parameter.default), parameter.default, text)


def run(arguments: argparse.Namespace) -> None:
    if arguments.list:
        return print(_table())
    if arguments.image is None:  # nor perhaps the name before it
        example = "kosmos-g control canny photo.png"
        raise ValueError(f"Name a control and an image: {example}. --list shows the controls.")
    output = check_output_file(arguments.output, arguments.force, ".png")
    check_device(arguments.device)
    from ..control.controls import control_image, save_control

    parameters = {name: value for name, value in vars(arguments).items() if name in _controls_by_parameter()}
    image = control_image(
        arguments.name,
        arguments.image,
        mask=arguments.mask,
        short_side=arguments.short_side,
        weights=arguments.weights,
        device=arguments.device,
        **parameters,
    )
    save_control(image, output, arguments.force)
    print(output)


def _controls_by_parameter():
    """Parameter -> names of the controls that have it; the same name means the same everywhere."""
    controls = {}
    for name, control in CONTROLS.items():
        for parameter in control.parameters:
            controls.setdefault(parameter, []).append(name)
    return controls


def _table():
    lines = []
    for name, control in CONTROLS.items():
        settings = ", ".join(f"{key} {parameter.default}" for key, parameter in control.parameters.items())
        lines.append(f"{name:<17}{control.description}")
        lines.append(f"{'':<17}ControlNet {control.controlnet}")
        lines.append(f"{'':<17}needs {control.weights or 'no download'}{'; ' + settings if settings else ''}")
    return "\n".join(lines)
