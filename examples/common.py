"""What the examples share: their command line, their images, the file they write, and stand-ins for downloads."""

import argparse
import copy
import math
import textwrap
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers, export_to_gif, make_image_grid
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from kosmos_g_diffusers import SPRITES
from kosmos_g_diffusers.control.controls import control_image
from kosmos_g_diffusers.environment import as_dtype, default_device, default_dtype
from kosmos_g_diffusers.generation.grid import enlarge
from kosmos_g_diffusers.provenance import save_image
from kosmos_g_diffusers.sprites.pretrained import SPRITES_NOTE, SPRITES_ONLY

IMAGES = Path(__file__).parent / "images"
ENLARGE_SPRITES = 4  # images with sides of 64 pixels are too small to look at
CAPTION_HEIGHT = 40  # pixels, of two lines


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


def save(images, name, arguments, captions=(), rows=1, composite=False):
    """Write images of one size as a grid, or as the frames of a GIF, and print where the file is.

    Args:
        captions: what stands below each image of a grid.
        composite: not all of what is shown was drawn by the model alone; the mark of the file says so. GIFs carry no mark.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / name
    if arguments.small:
        images = [enlarge(image, ENLARGE_SPRITES) for image in images]
    if path.suffix == ".gif":
        export_to_gif(images, str(path))
    else:
        tiles = [with_caption(image, caption) for image, caption in zip(images, captions, strict=True)]
        save_image(make_image_grid(tiles, rows, len(images) // rows), path, composite=composite)
    print(path)
    if arguments.small:
        print(SPRITES_ONLY if arguments.tiny else SPRITES_NOTE)


def with_caption(image, text):
    """An image with a line or two of text below it."""
    tile = Image.new("RGB", (image.width, image.height + CAPTION_HEIGHT), "white")
    tile.paste(image.convert("RGB"))
    lines = textwrap.wrap(text, image.width // 7, max_lines=2, placeholder=" ...")
    place = (image.width // 2, image.height + CAPTION_HEIGHT // 2)
    ImageDraw.Draw(tile).multiline_text(
        place, "\n".join(lines), "black", anchor="mm", align="center", font_size=13
    )
    return tile


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


def random_lora(unet, seed=0, layers=("to_q", "to_v")):
    """A small LoRA of random weights for a U-Net, as `load_lora_weights` takes it: a file, a Hub id or such a dict."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet = copy.deepcopy(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=4, target_modules=list(layers), init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    return {f"unet.{name}": tensor for name, tensor in layers.items()}


def resting_adapter(unet):
    """A motion adapter for a small U-Net that was not trained and adds nothing: every frame is drawn on its own."""
    from diffusers import MotionAdapter

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


def circling_noise(unet, num_frames):
    """(1, C, num_frames, h, w): noise that turns from frame to frame, and is where it began after the last.

    Each frame's is as random as any, and close to that of its neighbours: so are the images, without any learned motion.
    """
    size = unet.config.sample_size
    one, other = torch.randn(
        2, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    angles = [2 * math.pi * frame / num_frames for frame in range(num_frames)]
    return torch.stack([math.cos(angle) * one + math.sin(angle) * other for angle in angles], dim=1)[None]
