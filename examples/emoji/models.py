"""What the emoji have of their own, next to examples/sprites: sizes of VAE and U-Net for 32 px, and their words."""

from ..sprites.base import FACTOR, TEXT_WIDTH
from .packages import CATEGORIES
from .source import SIZE
from .views import GROUNDS, SHADES

CHANNELS = (
    8  # twice Stable Diffusion's, for latents of 8 x 8: a quarter of the U-Net's work on the sprites' 16 x 16
)
VAE = {"image_size": SIZE, "channels": CHANNELS, "widths": (32, 64, 96)}
UNET = {
    "sample_size": SIZE // FACTOR,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (128, 192, 256),  # at 8 x 8, 4 x 4 and 2 x 2
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}


def list_words(subjects):
    """Every word of captions of the subjects, in a fixed order. Words of names that are held out are not among them."""
    words = {"a", "an", "and", "tall", "wide", *CATEGORIES.values(), *(name for name, _ in SHADES)}
    for text in (*GROUNDS.values(), *(subject.name for subject in subjects)):
        words.update(text.split())
    return sorted(words)
