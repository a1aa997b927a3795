"""What the examples share: their command line, their pictures, the file they write, and stand-ins for downloads."""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import MotionAdapter
from diffusers.utils import convert_state_dict_to_diffusers, export_to_gif, make_image_grid
from PIL import Image, ImageChops, ImageFilter, ImageOps

from kosmos_g_diffusers import SPRITES
from kosmos_g_diffusers.control.controls import control_image
from kosmos_g_diffusers.environment import default_device
from kosmos_g_diffusers.sprites.pretrained import SPRITES_NOTE

IMAGES = Path(__file__).parent / "images"
STEPS, STEPS_TINY = 30, 20
GUIDANCE, GUIDANCE_TINY = 6.0, 5.0
ENLARGE_TINY = 4  # its images have sides of 64 pixels, too few to look at


def parse_arguments(description):
    """Read the command line: `tiny`, `model`, `output` and `steps`, and the device, dtype and guidance that suit it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--tiny", action="store_true", help="the small model that ships, of sprites, on the CPU, offline"
    )
    model.add_argument("--model", help="folder or Hub id of a Kosmos-G model (kosmos-g convert makes one)")
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder to write into (default: out)"
    )
    parser.add_argument(
        "--steps", type=int, help=f"denoising steps (default: {STEPS}, with --tiny {STEPS_TINY})"
    )
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.model = SPRITES
    if arguments.steps is None:
        arguments.steps = STEPS_TINY if arguments.tiny else STEPS
    arguments.guidance = GUIDANCE_TINY if arguments.tiny else GUIDANCE
    arguments.device = "cpu" if arguments.tiny else default_device()
    arguments.dtype = torch.float32 if arguments.device == "cpu" else torch.float16
    return arguments


def subjects(arguments):
    """Two pictures for prompts: photos, or with --tiny sprites that the small model was never shown."""
    names = ("star.png", "heart.png") if arguments.tiny else ("cat.jpg", "coffee.jpg")
    return [Image.open(IMAGES / name) for name in names]


def move(sprite, right, down):
    """The picture of a sprite with the sprite elsewhere, as long as it stays inside: its ground is of one colour."""
    return ImageChops.offset(sprite, right, down)


def save(images, name, arguments, rows=1):
    """Write images of one size as a grid, or as the frames of a GIF, and print where the file is."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / name
    if arguments.tiny:
        images = [enlarge(image, ENLARGE_TINY) for image in images]
    if path.suffix == ".gif":
        export_to_gif(images, str(path))
    else:
        make_image_grid([image.convert("RGB") for image in images], rows, len(images) // rows).save(path)
    print(path)
    if arguments.tiny:
        print(SPRITES_NOTE)


def enlarge(image, times):
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def canny_edges(picture, arguments):
    """Canny edges; with --tiny, plain differences of neighbouring pixels where controlnet_aux is missing."""
    try:
        return control_image("canny", picture)
    except ImportError as error:
        if not arguments.tiny:
            raise
        print(f"{error} Here plain differences of neighbouring pixels stand in for Canny edges.")
        channels = picture.filter(ImageFilter.FIND_EDGES).split()
        edges = ImageChops.lighter(ImageChops.lighter(*channels[:2]), channels[2])
        edges = edges.point([255 * (value > 100) for value in range(256)])
        # the filter leaves the outermost pixels as they are
        return ImageOps.expand(ImageOps.crop(edges, 1), 1).convert("RGB")


def random_lora(unet):
    """A small LoRA of random weights for a U-Net, as `load_lora_weights` takes it: a file, a Hub id or such a dict."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet = copy.deepcopy(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    return {f"unet.{name}": tensor for name, tensor in layers.items()}


def resting_adapter(unet):
    """A motion adapter for a small U-Net that was not trained and adds nothing: every frame is drawn on its own."""
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=unet.config.norm_num_groups,
        use_motion_mid_block=False,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(parameter)
    return adapter
