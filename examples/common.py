"""What the examples share: their command line, the photos, the file they write, and stand-ins for downloads."""

import argparse
import copy
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers, export_to_gif
from PIL import ImageFilter

from kosmos_g_diffusers.control import control_image
from kosmos_g_diffusers.generation import default_device
from kosmos_g_diffusers.tiny import RANDOM_MODEL_NOTE

PHOTOS = Path(__file__).parent / "images"
CAT, COFFEE = PHOTOS / "cat.jpg", PHOTOS / "coffee.jpg"


def parse_arguments(description):
    """Read the command line: `tiny` or `model`, `output` and `steps`, and the device and dtype that suit the model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--tiny", action="store_true", help="a small model of random weights, on the CPU, offline"
    )
    model.add_argument("--model", help="folder or Hub id of a Kosmos-G model (kosmos-g convert makes one)")
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder to write into (default: out)"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: 30, with --tiny 10)")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = 10 if arguments.tiny else 30
    arguments.device = "cpu" if arguments.tiny else default_device()
    arguments.dtype = torch.float32 if arguments.device == "cpu" else torch.float16
    return arguments


def save(image, name, arguments):
    """Write an image, or a list of frames as GIF, and print where it is."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / name
    if isinstance(image, list):
        export_to_gif(image, str(path))
    else:
        image.save(path)
    print(path)
    if arguments.tiny:
        print(RANDOM_MODEL_NOTE)


def canny_edges(photo, arguments):
    """Canny edges of a photo; with --tiny, plain differences of neighbouring pixels where controlnet_aux is missing."""
    try:
        return control_image("canny", photo)
    except ImportError as error:
        if not arguments.tiny:
            raise
        print(f"{error} Here plain differences of neighbouring pixels stand in for Canny edges.")
        return photo.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB")


def random_lora(unet):
    """A small LoRA of random weights for a U-Net, as `load_lora_weights` takes it: a file, a Hub id or such a dict."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet = copy.deepcopy(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    return {f"unet.{name}": tensor for name, tensor in layers.items()}
