"""What the examples share: their command line, their images, the file they write, and stand-ins for downloads."""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import MotionAdapter
from diffusers.utils import convert_state_dict_to_diffusers, export_to_gif, make_image_grid
from PIL import Image, ImageChops, ImageFilter, ImageOps

from kosmos_g_diffusers import SPRITES
from kosmos_g_diffusers.control.controls import control_image
from kosmos_g_diffusers.environment import as_dtype, default_device, default_dtype
from kosmos_g_diffusers.provenance import save_image
from kosmos_g_diffusers.sprites.pretrained import SPRITES_NOTE

IMAGES = Path(__file__).parent / "images"
ENLARGE_SPRITES = 4  # images with sides of 64 pixels are too small to look at


def parse_arguments(description, sprites=None, photos=None):
    """Read the command line, and find what suits the model.

    Args:
        sprites, photos: the prompt for the small model that ships, and for a model that `--model` names.

    Returns:
        Namespace of `model`, `output`, `steps`, `small` (whether it is the small model), `prompt`, `negative_prompt`,
        `guidance`, `device` and `dtype`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help="folder or Hub id of a Kosmos-G model (default: the small model that ships, of sprites)",
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # accepted: it was needed once
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder to write into (default: out)"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: 20, with --model 30)")
    arguments = parser.parse_args()
    arguments.small = small = arguments.model is None
    arguments.model = arguments.model or SPRITES
    arguments.steps = arguments.steps or (20 if small else 30)
    arguments.prompt = sprites if small else photos
    arguments.negative_prompt = None if small else "blurry"  # a word that the small model does not know
    arguments.guidance = 5.0 if small else 6.0
    arguments.device = "cpu" if small else default_device()
    arguments.dtype = as_dtype(default_dtype(arguments.device))
    return arguments


def subjects(arguments):
    """Two images for prompts: sprites that the small model was never shown, or with --model photos."""
    names = ("star.png", "heart.png") if arguments.small else ("cat.jpg", "coffee.jpg")
    return [Image.open(IMAGES / name) for name in names]


def move(sprite, right, down):
    """The image of a sprite with the sprite elsewhere, as long as it stays inside: its ground is of one colour."""
    return ImageChops.offset(sprite, right, down)


def save(images, name, arguments, rows=1, composite=False):
    """Write images of one size as a grid, or as the frames of a GIF, and print where the file is.

    composite: not all of what is shown was drawn by the model alone; the mark of the file says so. GIFs carry no mark.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / name
    if arguments.small:
        images = [enlarge(image, ENLARGE_SPRITES) for image in images]
    if path.suffix == ".gif":
        export_to_gif(images, str(path))
    else:
        grid = make_image_grid([image.convert("RGB") for image in images], rows, len(images) // rows)
        save_image(grid, path, composite=composite)
    print(path)
    if arguments.small:
        print(SPRITES_NOTE)


def enlarge(image, times):
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def canny_edges(image, arguments):
    """Canny edges; for the small model, plain differences of neighbouring pixels where controlnet_aux is missing."""
    try:
        return control_image("canny", image)
    except ImportError as error:
        if not arguments.small:
            raise
        print(f"{error} Here plain differences of neighbouring pixels stand in for Canny edges.")
        channels = image.filter(ImageFilter.FIND_EDGES).split()
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
