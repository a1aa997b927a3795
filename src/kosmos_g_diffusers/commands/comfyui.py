"""Put Kosmos-G's nodes into a ComfyUI, or take them out.

`install` writes one folder into custom_nodes and brings it up to date when it is called again; `uninstall` takes out what was
written. Files that you have added or changed stay. `export-sprites` adds what the example workflows of the small model need:
two images and a LoRA. Its U-Net and VAE need no file: ComfyUI's checkpoint loaders know Stable Diffusion's sizes alone, so the
node Load Sprites (demo) brings them.

examples:
  kosmos-g comfyui install ~/ComfyUI
  kosmos-g comfyui export-sprites ~/ComfyUI
  kosmos-g comfyui uninstall ~/ComfyUI
"""

import argparse

from ..comfyui.installing import TESTED, Outcome, export_sprites, find_comfyui, install, uninstall, version_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="action")
    for name, text in (
        ("install", "write the nodes into custom_nodes, or bring them up to date"),
        ("uninstall", "take out what install wrote"),
        ("export-sprites", "write what the workflows of the small model need into input/ and models/loras/"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("comfyui", metavar="FOLDER", help="of a ComfyUI, the one that main.py is in")


def run(arguments: argparse.Namespace) -> None:
    if arguments.action == "install":
        _report(install(arguments.comfyui), find_comfyui(arguments.comfyui))
    elif arguments.action == "uninstall":
        outcome = uninstall(arguments.comfyui)
        print(f"Taken out of {outcome.folder}.{_kept(outcome)} Restart ComfyUI.")
    else:
        for file in export_sprites(arguments.comfyui):
            print(file)


def _report(outcome: Outcome, root) -> None:
    version = version_of(root)
    print(
        f"{'Installed into' if outcome.changed else 'Installed already, nothing to do:'} {outcome.folder}.{_kept(outcome)}"
    )
    print(f"Tried on ComfyUI {', '.join(TESTED)}; this one is {version or 'of an unknown version'}.")
    print("Next:")
    print("1. In ComfyUI's Python: python -m pip install kosmos-g-diffusers (unless it is this one)")
    print(f"2. Put a folder that kosmos-g convert wrote into {root / 'models' / 'kosmos_g'},")
    print(f"   or try the small model: kosmos-g comfyui export-sprites {root}")
    print(
        "3. Restart ComfyUI: the nodes are in conditioning/Kosmos-G, workflows in Workflow > Browse Templates > kosmos_g"
    )


def _kept(outcome):
    return f" Kept as you have changed or added them: {', '.join(outcome.kept)}." if outcome.kept else ""
