"""Small models and their training: a VAE, a Stable Diffusion that draws sprites from captions, the encoder of Kosmos-G.

The first two are plain diffusers models, trained by the package's loop: it takes any module that turns a batch into losses.
The encoder is of the package's own classes. examples/emoji builds on the same.
"""

import copy
import random
import string
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from kosmos_g_diffusers import (
    KosmosGPipeline,
    KosmosGTextEncoder,
    KosmosGTextEncoderConfig,
    KosmosGTokenizer,
)
from kosmos_g_diffusers.conversion.initial_weights import reset_weights
from kosmos_g_diffusers.data import AlignCollate, MixtureDataset, preprocess_target
from kosmos_g_diffusers.files import written_atomically
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.sprites.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, PATTERNS, SHAPES, SIZES
from kosmos_g_diffusers.training.checkpoints import checkpoint_folder, list_checkpoints
from kosmos_g_diffusers.training.config import TrainConfig
from kosmos_g_diffusers.training.loop import train as train_or_stop

LATENT_NOISE = 0.05  # deviation of the VAE's posterior, in units of its latents
FACTOR = 4  # pixels of a latent, in height and width
CHANNELS = 4  # of the latents
WORDS = (*SHAPES, *COLOURS, *PATTERNS, *SIZES, *BACKGROUNDS, "a", "an", "and", "on", "background", ",")
WORLD = {
    "words": list(WORDS),
    "most_images": 2,
    "plain_background": True,
}  # what the pipelines warn of leaving
MAX_WORDS = 24
TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.1
UNET = {
    "sample_size": IMAGE_SIZE // FACTOR,
    "block_out_channels": (64, 128, 160),
    "layers_per_block": 1,
    # no attention at 16 x 16: it would double the time of a step
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
WIDTH = 192  # of the language model and the vision tower
QUERIES = 16  # states of an image
MAX_TOKENS = 256
COMMON = {
    "mixed_precision": "bf16",
    "workers": 1,
    "log_every": 20,
    "save_every": 100,
    "keep_checkpoints": 1,
    "adam_beta2": 0.99,
    "max_grad_norm": 1.0,
}

# The VAE ----------------------------------------------------------------------------------------------------------


class ImageCollate:
    """Batches of `pixel_values` (B, 3, side, side) in [-1, 1] and the VAE's `latent_noise`."""

    def __init__(self, channels=CHANNELS):
        self.channels = channels

    def prepare(self, sample, generator):
        side = sample.target.width // FACTOR
        return {
            "pixel_values": preprocess_target(sample.target, sample.target.width),
            "latent_noise": torch.randn(self.channels, side, side, generator=generator),
        }

    def __call__(self, rows):
        return default_collate(rows)


def build_vae(image_size=IMAGE_SIZE, channels=CHANNELS, widths=(16, 32, 64)):
    """A small AutoencoderKL with a posterior of fixed width."""
    vae = AutoencoderKL(
        sample_size=image_size,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    fix_posterior(vae)
    return vae


@torch.no_grad()
def fix_posterior(vae):
    """The second half of these channels is the posterior's log-variance."""
    vae.quant_conv.weight[vae.config.latent_channels :] = 0
    vae.quant_conv.bias[vae.config.latent_channels :] = 2 * torch.tensor(LATENT_NOISE).log()


class VaeStage(nn.Module):
    """Trains a VAE of `build_vae`: distances of images, and a leash on the latents' size.

    Args:
        images: (N, 3, side, side) in [-1, 1], by which the scaling factor is measured.
    """

    def __init__(self, vae, images):
        super().__init__()
        self.vae, self.images = vae, images

    def move_frozen(self, device=None, dtype=None):
        return self

    def forward(self, batch):
        pixels = batch["pixel_values"]
        mean = self.vae.encode(pixels).latent_dist.mean
        decoded = self.vae.decode(mean + LATENT_NOISE * batch["latent_noise"]).sample.float()
        pixels, mean = pixels.float(), mean.float()
        return {
            "l1": F.l1_loss(decoded, pixels),
            "mse": F.mse_loss(decoded, pixels),
            "size": 1e-3 * mean.square().mean(),
        }

    def save_pretrained(self, folder, state_dict=None):
        """Write `folder/vae`, whose scaling factor brings latents to a deviation of 1."""
        vae = copy_part(self, "vae", state_dict).cpu()
        fix_posterior(vae)  # weight decay and rounding have no say in the log-variance
        with torch.no_grad():
            deviation = vae.encode(self.images).latent_dist.mean.std()
        vae.register_to_config(scaling_factor=round(1 / float(deviation), 4))
        vae.save_pretrained(Path(folder) / "vae")


def copy_part(stage, name, state_dict=None):
    """A copy of one model of a stage, with its weights in a state_dict of the stage if one is given."""
    part = copy.deepcopy(getattr(stage, name))
    if state_dict is not None:
        prefix = f"{name}."
        part.load_state_dict(
            {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        )
    return part


def read_images(source, indices):
    """(N, 3, side, side) in [-1, 1], the targets of a source's samples."""
    # images follow from the number; the random numbers are for the words
    targets = [source.read(index, random.Random(0)).target for index in indices]
    return torch.stack([preprocess_target(target, target.width) for target in targets])


def encode_latents(vae, source, path, batch_size=64):
    """Latents of every image of a source, scaled to deviation 1, (len(source), ...) float16; kept in `path`."""
    if not path.exists():
        latents = []
        for first in tqdm(range(0, len(source), batch_size), unit="batch", desc="latents"):
            images = read_images(source, range(first, min(first + batch_size, len(source))))
            with torch.no_grad():
                means = vae.encode(images).latent_dist.mean
            latents.append((means * vae.config.scaling_factor).half())
        with written_atomically(path) as file:
            file.write(save({"latents": torch.cat(latents)}))
    return load_file(path)["latents"]


# The Stable Diffusion ---------------------------------------------------------------------------------------------


class CaptionCollate:
    """Batches of `input_ids` (B, 24), `latents` and `noise` as `encode_latents` makes them, and `timesteps` (B,).

    noisier_share: of samples that have a time step of the noisier half, which decides where things are; the others have any.
    """

    def __init__(self, tokenizer, latents, noise_width, noisier_share=0):
        self.tokenizer, self.latents, self.noisier_share = tokenizer, latents, noisier_share
        self.noise_width = noise_width * LATENT_NOISE  # in units of the scaled latents

    def prepare(self, sample, generator):
        index = int(sample.key.rpartition(":")[2])
        latents = self.latents[index].float()
        latents = latents + self.noise_width * torch.randn(latents.shape, generator=generator)
        dropped = torch.rand((), generator=generator) < CAPTION_DROPOUT
        caption = "" if dropped else sample.caption
        noisier = self.noisier_share and torch.rand((), generator=generator) < self.noisier_share
        return {
            "input_ids": torch.tensor(self.tokenizer(caption, padding="max_length").input_ids),
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(500 if noisier else 0, 1000, (), generator=generator),
        }

    def __call__(self, rows):
        return default_collate(rows)


class DiffusionStage(nn.Module):
    """A small U-Net and the CLIP text encoder that it learns to listen to, trained together."""

    def __init__(self, tokenizer, scheduler, unet=UNET, text_encoder=None):
        super().__init__()
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.text_encoder = text_encoder or CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=MAX_WORDS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = unet if isinstance(unet, nn.Module) else UNet2DConditionModel(**unet)

    def move_frozen(self, device=None, dtype=None):
        return self

    def forward(self, batch):
        states = self.text_encoder(batch["input_ids"]).last_hidden_state
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, states).sample
        return {"denoising": F.mse_loss(prediction.float(), target.float())}

    def save_pretrained(self, folder, state_dict=None):
        for name in ("unet", "text_encoder"):
            copy_part(self, name, state_dict).save_pretrained(Path(folder) / name)
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        self.scheduler.save_pretrained(Path(folder) / "scheduler")


def build_scheduler():
    """Stable Diffusion's noise schedule. The velocity is predicted: with the noise, too little is learned of the composition."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_clip_tokenizer(words=WORDS):
    """A token a word of the captions; all others are unknown."""
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


# Kosmos-G ---------------------------------------------------------------------------------------------------------


def build_tokenizer(words=WORDS, world=WORLD, lowercase=True):
    """A piece a word of the captions, and every printable character for what else people type; world as the class has it."""
    characters = ["▁", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [(f"▁{word}", -2.0) for word in words] + [(character, -9.0) for character in characters]
    return KosmosGTokenizer.from_vocabulary(
        pieces,
        image_size=IMAGE_SIZE,
        latent_query_num=QUERIES,
        model_max_length=MAX_TOKENS,
        world=world,
        lowercase=lowercase,
    )


def build_text_encoder(tokenizer, seed=0):
    """An untrained encoder whose conditions have the length and width of the small CLIP's."""
    config = KosmosGTextEncoderConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "embed_dim": WIDTH,
            "layers": 4,
            "ffn_dim": 4 * WIDTH,
            "attention_heads": 4,
            "dropout": 0.0,  # so small a model cannot afford any
            "attention_dropout": 0.0,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        },
        latent_query_num=QUERIES,
        aligner_hidden_size=TEXT_WIDTH,
        aligner_layers=3,
        aligner_attention_heads=4,
        aligner_ffn_dim=4 * TEXT_WIDTH,
        aligner_max_positions=2 + MAX_TOKENS,
        num_queries=MAX_WORDS,
        image_token_id=tokenizer.image_token_id,
        end_of_image_token_id=tokenizer.end_of_image_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the vision tower, which `reset_weights` leaves alone
        return reset_weights(KosmosGTextEncoder(config), seed)


def build_instruct_mixture(wide=False):
    """Sources and weights of stage 3, as `MixtureDataset` takes them."""
    sources = [
        SpriteSource("compositions", 200_000 if wide else 50_000, entity_dropout=0.9, wide=wide),
        SpriteSource("edits"),
        SpriteSource("captions", wide=wide),
    ]
    return {"sources": sources, "weights": [5, 2, 2] if wide else [3, 3, 1]}


def build_pipeline(run, encoder, tokenizer, unet="diffusion"):
    """A Kosmos-G of an encoder and what the run has trained before; `unet` names the phase that its U-Net is of."""
    return KosmosGPipeline(
        vae=load_vae(run),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=load_unet(run, unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class TypedCollate(AlignCollate):
    """As AlignCollate, where our encoder reads the prompt and the target encoder the caption."""

    def prepare(self, sample, generator):
        row = super().prepare(sample, generator)
        return {**self.prompts.prepare(sample.key, sample.prompt), "clip_input_ids": row["clip_input_ids"]}


# Training ---------------------------------------------------------------------------------------------------------


def train(output, stage, sources, collate, weights=None, **settings):
    """As the package's loop; a run that was told to stop ends the program before the next phase."""
    config = TrainConfig(output=str(output), **COMMON | settings)
    dataset = MixtureDataset(sources, collate, batch_size=config.batch_size, weights=weights)
    # of few positions in bfloat16, the backward pass of PyTorch's fused attention takes two to five times as long on a CPU
    with sdpa_kernel(SDPBackend.MATH):
        checkpoint = train_or_stop(config, stage, dataset)
    if checkpoint != checkpoint_folder(config.output, config.steps):
        sys.exit(143)


def newest(phase):
    """The last checkpoint in the folder of a phase."""
    return list_checkpoints(phase)[-1]


def load_vae(run):
    return AutoencoderKL.from_pretrained(newest(run / "vae") / "vae")


def load_unet(run, phase="diffusion"):
    return UNet2DConditionModel.from_pretrained(newest(run / phase) / "unet", dtype=torch.float32)


def load_clip(run, phase="diffusion"):
    return CLIPTextModel.from_pretrained(newest(run / phase) / "text_encoder", dtype=torch.float32)


def load_encoder(phase):
    return KosmosGTextEncoder.from_pretrained(newest(phase) / "text_encoder", dtype=torch.float32)
