"""What the emoji need beside examples/sprites: a VAE for 32 px, a Stable Diffusion that knows their words, tokenizers."""

import random
import string
from pathlib import Path

import torch
from base import LATENT_NOISE, MAX_WORDS, TEXT_WIDTH, DiffusionStage, VaeStage
from diffusers import AutoencoderKL, UNet2DConditionModel
from kosmos import MAX_TOKENS, QUERIES
from packages import CATEGORIES
from pictures import GROUNDS, SHADES
from safetensors.torch import load_file, save_file
from source import PHOTO_SIZE, SIZE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from kosmos_g_diffusers import KosmosGTokenizer
from kosmos_g_diffusers.data import preprocess_target

FACTOR = 4  # 32 px pictures become 8 x 8 latents: a quarter of the U-Net's work on the sprites' 16 x 16
CHANNELS = 8  # twice Stable Diffusion's, for so small latents
WIDTHS = (128, 192, 256)  # of the U-Net, at 8 x 8, 4 x 4 and 2 x 2
LATENT_SHAPE = (CHANNELS, SIZE // FACTOR, SIZE // FACTOR)


def list_words(subjects):
    """Every word of captions of the subjects, in a fixed order. Words of names that are held out are not among them."""
    words = {"a", "an", "and", "tall", "wide", *CATEGORIES.values(), *(name for name, _ in SHADES)}
    for text in (*GROUNDS.values(), *(subject.name for subject in subjects)):
        words.update(text.split())
    return sorted(words)


class PictureCollate:
    """Batches of `pixel_values` (B, 3, 32, 32) in [-1, 1] and the VAE's `latent_noise`."""

    def prepare(self, sample, generator):
        return {
            "pixel_values": preprocess_target(sample.target, SIZE),
            "latent_noise": torch.randn(LATENT_SHAPE, generator=generator),
        }

    def __call__(self, rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class EmojiVaeStage(VaeStage):
    """The sprites' VAE training with another VAE.

    Args:
        pictures: (N, 3, 32, 32) in [-1, 1], by which the scaling factor is measured.
    """

    def __init__(self, pictures):
        nn.Module.__init__(self)  # not VaeStage's, which builds the sprites' VAE
        self._pictures = (pictures,)
        self.vae = AutoencoderKL(
            sample_size=SIZE,
            block_out_channels=(32, 64, 96),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )
        _fix_posterior(self.vae)

    def save_pretrained(self, folder, state_dict=None):
        """Write `folder/vae`, whose scaling factor brings latents to a deviation of 1."""
        vae = AutoencoderKL.from_config(self.vae.config)
        state_dict = self.state_dict() if state_dict is None else state_dict
        vae.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in state_dict.items()})
        _fix_posterior(vae)  # weight decay and rounding have no say in the log-variance
        with torch.no_grad():
            deviation = vae.encode(self._pictures[0]).latent_dist.mean.std()
        vae.register_to_config(scaling_factor=round(1 / float(deviation), 4))
        vae.save_pretrained(Path(folder) / "vae")


@torch.no_grad()
def _fix_posterior(vae):
    """The second half of these channels is the posterior's log-variance."""
    vae.quant_conv.weight[CHANNELS:] = 0
    vae.quant_conv.bias[CHANNELS:] = 2 * torch.tensor(LATENT_NOISE).log()


class EmojiDiffusionStage(DiffusionStage):
    """The sprites' Stable Diffusion with a U-Net for smaller latents of more channels."""

    def __init__(self, tokenizer, scheduler):
        super().__init__(tokenizer, scheduler)
        self.unet = UNet2DConditionModel(
            sample_size=LATENT_SHAPE[-1],
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=WIDTHS,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )


def read_pictures(source, indices):
    """(N, 3, 32, 32) in [-1, 1], the targets of a source's samples."""
    # pictures follow from the number; the random numbers are for the words
    targets = [source.read(index, random.Random(0)).target for index in indices]
    return torch.stack([preprocess_target(target, SIZE) for target in targets])


def encode_latents(vae, source, path, batch_size=64):
    """Latents of every picture of a source, scaled to deviation 1, (len(source), 8, 8, 8) float16; kept in `path`."""
    path = Path(path)
    if not path.exists():
        latents = []
        for first in tqdm(range(0, len(source), batch_size), unit="batch", desc="latents", mininterval=30):
            pictures = read_pictures(source, range(first, min(first + batch_size, len(source))))
            with torch.no_grad():
                means = vae.encode(pictures).latent_dist.mean
            latents.append((means * vae.config.scaling_factor).half())
        partial = path.with_suffix(".partial")
        save_file({"latents": torch.cat(latents)}, partial)
        partial.rename(path)
    return load_file(path)["latents"]


def build_clip_tokenizer(words):
    """A token a word; words of held-out names are unknown."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_WORDS,
    )


def build_tokenizer(words):
    """A piece a word of the captions, and every printable character for what else people type."""
    characters = ["▁", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [(f"▁{word}", -2.0) for word in words] + [(character, -9.0) for character in characters]
    return KosmosGTokenizer.from_vocabulary(
        pieces, image_size=PHOTO_SIZE, latent_query_num=QUERIES, model_max_length=MAX_TOKENS
    )
