"""Kosmos-G's prompt for Modular Diffusers: a block that turns words and images into `prompt_embeds`.

diffusers calls that part of itself experimental, so nothing in this package imports this module: name it,
`from kosmos_g_diffusers.modular import KosmosGTextEncoderStep`. A saved block carries copies of this file and of those it
imports, and loads where only diffusers and transformers are installed.

Letters of the shapes: B prompts; 77 and 768 are the released model's.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from .modeling_kosmos_g import KosmosGTextEncoder
from .pipeline_kosmos_g import MODULES, KosmosGPipeline
from .processing_kosmos_g import KosmosGTokenizer


class KosmosGTextEncoderStep(ModularPipelineBlocks):
    """Text-encoder step of a modular pipeline: what `KosmosGPipeline.encode_prompt` does, with its errors.

    As in diffusers' own text-encoder steps there is one row for each prompt; a later block repeats them for
    `num_images_per_prompt`.
    """

    @property
    def description(self) -> str:
        return "Turns prompts of words and images into the states that Stable Diffusion 1.5's U-Net reads"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        encoder = ComponentSpec("text_encoder", KosmosGTextEncoder)
        return [encoder, ComponentSpec("tokenizer", KosmosGTokenizer)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "prompt",
                required=True,
                description="A string with a <i> for each image, a list of strings and images in reading order, chat "
                "content, or a list of these (a list of strings alone is a batch).",
            ),
            InputParam(
                "images",
                description="The images of the <i> marks: a list for one prompt, a list of lists for a batch.",
            ),
            InputParam(
                "negative_prompt",
                description="One for all prompts or a list with one for each, in any form that prompt has.",
            ),
            InputParam("negative_images", description="What images is, for the negative prompt."),
            InputParam(
                "guidance_scale",
                type_hint=float,
                default=7.5,
                description="Strength of classifier-free guidance; at 1 or less no negative prompt is encoded.",
            ),
            InputParam(
                "clip_skip",
                type_hint=int,
                description="Number of AlignerNet query layers to leave out at the end, for the prompt.",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam.template("prompt_embeds", note="(B, 77, 768)"),
            OutputParam.template("negative_prompt_embeds", note="(B, 77, 768), or None without guidance"),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        # the prompt mixin needs no other component
        encoder = KosmosGPipeline(
            text_encoder=components.text_encoder,
            tokenizer=components.tokenizer,
            requires_safety_checker=False,
            **dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor")),
        )
        block_state.prompt_embeds, block_state.negative_prompt_embeds = encoder.encode_prompt(
            block_state.prompt,
            device=components._execution_device,
            do_classifier_free_guidance=block_state.guidance_scale > 1,
            negative_prompt=block_state.negative_prompt,
            clip_skip=block_state.clip_skip,
            images=block_state.images,
            negative_images=block_state.negative_images,
        )
        self.set_block_state(state, block_state)
        return components, state

    # not save_pretrained, which calls this: diffusers takes the base class's name for modular_config.json from where
    # save_pretrained is defined
    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As diffusers', but the folder gets the code as well, which diffusers leaves to the user to copy."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for module in (Path(__file__).stem, *MODULES):
            shutil.copy(Path(__file__).with_name(f"{module}.py"), save_directory)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
