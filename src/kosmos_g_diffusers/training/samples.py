"""Sheets of images that a model draws while it trains: the same prompts and noise every time."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler

from ..generation.grid import grid_of
from ..pipeline_kosmos_g import KosmosGPipeline
from ..provenance import save_image

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel

    from ..modeling_kosmos_g import KosmosGTextEncoder
    from ..processing_kosmos_g import KosmosGTokenizer
    from .stages import Stage

STEPS = 20  # of DPM-Solver, denoising steps
GUIDANCE = 7.5


class SampleSheet:
    """Draws prompts with a stage's text encoder as it is at the moment.

    Args:
        path: JSON file with a list of prompts, each a string or a list in reading order of strings and
            {"image": "file"}; files are looked for next to it.
        tokenizer: of the text encoder.
        unet, vae, scheduler: of the Stable Diffusion that draws. They are moved where the text encoder is for as long as
            it takes, unless they are there.
        text_encoder: to check the prompts with.
        resolution: side of the images, in pixels.
        dtype: of autocast while the text encoder runs; torch.float32 is without.
        seed: of the noise.

    Raises:
        ValueError: no such file, no list of prompts, or an image that is not there.
    """

    tokenizer: "KosmosGTokenizer"
    unet: "UNet2DConditionModel"
    vae: "AutoencoderKL"
    scheduler: DPMSolverMultistepScheduler
    resolution: int
    dtype: torch.dtype
    seed: int
    prompts: list[str | list[Any]]

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: "KosmosGTokenizer",
        unet: "UNet2DConditionModel",
        vae: "AutoencoderKL",
        scheduler: "SchedulerMixin",
        text_encoder: "KosmosGTextEncoder",
        resolution: int,
        dtype: torch.dtype,
        seed: int,
    ):
        self.tokenizer, self.unet, self.vae = tokenizer, unet, vae
        self.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        self.resolution, self.dtype, self.seed = resolution, dtype, seed
        self.prompts = read_prompts(path)
        pipeline = self._pipeline(text_encoder)
        for number, prompt in enumerate(self.prompts):
            inputs = pipeline.get_processor()([prompt], name=f"sample prompt {number}")
            text_encoder.check_prompts(**inputs, name=f"sample prompt {number}")

    @torch.no_grad()
    def __call__(self, stage: "Stage", path: str | Path) -> None:
        """Write a sheet, an image for each prompt."""
        encoder, places = stage.text_encoder, (self.unet.device, self.vae.device)
        device = encoder.get_input_embeddings().weight.device
        self.unet.to(device)
        self.vae.to(device)
        encoding, drawing, images = self._pipeline(encoder), self._pipeline(None), []
        drawing.set_progress_bar_config(disable=True)
        for number, prompt in enumerate(self.prompts):
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                embeds = encoding.encode_prompt([prompt], device)
            images += drawing(
                prompt_embeds=embeds[0].to(self.unet.dtype),
                negative_prompt_embeds=embeds[1].to(self.unet.dtype),
                generator=torch.Generator().manual_seed(self.seed + number),
                height=self.resolution,
                width=self.resolution,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
            ).images
        self.unet.to(places[0])
        self.vae.to(places[1])
        save_image(grid_of(images), path)

    def _pipeline(self, text_encoder):
        pipe = KosmosGPipeline(
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            vae=self.vae,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.warns_outside_world = False  # it is trained on more than it was
        return pipe


def read_prompts(path: str | Path) -> list[str | list[Any]]:
    """Prompts of a JSON file, as the pipelines take them; see `SampleSheet`."""
    path = Path(path)
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"The sample prompts in {str(path)!r} cannot be read as JSON ({error}).") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f'{path} holds no list of prompts. Expected ["a dog", [{{"image": "dog.png"}}, "in snow"]].'
        )
    return [_read_prompt(entry, path, number) for number, entry in enumerate(entries)]


def _read_prompt(entry, path, number):
    if isinstance(entry, str):
        return entry
    prompt = []
    for part in entry if isinstance(entry, list) else [entry]:
        if isinstance(part, str):
            prompt.append({"type": "text", "text": part})
        elif isinstance(part, dict) and set(part) == {"image"} and isinstance(part["image"], str):
            prompt.append({"type": "image", "path": str(path.parent / part["image"])})
        else:
            raise ValueError(
                f"Prompt {number} of {path} holds {json.dumps(part)[:100]}. Expected strings and objects of the form "
                '{"image": "dog.png"} in reading order.'
            )
    return prompt
