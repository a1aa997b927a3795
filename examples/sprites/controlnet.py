"""A ControlNet for the small U-Net: canny edges decide where a sprite is."""

from pathlib import Path

import torch
from base import LATENT_NOISE, build_clip_tokenizer, copy_part
from diffusers import ControlNetModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from kosmos_g_diffusers.control.controls import control_image, load_annotator
from kosmos_g_diffusers.data import preprocess_target
from kosmos_g_diffusers.sprites.world import IMAGE_SIZE


class EdgesCollate:
    """Batches of `input_ids` (B, 24), `edges` (B, 3, 64, 64) in [0, 1], `latents`, `noise` (B, 4, 16, 16), `timesteps`.

    Half of the captions are empty, so that edges are read also where the words do not help.
    """

    def __init__(self, latents, scaling_factor):
        self.tokenizer, self.latents = build_clip_tokenizer(), latents
        self.noise_width = scaling_factor * LATENT_NOISE
        self.annotator = None  # loaded in the worker that uses it

    def prepare(self, sample, generator):
        latents = self.latents[int(sample.key.rpartition(":")[2])].float()
        latents = latents + self.noise_width * torch.randn(latents.shape, generator=generator)
        caption = sample.caption if torch.rand((), generator=generator) < 0.5 else ""
        self.annotator = self.annotator or load_annotator("canny")
        edges = control_image("canny", sample.target, annotator=self.annotator)
        return {
            "input_ids": torch.tensor(self.tokenizer(caption, padding="max_length").input_ids),
            "edges": (preprocess_target(edges, IMAGE_SIZE) + 1) / 2,
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(1000, (), generator=generator),
        }

    def __call__(self, rows):
        return default_collate(rows)


class ControlNetStage(nn.Module):
    """A ControlNet that starts as a copy of the U-Net's encoder; U-Net and text encoder are frozen."""

    def __init__(self, unet, text_encoder, scheduler):
        super().__init__()
        # two halvings bring edges of 64 px to the 16 px of the latents
        self.controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
        self.scheduler = scheduler
        self._frozen = (unet.requires_grad_(False).eval(), text_encoder.requires_grad_(False).eval())

    def move_frozen(self, device=None, dtype=None):
        for model in self._frozen:
            model.to(device)
        return self

    def forward(self, batch):
        unet, text_encoder = self._frozen
        states = text_encoder(batch["input_ids"]).last_hidden_state
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        down, mid = self.controlnet(noisy, timesteps, states, batch["edges"], return_dict=False)
        prediction = unet(
            noisy, timesteps, states, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        return {"denoising": F.mse_loss(prediction.float(), target.float())}

    def save_pretrained(self, folder, state_dict=None):
        copy_part(self, "controlnet", state_dict).save_pretrained(Path(folder) / "controlnet")
