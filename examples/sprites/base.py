"""What Kosmos-G starts from, in small: a VAE, and a Stable Diffusion that draws sprites from captions.

Both are plain diffusers models, trained by the package's loop: it takes any module that turns a batch into losses.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from kosmos_g_diffusers.data import preprocess_target
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.sprites.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, PATTERNS, SHAPES, SIZES

LATENT_NOISE = 0.05  # deviation of the VAE's posterior, in units of its latents
WORDS = (*SHAPES, *COLOURS, *PATTERNS, *SIZES, *BACKGROUNDS, "a", "an", "and", "on", "background", ",")
MAX_WORDS = 24
TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.1


class PictureCollate:
    """Batches of `pixel_values` (B, 3, 64, 64) in [-1, 1] and the VAE's `latent_noise`."""

    def prepare(self, sample, generator):
        return {
            "pixel_values": preprocess_target(sample.target, IMAGE_SIZE),
            "latent_noise": torch.randn(4, IMAGE_SIZE // 4, IMAGE_SIZE // 4, generator=generator),
        }

    def __call__(self, rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class VaeStage(nn.Module):
    """A small AutoencoderKL with a posterior of fixed width; picture distances, and a leash on the latents' size."""

    def __init__(self):
        super().__init__()
        levels = 3  # 64 px pictures become 16 x 16 latents
        self.vae = AutoencoderKL(
            sample_size=IMAGE_SIZE,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )
        with torch.no_grad():  # the second half of these channels is the posterior's log-variance
            self.vae.quant_conv.weight[4:] = 0
            self.vae.quant_conv.bias[4:] = 2 * torch.tensor(LATENT_NOISE).log()

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
        vae = AutoencoderKL.from_config(self.vae.config)
        state_dict = self.state_dict() if state_dict is None else state_dict
        vae.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in state_dict.items()})
        with torch.no_grad():  # weight decay and rounding have no say in the log-variance
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = 2 * torch.tensor(LATENT_NOISE).log()
        source = SpriteSource("captions")
        pictures = [
            preprocess_target(source.read(index, _no_words()).target, IMAGE_SIZE) for index in range(256)
        ]
        with torch.no_grad():
            deviation = vae.encode(torch.stack(pictures)).latent_dist.mean.std()
        vae.register_to_config(scaling_factor=round(1 / float(deviation), 4))
        vae.save_pretrained(Path(folder) / "vae")


def encode_latents(vae, source, path, batch_size=64):
    """Latents of every picture of a source, scaled to deviation 1, (len(source), 4, 16, 16) float16; kept in `path`."""
    path = Path(path)
    if not path.exists():
        latents = []
        for first in tqdm(range(0, len(source), batch_size), unit="batch", desc="latents"):
            indices = range(first, min(first + batch_size, len(source)))
            pictures = [
                preprocess_target(source.read(index, _no_words()).target, IMAGE_SIZE) for index in indices
            ]
            with torch.no_grad():
                means = vae.encode(torch.stack(pictures)).latent_dist.mean
            latents.append((means * vae.config.scaling_factor).half())
        partial = path.with_suffix(".partial")
        save_file({"latents": torch.cat(latents)}, partial)
        partial.rename(path)
    return load_file(path)["latents"]


class CaptionCollate:
    """Batches of `input_ids` (B, 24), `latents` and `noise` (B, 4, 16, 16) and `timesteps` (B,)."""

    def __init__(self, tokenizer, latents, noise_width):
        self.tokenizer, self.latents = tokenizer, latents
        self.noise_width = noise_width * LATENT_NOISE  # in units of the scaled latents

    def prepare(self, sample, generator):
        index = int(sample.key.rpartition(":")[2])
        latents = self.latents[index].float()
        latents = latents + self.noise_width * torch.randn(latents.shape, generator=generator)
        dropped = torch.rand((), generator=generator) < CAPTION_DROPOUT
        caption = "" if dropped else sample.caption
        return {
            "input_ids": torch.tensor(self.tokenizer(caption, padding="max_length").input_ids),
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(1000, (), generator=generator),
        }

    def __call__(self, rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class DiffusionStage(nn.Module):
    """A small U-Net and the CLIP text encoder that it learns to listen to, trained together."""

    def __init__(self, tokenizer, scheduler):
        super().__init__()
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.text_encoder = CLIPTextModel(
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
        self.unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 4,
            block_out_channels=(64, 128, 160),
            layers_per_block=1,
            # no attention at 16 x 16: it would double the time of a step
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )

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
        for name, model in (("unet", self.unet), ("text_encoder", self.text_encoder)):
            part = state_dict and {
                key.removeprefix(name + "."): tensor
                for key, tensor in state_dict.items()
                if key.startswith(name + ".")
            }
            copy = (
                type(model)(model.config) if name == "text_encoder" else type(model).from_config(model.config)
            )
            copy.load_state_dict(part or model.state_dict())
            copy.save_pretrained(Path(folder) / name)
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        self.scheduler.save_pretrained(Path(folder) / "scheduler")

    def pipeline(self, vae):
        """The stock pipeline around the models as they are now."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


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


def build_clip_tokenizer():
    """A token a word: the captions have no others."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
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


def _no_words():
    """A source wants random numbers for its words; pictures do not depend on them."""
    import random

    return random.Random(0)
