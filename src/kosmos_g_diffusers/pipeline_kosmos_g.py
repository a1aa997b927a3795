"""diffusers' Stable Diffusion 1.5 pipelines, told what a prompt of words and images is.

Denoising, schedulers, ControlNet and the rest are diffusers' own; one mixin turns prompts into `prompt_embeds`
(B, 77, 768). This file is copied into saved model folders and stands alone: it reaches the processor through the module
of `self.tokenizer`, and the encoder through `self.text_encoder`.

A call goes through these steps:

1. `KosmosGPromptMixin.__call__` checks what the stock pipeline would not (`check_call`): `check_widths` the states of encoder,
   U-Net and ControlNets, `_check_dtypes` theirs, `_check_settings` numbers and keywords; then `check_controls` the control images.
2. `get_processor().parse` reads the prompt in whatever form, once: counts, image words, images opened as RGB. The same reader
   opens images to be changed, control images and masks (`open_images`).
3. diffusers' `__call__` of the same task takes over, with the parsed prompt as its `prompt`.
4. It calls our `encode_prompt`, which parses the negative prompt (`_parse_negative`) and checks ready embeddings
   (`_check_embeds`), then turns both prompts into ids, masks and pixels (`KosmosGProcessor`) and lets the text encoder check
   them (`check_prompts`), before either is encoded. Of a small model it tells what that was not trained on (`_warn`).
5. `_encode_inputs` runs the text encoder: `prompt_embeds` and `negative_prompt_embeds`.
6. diffusers' `encode_prompt` repeats them for `num_images_per_prompt`, and its pipeline denoises and decodes as ever.

With `return_maps`, `binding` or `regions`, `_observe` makes an observer, which is of the package (maps/): it reads in step 5 which
token each state comes from, and watches the U-Net in step 6.
"""

import copy
import difflib
import functools
import importlib
import inspect
import json
import math
import operator
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import (
    USE_PEFT_BACKEND,
    convert_unet_state_dict_to_peft,
    delete_adapter_layers,
    logging,
    recurse_remove_peft_layers,
    scale_lora_layers,
    unscale_lora_layers,
)
from huggingface_hub import create_repo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

# as in processing_kosmos_g, which a saved folder keeps elsewhere
ImageLike = PIL.Image.Image | np.ndarray | torch.Tensor | str | Path
PromptPart = ImageLike | Mapping[str, Any]
PromptLike = str | Sequence[PromptPart]
PromptsLike = PromptLike | Sequence[PromptLike]
ImagesLike = Sequence[ImageLike] | Sequence[Sequence[ImageLike] | None]

logger = logging.get_logger(__name__)

# Files of the package that a saved folder carries, by module name; model_index.json names them
MODULES = ("modeling_kosmos_g", "processing_kosmos_g", "pipeline_kosmos_g")
KEEP_DTYPES = "keep"  # a dtype that means none, from our from_pipe to our `to`
IMAGE_WORDS_FORMAT = "kosmos_g_image_words_1"
# held while image words change in tokenizer and encoder, and while both are compared
_WORDS_LOCK = threading.RLock()
LORA_METHODS = (
    *("set_adapters", "delete_adapters", "enable_lora", "disable_lora", "fuse_lora", "unfuse_lora"),
    *("unload_lora_weights", "get_list_adapters", "get_active_adapters", "set_lora_device"),
)
# of our own, in `__call__`
KEYWORDS: dict[str, Any] = {"images": None, "negative_images": None}
KEYWORDS |= {"return_maps": False, "binding": 0.0, "regions": None}
LORA_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt")  # of files; a Hub id has none of them


@dataclass
class KosmosGPipelineOutput(StableDiffusionPipelineOutput):
    """What a call with `return_maps=True` returns: diffusers' output and

    Attributes:
        maps: for each image, in the order of `images`, a (sources, h, w) float32 tensor on the CPU: how much of each place
            comes from each source, which sums to 1 over sources.
        map_labels: for each image the names of its sources: the images of its prompt, "words", "null token".
    """

    maps: list[torch.Tensor]
    map_labels: list[list[str]]


class KosmosGPromptMixin:
    """Prompts of words and images for a Stable Diffusion 1.5 pipeline of diffusers.

    Every keyword of the pipeline's own `__call__` works as documented there. New are, in `__call__` and `encode_prompt`,

    - `prompt`: a string with a `<i>` for each image, a list of strings and images in reading order, chat content,
      a chat, or a list of these (a list of strings alone is a batch);
    - `images`: the images of the `<i>` marks, a list for one prompt and a list of lists for a batch;
    - `negative_prompt`: one for all prompts or a list with one for each, any form that `prompt` has; without
      `negative_images` a `<i>` in it is plain text, as in the official code;
    - `negative_images`: what `images` is, for the negative prompt;

    and in `__call__` (docs/maps.md)

    - `return_maps`: True also returns where each image of the prompt went, see `KosmosGPipelineOutput`;
    - `binding`: weight of a guidance that gives each image of the prompt a region of its own, from 0 (off) to 10;
    - `regions`: where the images of the prompt shall be, a list with `(x0, y0, x1, y1)` in fractions of width and height (left,
      top, right, bottom), a mask of the image's size or None for each image; for a batch a list of such lists.

    `image`, `control_image` and `mask_image` may also be what `images` takes, paths and URLs for instance. A PIL image or an
    array is never latents, whatever its channels; a tensor with the VAE's number of latent channels is.

    `pipe.vision_cache = VisionCache(max_bytes)` keeps the states of images for the calls to come; the result is the same.

    A small model that declares its world (`KosmosGTokenizer.world`) warns once a call of words, images and sizes outside it.
    """

    warns_outside_world = True  # set it to False on a pipeline that is to say nothing of it
    vision_cache: Any = None  # a VisionCache: states of images that come again are not computed again

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give `__call__` the stock pipeline's signature and our keywords, for `help()` and whoever inspects it."""
        super().__init_subclass__(**kwargs)
        # for the classes below alone: what a user derives from them inherits as usual
        stock = next(
            (base for base in cls.__bases__ if base.__module__.startswith("diffusers.pipelines.")), None
        )
        if stock is None or "__call__" in cls.__dict__:
            return
        for name in LORA_METHODS:
            setattr(cls, name, _on_uncompiled_models(getattr(stock, name)))
        parameters = dict(inspect.signature(stock.__call__).parameters)
        sink = parameters.pop("kwargs", None)
        for name, default in KEYWORDS.items():
            parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)

        # not by its global name: diffusers executes a folder's code anew whenever it loads the folder again
        call = __class__.__call__

        def __call__(self, *args, **kwargs):
            return call(self, *args, **kwargs)

        __call__.__doc__ = f"{KosmosGPromptMixin.__doc__}\n{inspect.cleandoc(stock.__call__.__doc__ or '')}"
        __call__.__signature__ = inspect.Signature([*parameters.values(), *([sink] if sink else [])])
        cls.__call__ = __call__

    @torch.no_grad()
    def __call__(
        self,
        prompt: PromptsLike | None = None,
        *args: Any,
        images: ImagesLike | None = None,
        negative_images: ImagesLike | None = None,
        return_maps: bool = False,
        binding: float = 0.0,
        regions: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput:
        """Generate: see the class for the prompt, and diffusers' pipeline of the same task for the rest."""
        # by name, whichever of them came by position: each stock pipeline has an order of its own
        signature = inspect.signature(super().__call__)
        call = signature.bind_partial(prompt, *args, **kwargs)
        given = call.arguments
        self.check_call(given)
        self._check_given(prompt, given.get("prompt_embeds"), images)
        # stock pipelines accept any list as prompt; encode_prompt below knows what is in it
        processor = self.get_processor() if prompt is not None or negative_images is not None else None
        if prompt is not None:
            given["prompt"] = processor.parse(prompt, images)
        if negative_images is not None:
            if given.get("negative_prompt") is None:
                raise ValueError(
                    "negative_images were given without negative_prompt. Pass both, with a '<i>' in the negative prompt for "
                    "each image."
                )
            negative = given["negative_prompt"]
            given["negative_prompt"] = processor.parse(negative, negative_images, name="negative prompt")
        prompt_embeds, negative_prompt_embeds = (
            given.get(f"{name}prompt_embeds") for name in ("", "negative_")
        )
        if prompt_embeds is not None or negative_prompt_embeds is not None:
            batch_size = len(prompt_embeds if prompt is None else given["prompt"])
            guides = given.get("guidance_scale", signature.parameters["guidance_scale"].default) > 1
            needs_negative = guides and negative_prompt_embeds is None
            self._check_embeds(prompt_embeds, negative_prompt_embeds, batch_size, needs_negative)
        self.open_images(given)
        if getattr(self, "controlnet", None) is not None:
            name = "control_image" if "control_image" in call.signature.parameters else "image"
            self.check_controls(name, given)
        notes = self._size_notes(given)
        if notes and prompt is not None:  # one warning for all, in encode_prompt
            given["prompt"] = type(given["prompt"])(given["prompt"], notes)
        else:
            self._warn(notes)
        is_off = return_maps is False and regions is None and type(binding) in (int, float) and binding == 0
        observer = None if is_off else self._observe(given, return_maps, binding, regions)
        with _only_call_with(self.scheduler), observer.watch() if observer else nullcontext():
            output = super().__call__(*call.args, **call.kwargs)
        if not return_maps:
            return output
        if isinstance(output, tuple):
            return (*output, observer.maps, observer.labels)
        flags = output.nsfw_content_detected
        return KosmosGPipelineOutput(output.images, flags, observer.maps, observer.labels)

    def _observe(self, given, return_maps, binding, regions):
        """The observer of a call, which its prompt carries to `encode_prompt`; None if nothing is asked for."""
        try:
            maps = _sibling("maps") or importlib.import_module("kosmos_g_diffusers.maps")
        except ImportError as error:
            raise ImportError(
                "return_maps, binding and regions need the package: pip install kosmos-g-diffusers. The code of a saved folder "
                "draws without them."
            ) from error
        prompts = given.get("prompt")
        if prompts is None:
            raise ValueError(
                "return_maps, binding and regions were given with prompt_embeds, which do not say what their states come from. Pass "
                "prompt and images in their place."
            )
        if (
            "output_attentions"
            not in inspect.signature(type(_uncompiled(self.text_encoder)).forward).parameters
        ):
            raise ValueError(
                "The text encoder runs the code of a folder that an earlier version saved, which does not tell what its states come "
                "from. Load the folder with KosmosGPipeline.from_pretrained."
            )
        open_mask = sys.modules[type(self.tokenizer).__module__].open_mask
        asked = {"return_maps": return_maps, "binding": binding, "regions": regions}
        request = maps.MapRequest.read(
            prompts, self.image_words, self._output_size(given), open_mask, **asked
        )
        if request is None:
            return None
        prompts.observer = maps.Observer(request, given.get("num_images_per_prompt") or 1, self)
        return prompts.observer

    def encode_prompt(
        self,
        prompt: PromptsLike | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: PromptsLike | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        images: ImagesLike | None = None,
        negative_images: ImagesLike | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts into the condition of the U-Net. Needs `text_encoder` and `tokenizer` alone.

        Args:
            prompt, negative_prompt, images, negative_images: see the class. No negative prompt means the null
                condition, the state of `<s>` alone (kosmosg.py:343-346 of the official code).
            device: of the result; None takes the pipeline's.
            num_images_per_prompt: each row is repeated as often, next to itself.
            do_classifier_free_guidance: without it there is no negative condition.
            prompt_embeds, negative_prompt_embeds: (B, 77, 768) encoded before, instead of a prompt.
            lora_scale: of LoRA layers in the text encoder.
            clip_skip: number of AlignerNet query layers to leave out at the end, for the prompt.

        Returns:
            (prompt_embeds, negative_prompt_embeds), each (B * num_images_per_prompt, 77, 768); the second is None
            without guidance and without negative_prompt_embeds.

        Raises:
            ValueError, TypeError: before the encoder runs, see `KosmosGProcessor` and the messages below.
        """
        device = self._execution_device if device is None else device
        self._warn_of_training()
        self._check_given(prompt, prompt_embeds, images)
        has_negative = negative_prompt is not None or negative_images is not None
        if has_negative and negative_prompt_embeds is not None:
            raise ValueError("Both negative_prompt and negative_prompt_embeds were given. Pass one of them.")
        needs_negative = do_classifier_free_guidance and negative_prompt_embeds is None
        processor = self.get_processor() if prompt is not None or needs_negative else None
        positive = None if prompt is None else processor.parse(prompt, images)
        batch_size = len(prompt_embeds if positive is None else positive)
        negative = None
        if needs_negative:
            negative = self._parse_negative(processor, negative_prompt, negative_images, batch_size)
        self._check_embeds(prompt_embeds, negative_prompt_embeds, batch_size, needs_negative)
        layers = None if positive is None else self.text_encoder.config.aligner_layers
        if layers is not None and clip_skip is not None and not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip={clip_skip} was given; the AlignerNet has {layers} query layers.")
        scaled = lora_scale is not None and self.text_encoder is not None and USE_PEFT_BACKEND
        if scaled:
            scale_lora_layers(self.text_encoder, lora_scale)
        try:
            encoded = self._encode_parsed(processor, positive, negative, device, clip_skip)
        finally:
            if scaled:
                unscale_lora_layers(self.text_encoder, lora_scale)
        if positive is not None:
            prompt_embeds = encoded[0]
        if negative is not None:
            negative_prompt_embeds = encoded[1].expand(batch_size, -1, -1)
        # the stock method casts and repeats ready embeddings
        return super().encode_prompt(
            None,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )

    def _warn_of_training(self):
        """Say once for an encoder in training mode that its dropout acts; `pipe.text_encoder.eval()` is the user's to call."""
        encoder = self.text_encoder
        if getattr(encoder, "training", False) and getattr(self, "_told_of_training", None) is not encoder:
            self._told_of_training = encoder
            logger.warning(
                "The text encoder is in training mode: its dropout changes the image at every call. Call "
                "pipe.text_encoder.eval() to draw."
            )

    @staticmethod
    def _check_given(prompt, prompt_embeds, images):
        if prompt is None and prompt_embeds is None:
            raise ValueError("Neither prompt nor prompt_embeds were given. Pass one of them.")
        if prompt is not None and prompt_embeds is not None:
            shape = tuple(getattr(prompt_embeds, "shape", ()))
            raise ValueError(f"Both prompt and prompt_embeds (shape {shape}) were given. Pass one of them.")
        if prompt is None and images is not None:
            raise ValueError("images were given without a prompt. They belong to one: encode it with them.")

    @staticmethod
    def _parse_negative(processor, negative_prompt, negative_images, batch_size):
        if negative_prompt is None and negative_images is not None:
            raise ValueError("negative_images were given without negative_prompt. Pass both.")
        # without images of its own a "<i>" in a negative prompt is plain text
        negative = processor.parse(
            "" if negative_prompt is None else negative_prompt,
            negative_images,
            marks_are_text=negative_images is None,
            name="negative prompt",
        )
        if len(negative) not in (1, batch_size):
            raise ValueError(
                f"{len(negative)} negative prompts were given for {batch_size} prompts. Pass one for all, or a list with "
                "one for each."
            )
        return negative

    def _check_embeds(self, prompt_embeds, negative_prompt_embeds, batch_size, needs_negative):
        unet = getattr(self, "unet", None)
        width = None if unet is None else unet.config.cross_attention_dim
        given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        lengths = {}
        for name, embeds in given.items():
            if embeds is None:
                continue
            if not isinstance(embeds, torch.Tensor):
                raise TypeError(
                    f"{name} is of type {type(embeds).__name__}. Expected a tensor (prompts, tokens, width): encode_prompt "
                    "returns two of them, the prompt's and the negative prompt's."
                )
            if embeds.ndim != 3 or 0 in embeds.shape or (width is not None and embeds.shape[-1] != width):
                raise ValueError(
                    f"{name} of shape {tuple(embeds.shape)} were given. Expected (prompts, tokens, "
                    f"{'width of the U-Net' if width is None else width}), as encode_prompt returns them."
                )
            if len(embeds) != batch_size:
                raise ValueError(f"{name} has {len(embeds)} rows for {batch_size} prompts. Pass one each.")
            if not embeds.is_meta and not _all_finite(embeds):
                raise ValueError(
                    f"{name} has values that are NaN or infinite. Encode the prompt again, in float32 if need be."
                )
            lengths[name] = embeds.shape[1]
        own = getattr(getattr(self.text_encoder, "config", None), "num_queries", None)
        if needs_negative and own is not None:
            lengths["the negative prompt"] = own
        elif prompt_embeds is None and own is not None:
            lengths["the prompt"] = own
        if len(set(lengths.values())) > 1:
            said = " and ".join(f"{name} of {length} tokens" for name, length in lengths.items())
            raise ValueError(
                f"Conditions of different lengths: {said}. Give both the same length: guidance draws with both at once."
            )

    def _encode_parsed(self, processor, positive, negative, device, clip_skip):
        """Two parsed batches, or None for one, -> their conditions. Anew when another thread changed the image words."""
        if positive is None and negative is None:
            return None, None
        tries = 0
        while True:
            tries += 1
            # whoever changes words all the time waits from the third try on
            with _WORDS_LOCK if tries > 2 else nullcontext():
                inputs = []
                with _WORDS_LOCK:  # a tokenizer that is changed while it reads raises, too
                    words = self.text_encoder.config.image_words
                    for name, batch in (("prompt", positive), ("negative prompt", negative)):
                        inputs.append(None if batch is None else processor(batch, name=name))
                        if batch is not None:  # both are checked before either is encoded
                            self.text_encoder.check_prompts(**inputs[-1], name=name)
                try:
                    encoded = [
                        None if one is None else self._encode_inputs(one, device, skip, observer)
                        for one, skip, observer in zip(
                            inputs,
                            (clip_skip, None),
                            (getattr(positive, "observer", None), None),
                            strict=True,
                        )
                    ]
                except ValueError:
                    with _WORDS_LOCK:
                        if words is self.text_encoder.config.image_words:
                            raise
                    continue
                with _WORDS_LOCK:
                    if words is self.text_encoder.config.image_words:
                        self._warn(self._notes(processor, (positive, negative), inputs))
                        return encoded

    # What a small model was not trained on ---------------------------------------------------------------------

    def _world(self):
        return getattr(self.tokenizer, "world", None) if self.warns_outside_world else None

    def _warn(self, notes):
        if notes:
            logger.warning(
                f"This small model was not trained on {'; '.join(notes)}. Expect nothing good of it."
            )

    def _notes(self, processor, batches, inputs):
        """Phrases for `_warn` about parsed prompts and what the processor made of them, None where there are none."""
        world = self._world()
        if world is None:
            return []
        module = sys.modules[type(processor).__module__]
        prompts = [prompt for batch in batches for prompt in batch or ()]
        pixels = [batch["pixel_values"] for batch in inputs if batch is not None and "pixel_values" in batch]
        notes = module.outside_world(world, prompts, torch.cat(pixels) if pixels else None)
        return [*notes, *(note for batch in batches for note in getattr(batch, "notes", ()))]

    def _size_notes(self, given):
        """Phrases for `_warn` about the size that the arguments of a call ask for."""
        own = self._own_size()
        size = None if self._world() is None or own is None else self._output_size(given)
        if size in (None, own):
            return []
        return [f"images of {size[1]} x {size[0]} pixels ({own[1]} x {own[0]} alone)"]

    def _own_size(self):
        """(height, width) in pixels of what the U-Net draws unless it is told otherwise; None if it does not say."""
        side = getattr(getattr(self.unet, "config", None), "sample_size", None)
        sides = (side, side) if isinstance(side, int) else side
        return None if side is None else tuple(length * self.vae_scale_factor for length in sides)

    def _output_size(self, given):
        """(height, width) in pixels that the arguments of a call ask for; None if neither they nor the U-Net say."""
        size = (given.get("height"), given.get("width"))
        if size != (None, None):
            return size
        # of what is changed or drawn along; an image to be inpainted is resized
        source = given.get("control_image")
        if source is None and "mask_image" not in given:
            source = given.get("image")
        size = next(filter(None, map(self._size_of, _split_images(source))), self._own_size())
        return size and tuple(length // self.vae_scale_factor * self.vae_scale_factor for length in size)

    def _encode_inputs(self, inputs, device, clip_skip=None, observer=None):
        inputs = dict(inputs)
        if self.vision_cache is not None and "pixel_values" in inputs:
            inputs["image_embeds"] = self._encode_images(inputs.pop("pixel_values"), device)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        inputs["output_hidden_states"] = clip_skip is not None
        if observer is not None:
            inputs["output_attentions"] = True
        # always through forward, so that the hooks of offloading fire
        output = (self.text_encoder if observer is None else _uncompiled(self.text_encoder))(**inputs)
        if observer is not None:
            observer.read_condition(output.cross_attentions, output.token_sources)
        if clip_skip is None:
            return output.last_hidden_state
        return self.text_encoder.text_model.final_layer_norm(output.hidden_states[-1 - clip_skip])

    def _encode_images(self, pixel_values, device):
        """(N, 3, S, S) -> states (N, Q, D); those that the cache knows are not computed."""
        if self.vision_cache is not None:
            return self.vision_cache.encode(self.text_encoder, pixel_values, device)
        return self.text_encoder(pixel_values=pixel_values.to(device)).image_embeds

    def get_processor(self) -> Any:
        """The KosmosGProcessor of this tokenizer, with the sizes of this encoder.

        Raises:
            ValueError: tokenizer or text encoder are of another kind, or do not belong together.
        """
        module = sys.modules[type(self.tokenizer).__module__] if self.tokenizer is not None else None
        with _WORDS_LOCK:
            return self._build_processor(module)

    def _build_processor(self, module):
        if not hasattr(module, "KosmosGProcessor") or not hasattr(self.text_encoder, "get_image_features"):
            raise ValueError(
                f"{type(self).__name__} holds {type(self.tokenizer).__name__} and {type(self.text_encoder).__name__}. "
                "To read a prompt it needs a KosmosGTokenizer and a KosmosGTextEncoder: pass tokenizer= and "
                "text_encoder=, or give ready prompt_embeds and negative_prompt_embeds."
            )
        config = self.text_encoder.config
        words = [name for name, _ in config.image_words]
        if words != self.tokenizer.image_words:
            raise ValueError(
                f"The text encoder knows the image words {words}, the tokenizer {self.tokenizer.image_words}. Use the "
                "text encoder and the tokenizer of one pipeline together."
            )
        if len(self.tokenizer) != config.text_config.vocab_size + len(words):
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer) - len(words)} entries, the text encoder's vocabulary "
                f"{config.text_config.vocab_size}. Use the text encoder and the tokenizer of one model together."
            )
        image_size = config.vision_config.image_size
        return module.KosmosGProcessor(self.tokenizer, image_size, config.latent_query_num)

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Raise for parts that do not fit each other, and for settings of a call that cannot be drawn with.

        Args:
            arguments: of `__call__`, by name; what is left out has its default. Prompts and images are not looked at.

        Raises:
            ValueError, TypeError: widths, dtypes, numbers, a keyword that diffusers would swallow, an IP-Adapter without its image.
        """
        parameters = inspect.signature(super().__call__).parameters
        self.check_widths()
        self._check_settings(arguments, parameters)
        # the VAE is not asked for latents out of noise
        self._check_dtypes(with_vae=arguments.get("output_type") != "latent" or "strength" in parameters)

    def check_widths(self) -> None:
        """Raise ValueError unless U-Net and ControlNets read states of the width that the encoder writes."""
        width = getattr(getattr(self.text_encoder, "config", None), "aligner_hidden_size", None)
        origin = "the text encoder gives"
        if width is None and self.unet is not None:
            # ready embeddings, whose width is checked against the U-Net's
            width, origin = self.unet.config.cross_attention_dim, "the U-Net reads"
        controlnet = getattr(self, "controlnet", None)
        parts = {"U-Net": [self.unet], "ControlNet": getattr(controlnet, "nets", [controlnet])}
        for name, models in parts.items():
            for model in models:
                expected = width if model is None or width is None else model.config.cross_attention_dim
                if expected != width:
                    raise ValueError(
                        f"The {name} has cross_attention_dim {expected}, {origin} states of width {width}. "
                        f"Take a {name} made for the same Stable Diffusion (1.5 for the released Kosmos-G, width 768)."
                    )

    def _check_dtypes(self, with_vae):
        """Raise ValueError for parts of different dtypes, which would fail in the middle of the call."""
        controlnet = getattr(self, "controlnet", None)
        parts = {"text encoder": [self.text_encoder], "U-Net": [self.unet]}
        parts["ControlNet"] = getattr(controlnet, "nets", [controlnet])
        parts["VAE"] = [self.vae] if with_vae else []
        dtypes = [
            (name, model.dtype)
            for name, models in parts.items()
            for model in models
            if model is not None and getattr(model, "hf_quantizer", None) is None
        ]
        is_mixed = len({dtype for _, dtype in dtypes}) > 1
        if is_mixed and not torch.is_autocast_enabled(self._execution_device.type):
            said = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes)
            raise ValueError(
                f"The parts of the pipeline have different dtypes: {said}. Cast them to one, such as pipe.to(torch.float32)."
            )

    def _check_settings(self, given, parameters):
        """Raise for numbers that cannot be drawn with, and for keywords that diffusers would swallow without a word."""
        unknown = sorted(
            set(given.get("kwargs", ())) - {"callback", "callback_steps"}
        )  # deprecated ones, which it reads
        if unknown:
            known = {*parameters, *KEYWORDS} - {"kwargs"}
            parts = set(unknown[0].split("_"))
            near = [name for name in sorted(known) if parts <= set(name.split("_"))]
            near = near or difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "See help(pipe.__call__)."
            raise TypeError(f"{type(self).__name__} does not take {unknown[0]!r}. {hint}")
        values = {name: given.get(name, parameter.default) for name, parameter in parameters.items()}
        ready = next((values[name] for name in ("timesteps", "sigmas") if values.get(name) is not None), None)
        wholes = {"num_images_per_prompt": 1, "height": 1, "width": 1}
        wholes |= {"num_inference_steps": 1} if ready is None else {}
        for name, least in wholes.items():
            value = values.get(name)
            if value is not None and not _is_whole(value, least):
                raise ValueError(
                    f"{name}={_short(value)} was given. Expected a whole number from {least} on."
                )
        for name in (
            "guidance_scale",
            "guidance_rescale",
            "eta",
            "strength",
            "controlnet_conditioning_scale",
        ):
            value = values.get(name)
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if one is not None and not _is_finite(one):
                    raise ValueError(f"{name}={_short(value)} was given. Expected a finite number.")
        generators = values.get("generator")
        for one in generators if isinstance(generators, (list, tuple)) else [generators]:
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(
                    f"generator={_short(generators)} was given. Expected torch.Generator('cpu').manual_seed(0), or a list with "
                    "one for each image."
                )
        height, width = values.get("height"), values.get("width")
        if (height is None) != (width is None):  # the stock pipelines would ignore the one
            raise ValueError(f"height={height} and width={width} were given. Pass both, or none of them.")
        strength, steps = (
            values.get("strength"),
            len(ready) if ready is not None else values["num_inference_steps"],
        )
        if strength is not None and 0 <= strength <= 1 and int(steps * strength) < 1:
            raise ValueError(
                f"strength={strength} of {steps} steps leaves no step to draw. Expected {1 / steps:.3g} or more, or more steps."
            )
        self._check_ip_adapter(values)

    def _check_ip_adapter(self, values):
        config = getattr(self.unet, "config", None)
        loaded = getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj"
        names = ("ip_adapter_image", "ip_adapter_image_embeds")
        given = any(values.get(name) is not None for name in names)
        if loaded and not given:
            raise ValueError(
                "An IP-Adapter is loaded, and no image was given for it. Pass ip_adapter_image, or call unload_ip_adapter()."
            )
        if given and not loaded:
            raise ValueError(
                "An image for an IP-Adapter was given, and none is loaded. Call load_ip_adapter, or leave the image out."
            )
        if loaded and any("Sliced" in type(one).__name__ for one in self.unet.attn_processors.values()):
            raise ValueError(
                "Attention slicing has taken the place of the IP-Adapter's attention. Call disable_attention_slicing(), "
                "unload_ip_adapter() and load_ip_adapter again."
            )

    def check_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) of an image in pixels, the U-Net's own for None. ValueError for sides that the VAE cannot halve."""
        own, factor = self._own_size(), self.vae_scale_factor
        size = (height or own[0], width or own[1])
        if size[0] % factor or size[1] % factor:
            raise ValueError(
                f"height={size[0]} and width={size[1]} were given. Expected multiples of {factor}: "
                f"{size[0] // factor * factor} and {size[1] // factor * factor}, for instance."
            )
        return size

    def check_controls(self, name: str, arguments: Mapping[str, Any]) -> None:
        """One control image for each ControlNet, one or as many as prompts, all of the size of the image to be made.

        `arguments` are those of a call; the control images are the one called `name`, opened by `open_images`. Else ValueError:
        diffusers would bend a control image to another shape, leave out a ControlNet that has no scale, or fail inside one.
        """
        controls = [arguments.get(name)]
        controlnets = getattr(getattr(self.controlnet, "_orig_mod", self.controlnet), "nets", None)
        if controlnets is not None:
            # a list for all prompts or one for each of them, with an image for each ControlNet
            nested = isinstance(controls[0], list) and any(isinstance(row, list) for row in controls[0])
            rows = [("control images", row) for row in (controls[0] if nested else controls)]
            rows.append(("controlnet_conditioning_scale", arguments.get("controlnet_conditioning_scale")))
            for what, row in rows:
                if isinstance(row, list) and len(row) != len(controlnets):
                    raise ValueError(
                        f"{len(row)} {what} were given for {len(controlnets)} ControlNets. Pass one for each ControlNet."
                    )
            controls = [list(images) for images in zip(*controls[0], strict=True)] if nested else controls[0]
        prompt = arguments.get("prompt")
        batch_size = len(arguments["prompt_embeds"] if prompt is None else prompt)
        sizes = []
        for images in controls if isinstance(controls, list) else ():
            images = _split_images(images)
            if len(images) not in (1, batch_size):
                raise ValueError(
                    f"{len(images)} control images were given for {batch_size} prompts. Pass one for all, or one for each."
                )
            sizes += [self._size_of(image) for image in images]
        if None in sizes or not sizes or arguments.get("padding_mask_crop") is not None:
            return  # no images, which diffusers says; or it cuts them out of what it is given
        (height, width), multiple = sizes[0], self.vae_scale_factor
        if height % multiple or width % multiple:
            raise ValueError(
                f"A control image of {width} x {height} pixels was given. Expected multiples of {multiple}: "
                f"{width // multiple * multiple} x {height // multiple * multiple}, for instance."
            )
        expected = [("another", size) for size in sizes[1:]]
        asked = (arguments.get("height") or height, arguments.get("width") or width)
        expected.append(("height and width", asked))
        for image in _split_images(arguments.get("image")) if name == "control_image" else ():
            own = self._size_of(image)
            # all but latents are resized to a size that is asked for
            if own is not None and (arguments.get("height") is None or self._is_latents(image)):
                rounded = tuple(side // multiple * multiple for side in own)
                expected.append(("an image to be changed", rounded))
        for what, size in expected:
            if size != (height, width):
                raise ValueError(
                    f"A control image of {width} x {height} pixels was given, and {what} of {size[1]} x {size[0]}. Make them of one "
                    "size."
                )

    # Images to be changed, control images, masks ---------------------------------------------------------------

    def open_images(self, given: dict[str, Any]) -> None:
        """Replace the images and masks among the arguments of a call by what diffusers reads right: RGB and L PIL images.

        They are `image`, `control_image` and `mask_image`; ValueError or TypeError for one that cannot be read. Floating-point arrays and tensors of RGB are exact and stay; tensors of latents too.
        """
        module = sys.modules[type(self.tokenizer).__module__]
        if not hasattr(module, "open_mask"):  # without a tokenizer, or with an earlier one
            try:
                module = importlib.import_module(".processing_kosmos_g", __package__)
            except ImportError:
                return
        for name in ("image", "control_image", "mask_image"):
            if given.get(name) is not None:
                read = _read_mask if name == "mask_image" else _read_picture
                opened = _read_each(given[name], lambda one, read=read, name=name: read(module, one, name))
                # diffusers takes the rows of a single array for a batch
                given[name] = opened[None] if name != "mask_image" and _is_single(opened) else opened

    def _is_latents(self, image):
        """Whether a (C, H, W) tensor is a latent image, which diffusers takes for an image as well."""
        channels = getattr(getattr(self.vae, "config", None), "latent_channels", 4)
        return isinstance(image, torch.Tensor) and image.ndim > 2 and image.shape[-3] == channels

    def _size_of(self, image):
        """PIL image, array (H, W, C) or tensor (C, H, W) -> (H, W) in pixels, also of latents; None for anything else."""
        if not hasattr(image, "shape"):
            return (image.height, image.width) if hasattr(image, "height") else None
        if not isinstance(image, torch.Tensor):
            return tuple(image.shape[:2])
        factor = self.vae_scale_factor if self._is_latents(image) else 1
        return tuple(side * factor for side in image.shape[-2:])

    # Image words -----------------------------------------------------------------------------------------------

    @property
    def image_words(self) -> list[str]:
        """Names of the image words, in the order they were added; none without a Kosmos-G tokenizer."""
        return getattr(self.tokenizer, "image_words", [])

    @torch.no_grad()
    def add_image_word(
        self, word: str, image: ImageLike | Sequence[ImageLike], strength: float = 1.0
    ) -> None:
        """Make an image a word: from now on `word` in a plain string means it, in every pipeline that shares the
        tokenizer and the text encoder, diffusers' own included.

        Args:
            word: a name such as "<my-dog>": lower-case letters, digits and hyphens in angle brackets.
            image: PIL image of any mode, array, tensor, path or URL; or a list of several that the word names in this order. Each is encoded once, here.
            strength: factor of the image's states in the language model's input space: 1 is the image as it is, 0
                leaves nothing of it but its place in the prompt.

        Raises:
            ValueError, TypeError: an ill-formed or known name, or an image that cannot be read.
        """
        processor = self.get_processor()
        sys.modules[type(self.tokenizer).__module__].check_image_word(word, self.image_words)
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise ValueError(f"No image was given for {word}. Pass an image, or a list of them.")
        if not math.isfinite(strength) or strength < 0:
            raise ValueError(f"strength={strength} was given for {word}. Expected a finite number from 0 on.")
        pixel_values = torch.stack([torch.from_numpy(processor.preprocess(one)) for one in images])
        if (world := self._world()) is not None:
            self._warn(sys.modules[type(processor).__module__].outside_world(world, [], pixel_values))
        image_embeds = self._encode_images(pixel_values, self._execution_device)
        self._register_image_words({word: image_embeds * strength})

    def remove_image_word(self, word: str) -> None:
        """Forget an image word. Raises ValueError if there is none of that name."""
        with _WORDS_LOCK:
            self.get_processor()  # checks that both know the same words, so that both can forget this one
            self.tokenizer.remove_image_word(word)
            self.text_encoder.remove_image_word(word)

    def save_image_words(self, path: str | Path, words: Sequence[str] | None = None) -> None:
        """Write image words to a small safetensors file: name -> (images, Q, D), in the encoder's dtype.

        Args:
            path: of the file, ending in .safetensors; written atomically.
            words: names to write; None writes all.

        Raises:
            ValueError: there is no such word, or none at all.
            OSError: the file cannot be written, or the disk is full.
        """
        known = self.image_words
        words = known if words is None else list(dict.fromkeys(words))
        unknown = sorted(set(words) - set(known))
        if unknown or not words:
            raise ValueError(
                f"Image words to save: {words}. Known: {', '.join(known) or 'none'}. Name words that are there."
            )
        parts = dict(zip(known, self.text_encoder.image_words, strict=True))
        tensors = {word: parts[word]().detach().cpu().contiguous() for word in words}
        path = Path(path)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            part.touch()
            mode = (
                part.stat().st_mode
            )  # as the umask asks for; safetensors makes files that only their owner reads
            save_file(tensors, part, metadata={"format": IMAGE_WORDS_FORMAT, "words": json.dumps(words)})
            part.chmod(mode)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OSError(f"The image words cannot be written to {path} ({reason}).") from error
        finally:
            part.unlink(missing_ok=True)

    def load_image_words(self, path: str | Path) -> None:
        """Add the image words of a file that `save_image_words` wrote; all of them, or none when one is refused.

        Raises:
            ValueError: not such a file, states of another size, or a name that is taken.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            hint = "Pass a file that save_image_words wrote."
            raise ValueError(f"{path} cannot be read ({str(error)[:300]}). {hint}") from error
        if metadata.get("format") != IMAGE_WORDS_FORMAT:
            raise ValueError(
                f"{path} has the format {repr(metadata.get('format'))[:100]}; expected {IMAGE_WORDS_FORMAT!r}. Pass a file that "
                "save_image_words wrote."
            )
        try:
            words = json.loads(metadata.get("words", "null"))
        except (ValueError, RecursionError):
            words = None
        known = isinstance(words, list) and all(isinstance(word, str) for word in words)
        if not known or sorted(words) != sorted(tensors):
            listed, held = str(words)[:100], str(sorted(tensors)[:3])[:100]
            raise ValueError(f"{path} is damaged: it lists the words {listed} but holds {held}.")
        try:
            self._register_image_words({word: tensors[word] for word in words})
        except ValueError as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from error

    def _register_image_words(self, states):
        """Enter words into tokenizer and encoder, all or none."""
        with _WORDS_LOCK:
            check, known = (
                sys.modules[type(self.tokenizer).__module__].check_image_word,
                set(self.image_words),
            )
            for word in states:
                check(word, known)
            self.text_encoder.add_image_words(states)
            try:
                self.tokenizer.add_image_words(list(states))
            except BaseException:  # a stock pipeline may read with the same tokenizer at this moment
                for word in states:
                    self.text_encoder.remove_image_word(word)
                raise

    # Composition -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def blend(
        self, prompts: Iterable[tuple[PromptLike, float] | tuple[PromptLike, float, Sequence[ImageLike]]]
    ) -> torch.Tensor:
        """Weighted mean of the conditions of several prompts: sum(w_i * c_i) / sum(w_i).

        Args:
            prompts: (prompt, weight) or (prompt, weight, images) for each; a prompt in any form for one. A weight may be
                negative, which moves away from that prompt; their sum may not be 0.

        Returns:
            (1, 77, 768), to be given as `prompt_embeds`. A prompt blended with itself gives its own condition.

        Raises:
            ValueError: no prompts or none of this form, weights that are not finite or sum to 0, or a batch in the place
                of one prompt.
        """
        prompts = list(prompts)
        if any(isinstance(entry, str) or len(entry) not in (2, 3) for entry in prompts):
            raise ValueError("blend takes a list with (prompt, weight) or (prompt, weight, images) for each.")
        prompts = [(*entry, None)[:3] for entry in prompts]
        weights = _read_weights([weight for _, weight, _ in prompts], "prompts")
        processor = self.get_processor()
        batch = [parsed for prompt, _, images in prompts for parsed in processor.parse(prompt, images)]
        if len(batch) != len(prompts):
            raise ValueError(
                f"blend was given {len(batch)} prompts for {len(prompts)} weights. Pass one (prompt, weight) for each: a "
                "list of strings is a batch."
            )
        condition, _ = self.encode_prompt(batch, do_classifier_free_guidance=False)
        return self.blend_conditions(condition, weights)

    @staticmethod
    def blend_conditions(conditions: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """The same of conditions that are there: (N, 77, 768) and N weights -> (1, 77, 768). ValueError as `blend`."""
        weights = torch.tensor(_read_weights(weights, "conditions"), dtype=torch.float64)
        dtype = torch.promote_types(conditions.dtype, torch.float32)
        weights = (weights / weights.sum()).to(dtype).to(conditions.device)
        return torch.einsum("i,ikd->kd", weights, conditions.to(dtype))[None].to(conditions.dtype)

    @torch.no_grad()
    def encode_with_clip(
        self, prompt: str | list[str], text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
    ) -> torch.Tensor:
        """CLIP's own states of a text, for instance as `negative_prompt_embeds` next to a prompt of words and images.

        Args:
            prompt: a string or a list of them, cut at 77 tokens by diffusers' rules (it warns).
            text_encoder, tokenizer: CLIPTextModel and CLIPTokenizer of the Stable Diffusion that the U-Net is from.

        Returns:
            (B, 77, 768): exactly what the stock pipeline would use, no AlignerNet involved.
        """
        stock = StableDiffusionPipeline(
            None, text_encoder, tokenizer, None, None, None, None, requires_safety_checker=False
        )
        return stock.encode_prompt(prompt, self._execution_device, 1, False)[0]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers', keywords included, for files of any spelling (see `lora_state_dict`).

        Layers for CLIP's text encoder are left out with one warning; those of Kosmos-G's own are loaded.

        Raises:
            ImportError: peft is not installed.
            OSError: there is no such file in the folder or on the Hub.
            ValueError: there is no such file, it is damaged, or its layers do not fit. The pipeline is as it was before.
        """
        source = pretrained_model_name_or_path_or_dict
        if not USE_PEFT_BACKEND:
            raise ImportError("LoRA needs the package peft: pip install -U peft")
        # peft makes it the name of a module
        if adapter_name is not None and (
            "." in adapter_name or hasattr(torch.nn.ModuleDict, adapter_name or "pop")
        ):
            raise ValueError(
                f"adapter_name={adapter_name!r} was given. Expected a name without a dot that is not a method of torch's "
                f"modules, such as {adapter_name.replace('.', '-') + '-lora'!r}."
            )
        if isinstance(source, (str, Path)):
            path, source = Path(source), str(source)
            if path.is_file():
                kwargs.setdefault("weight_name", path.name)  # or diffusers refuses while the Hub is offline
            elif not path.exists() and (path.is_absolute() or path.suffix in LORA_SUFFIXES):
                raise ValueError(f"There is no LoRA at {source!r}. Pass a file, a folder or a Hub id.")
        models = [_uncompiled(getattr(self, name, None)) for name in self._lora_loadable_modules]
        before = [set(getattr(model, "peft_config", ())) for model in models]
        try:
            with _brief_bars():
                super().load_lora_weights(source, adapter_name, **kwargs)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # whatever a library raises for what a file holds
            self._forget_adapters(models, before)
            reason = str(error).strip().partition("\n")[0][:500] or type(error).__name__
            if not isinstance(source, str):
                raise ValueError(reason) from error
            kind = OSError if isinstance(error, OSError) else ValueError
            if "this LoRA" in reason:
                raise kind(f"{reason} The LoRA is {source!r}.") from error
            hint = (
                ""
                if reason.endswith(".")
                else ". Pass a .safetensors file with a LoRA for Stable Diffusion 1.5."
            )
            raise kind(f"The LoRA {source!r} cannot be loaded: {reason}{hint}") from error

    @staticmethod
    def _forget_adapters(models, before):
        """Remove the adapters that models have got since `before`, the set of names of each."""
        for model, names in zip(models, before, strict=True):
            if getattr(model, "peft_config", None) and not names:
                recurse_remove_peft_layers(model)
                del model.peft_config
                model._hf_peft_config_loaded = False
            for name in set(getattr(model, "peft_config", ())) - names:
                delete_adapter_layers(model, name)

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """As diffusers', but every spelling comes out as peft's, `unet.MODULE.lora_A.weight`, and is checked.

        Read are the spellings of peft (an adapter's name in the keys and `base_model.model.` included), of diffusers, of
        kohya, and those without a prefix, which `unet.save_lora_adapter` and peft write.

        Returns:
            (layers, alphas) or (layers, alphas, metadata): {key: tensor}, {"unet.MODULE.alpha": number} or None, and the
            settings that the file has for peft, or None.

        Raises:
            ValueError: something else than LoRA, half a pair, or a tensor that is not finite; the message names it.
        """
        from diffusers.loaders.lora_base import _fetch_state_dict as fetch  # has no public name

        hub = ("local_files_only", "cache_dir", "force_download", "proxies", "token", "revision", "subfolder")
        options = {name: kwargs.get(name) for name in (*hub, "weight_name", "use_safetensors")}
        allow_pickle = options["use_safetensors"] is None
        options["use_safetensors"] = allow_pickle or options["use_safetensors"]
        if str(options["weight_name"]).endswith(".safetensors"):
            allow_pickle = False  # or what is wrong with the file would be lost
        agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
        source = pretrained_model_name_or_path_or_dict
        state_dict, metadata = fetch(source, allow_pickle=allow_pickle, user_agent=agent, **options)
        if not isinstance(state_dict, dict) or not state_dict:
            raise ValueError("It holds no tensors.")
        _refuse_other_methods(state_dict)
        if any("dora_scale" in key for key in state_dict):
            logger.warning(
                "The dora_scale of this LoRA is left out: diffusers reads such a DoRA as a plain LoRA."
            )
        state_dict = {key: value for key, value in state_dict.items() if "dora_scale" not in key}
        kohya = {key: value for key, value in state_dict.items() if key.startswith(KOHYA_PREFIXES)}
        layers = {key: value for key, value in state_dict.items() if key not in kohya}
        alphas = {}
        if kohya:
            _check_kohya(kohya)
            if kwargs.get("unet_config") is not None:
                options["unet_config"] = kwargs["unet_config"]
            converted, alphas = super().lora_state_dict(kohya, **options)
            layers |= converted
        layers, own_alphas = _spell_as_peft(layers)
        alphas = {
            f"{_module_of_alpha(key)}.alpha": value for key, value in (alphas or {}).items()
        } | own_alphas
        _check_values(layers)
        if metadata is None:
            metadata = _read_adapter_config(source, options["weight_name"], options["subfolder"])
        if metadata is not None:
            metadata = None if alphas else _with_prefixes(metadata, layers)
        return (layers, alphas or None, metadata) if return_lora_metadata else (layers, alphas or None)

    @classmethod
    def load_lora_into_unet(
        cls,
        state_dict: dict[str, torch.Tensor],
        network_alphas: dict[str, float] | None,
        unet: UNet2DConditionModel,
        metadata: dict[str, Any] | None = None,
        _pipeline: Any = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers', after a check that the layers are those of this U-Net; otherwise ValueError."""
        unet = _uncompiled(unet)
        state_dict, alphas = _spell_as_peft(state_dict)
        layers = {key: value for key, value in state_dict.items() if key.startswith("unet.")}
        if not layers:
            encoder = _uncompiled(getattr(_pipeline, "text_encoder", None))
            if any(_fits(encoder, "text_encoder.", key, value) for key, value in state_dict.items()):
                return _check_pairs(state_dict, network_alphas or {})
            raise ValueError(
                f"None of the {len(state_dict)} keys of this LoRA is for a U-Net; the first is {next(iter(state_dict), '')!r}. "
                "A LoRA for CLIP's text encoder alone, or for another kind of model, has nothing to act on: take one made "
                "for the U-Net of Stable Diffusion 1.5."
            )
        foreign = [key for key, value in layers.items() if not _fits(unet, "unet.", key, value)]
        if foreign:
            first = f"{foreign[0].removeprefix('unet.')} {tuple(layers[foreign[0]].shape)}"
            raise ValueError(
                f"{len(foreign)} of {len(layers)} layers of this LoRA do not fit the U-Net, such as {first}. It was "
                "made for another architecture (SDXL, 2.1?): take one made for Stable Diffusion 1.5."
            )
        alphas |= {f"{_module_of_alpha(key)}.alpha": value for key, value in (network_alphas or {}).items()}
        _check_pairs(state_dict, alphas)
        if alphas:  # diffusers would give a module without one that of another
            ranks = {key.split(".lora_")[0]: len(value) for key, value in layers.items() if ".lora_A." in key}
            alphas = {
                f"{module}.alpha": alphas.get(f"{module}.alpha", rank) for module, rank in ranks.items()
            }
        if not any(key.startswith("unet.") for key in metadata or ()):
            metadata = None
        options = {"metadata": metadata, "_pipeline": _pipeline, **kwargs}
        super().load_lora_into_unet(layers, alphas or None, unet, **options)

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, torch.Tensor],
        network_alphas: dict[str, float] | None,
        text_encoder: Any,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers', for layers that fit Kosmos-G's text encoder; the others, made for CLIP's, are left out."""
        text_encoder = _uncompiled(text_encoder)
        layers = {key: value for key, value in state_dict.items() if key.startswith("text_encoder")}
        misfits = [
            key for key, value in layers.items() if not _fits(text_encoder, "text_encoder.", key, value)
        ]
        misfits = {key.split(".lora_")[0] for key in misfits}  # a layer as a whole
        fitting = {key: value for key, value in layers.items() if key.split(".lora_")[0] not in misfits}
        left = len(layers) - len(fitting)
        if left:
            logger.warning(
                f"{left} of {len(state_dict)} keys of this LoRA are for CLIP's text encoder, which Kosmos-G replaces; they "
                "are left out. The rest is loaded."
            )
        if not fitting:
            return
        if not any(key.startswith("text_encoder.") for key in metadata or ()):
            ranks = {
                key.split(".lora_")[0]: len(value) for key, value in fitting.items() if ".lora_A." in key
            }
            alphas = {
                module: (network_alphas or {}).get(f"{module}.alpha", rank) for module, rank in ranks.items()
            }
            settings = {
                "r": next(iter(ranks.values())),
                "lora_alpha": next(iter(alphas.values())),
                "rank_pattern": {
                    module.removeprefix("text_encoder."): rank for module, rank in ranks.items()
                },
                "alpha_pattern": {
                    module.removeprefix("text_encoder."): alpha for module, alpha in alphas.items()
                },
                "target_modules": [module.removeprefix("text_encoder.") for module in ranks],
                "use_dora": any(".lora_magnitude_vector" in key for key in fitting),
                "lora_bias": any(key.endswith(".bias") for key in fitting),
            }
            metadata = {f"text_encoder.{name}": value for name, value in settings.items()}
        # diffusers reads one spelling of a text encoder's layers
        for peft, diffusers in (
            (".lora_A.", ".lora_linear_layer.down."),
            (".lora_B.", ".lora_linear_layer.up."),
        ):
            fitting = {key.replace(peft, diffusers): value for key, value in fitting.items()}
        super().load_lora_into_text_encoder(fitting, None, text_encoder, metadata=metadata, **kwargs)

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: raises TypeError. Embeddings made for CLIP mean nothing to another text encoder."""
        raise TypeError(
            "Textual inversion embeddings are made for CLIP's text encoder and mean nothing to Kosmos-G's. Make an image "
            "word instead, in one pass: pipe.add_image_word('<my-dog>', image), or load one with load_image_words."
        )

    # Saving and loading ----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As diffusers', but weights that are missing, foreign, integers or not finite are refused, and errors name the file.

        In the package alone: code that a saved folder brings loads as diffusers does.

        Raises:
            OSError: there is no such folder or repository, or a file is missing.
            ValueError: something in a file is not what it should be.
        """
        load, keywords = super().from_pretrained, _with_dtype(kwargs)
        loading = _sibling("loading")
        if loading is None:
            return load(pretrained_model_name_or_path, **keywords)
        return loading.load_pipeline(load, pretrained_model_name_or_path, **keywords)

    @classmethod
    def _dict_from_json_file(cls, *args, **kwargs):
        """As diffusers', but a folder that carries code is loaded as this class, without running that code."""
        config = super()._dict_from_json_file(*args, **kwargs)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', but the components' classes are the installed ones, not those of the folder's code."""
        config = super().load_config(*args, **kwargs)
        if not isinstance(config, dict):
            return config
        package = __name__.rpartition(".")[0]
        for name, value in config.items():
            if isinstance(value, (list, tuple)) and value and value[0] in MODULES:
                module = f"{package}.{value[0]}"
                if module in sys.modules:
                    config[name] = [module, *value[1:]]
        return config

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers', but model_index.json names the code that the folder carries."""
        super().save_config(save_directory, *args, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        for name, value in index.items():
            if isinstance(value, list) and value and str(value[0]).rpartition(".")[2] in MODULES:
                index[name] = [value[0].rpartition(".")[2], *value[1:]]
        index["_class_name"] = [MODULES[2], self._own_class().__name__]
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a folder that carries its own code and model card and loads with diffusers alone:
        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

        Keywords are those of diffusers' method (`variant`, `max_shard_size`; with `push_to_hub=True` also `repo_id`,
        `commit_message`, `private`, `token`, `create_pr`). No pickle is ever written. A LoRA that is loaded and not fused,
        and an IP-Adapter, are left out with a warning.

        Raises:
            ValueError: pickle files were asked for.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for pickle files. Leave it out: none is written.")
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        upload = {name: kwargs.pop(name, None) for name in names}
        with _brief_bars():
            super(__class__, self._without_adapters()).save_pretrained(save_directory, **kwargs)
        # safetensors makes files that only their owner reads; others have the mode that the umask asks for
        for path in [*Path(save_directory).rglob("*.safetensors"), *Path(save_directory).rglob("*.py")]:
            shutil.copymode(Path(save_directory) / self.config_name, path)
        self.save_code(save_directory)
        model_card = _sibling("model_card")
        if model_card:
            model_card.write_model_card(self, save_directory)
        if push_to_hub:
            upload["repo_id"] = upload["repo_id"] or Path(save_directory).name
            self._upload(save_directory, **upload)

    def save_code(self, save_directory: str | Path) -> None:
        """Put this file into a saved folder, whose components have copied theirs, and what loads from its root alone.

        Those are copies of the components' files, where transformers' Auto classes look for a component in a `subfolder`, and
        pipeline.py, which `DiffusionPipeline.from_pretrained(..., custom_pipeline=folder)` takes.
        """
        folder = Path(save_directory)
        shutil.copyfile(__file__, folder / f"{MODULES[2]}.py")
        for part, module in zip(("text_encoder", "tokenizer"), MODULES, strict=False):
            if (folder / part / f"{module}.py").is_file():
                shutil.copyfile(folder / part / f"{module}.py", folder / f"{module}.py")
        # in two parts: whoever looks for this file's own imports finds none
        entry = "from " + f".{MODULES[2]} import {self._own_class().__name__}  # noqa: F401\n"
        (folder / "pipeline.py").write_text(entry, encoding="utf-8")

    def _without_adapters(self):
        """This pipeline, or one that shares its weights and is without adapters, for saving; says what is left out."""
        bare = {}
        for name in self._lora_loadable_modules:
            model = _uncompiled(getattr(self, name, None))
            adapters = dict(getattr(model, "peft_config", None) or {})
            if isinstance(model, PreTrainedModel) and not model._hf_peft_config_loaded:
                continue  # without, or wrapped by peft itself, which its own save_pretrained refuses
            hid_proj = getattr(model, "encoder_hid_proj", None)
            if isinstance(hid_proj, MultiIPAdapterImageProjection):
                logger.warning("The IP-Adapter is not saved. Load it again on what is loaded from here.")
            elif not adapters:
                continue
            if getattr(model, "hf_quantizer", None) is not None:
                raise ValueError(
                    f"The {name} is quantised and has an adapter. Call unload_lora_weights() before saving."
                )
            bare[name] = _bare_copy(model)
            for layer in model.modules():
                for fused in getattr(layer, "merged_adapters", ()):
                    adapters.pop(fused, None)
            if adapters:
                logger.warning(
                    f"The LoRA {', '.join(map(str, adapters))} of the {name} is not saved: the weights are those without it. To "
                    "save it in the weights for good, call fuse_lora() before."
                )
        if not bare:
            return self
        pipeline = copy.copy(self)
        vars(pipeline).update(bare)
        return pipeline

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Save to a temporary folder, with model card and code, and upload that to `repo_id`; keywords as diffusers'."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return self._upload(folder, repo_id, commit_message, private, token, create_pr)

    def _upload(self, folder, repo_id, commit_message, private, token, create_pr):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        options = {"token": token, "commit_message": commit_message, "create_pr": bool(create_pr)}
        return self._upload_folder(folder, repo_id, **options)

    def _own_class(self):
        """The pipeline class of this file, whatever the user derived from it."""
        return next(base for base in type(self).__mro__ if base.__module__ == __name__)

    @classmethod
    def _get_signature_types(cls):
        return {**super()._get_signature_types(), "text_encoder": (PreTrainedModel,)}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of this class with the components of another, shared and not copied.

        diffusers' own `from_pipe` casts what is shared to float32 unless told otherwise; this one leaves every
        component as it is. Pass `dtype` to cast. New components, such as `controlnet`, are keywords.
        """
        kwargs = _with_dtype(kwargs)
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = KEEP_DTYPES
        pipe = super().from_pipe(pipeline, **kwargs)
        pipe.vision_cache = getattr(pipeline, "vision_cache", None)
        return pipe

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As diffusers', where `from_pipe` ends; there the default is to cast nothing."""
        if kwargs.get("dtype") == KEEP_DTYPES:
            return self
        return super().to(*args, **kwargs)


@contextmanager
def _only_call_with(scheduler):
    """Refuse a call whose scheduler another call counts its steps with: both would draw wrong images.

    The mark is on the scheduler itself, so that all pipelines that share it see it, whichever copy of this file made them.
    """
    if scheduler is None:
        yield
        return
    mark = (id(scheduler), object())  # a copy of the scheduler has another id: it is free
    holder = scheduler.__dict__.setdefault("_kosmos_g_call", mark)
    if holder[0] != id(scheduler):
        holder = scheduler.__dict__["_kosmos_g_call"] = mark
    if holder is not mark:
        raise RuntimeError(
            "Another call draws with this scheduler now, and one scheduler counts the steps of one call. Wait for it, or give "
            "each pipeline a scheduler of its own: pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)."
        )
    try:
        yield
    finally:
        del scheduler.__dict__["_kosmos_g_call"]


def _is_whole(value, least):
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def _is_finite(value):
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _read_weights(weights, what):
    """Weights of a blend as numbers. ValueError for those that no mean can be made with."""
    weights = [float(weight) for weight in weights]
    if not weights or not all(map(math.isfinite, weights)) or abs(math.fsum(weights)) < 1e-6:
        raise ValueError(
            f"blend was given {len(weights)} {what} with the weights {weights}. Expected at least one, and "
            "finite weights that do not sum to 0."
        )
    return weights


def _short(value, length=100):
    """What was given, in an error: never more than `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _sibling(name):
    """Another module of the package; None in a saved folder, which has no copy of it."""
    if not any(
        map(
            Path.is_file,
            (Path(__file__).with_name(f"{name}.py"), Path(__file__).with_name(name) / "__init__.py"),
        )
    ):
        return None
    return importlib.import_module(f".{name}", __package__)


def _brief_bars():
    """The package's rule for bars of loading and saving; elsewhere they are the libraries' own."""
    quiet = _sibling("quiet")
    return quiet.brief_bars() if quiet else nullcontext()


def _with_dtype(keywords):
    """Keywords for diffusers, with the name that `torch_dtype` has there now."""
    if keywords.get("torch_dtype") is None or keywords.get("dtype") is not None:
        return keywords  # if both are given diffusers says so
    return {**keywords, "dtype": keywords["torch_dtype"], "torch_dtype": None}


def _split_images(images):
    """Images in any form that diffusers takes -> list of single ones."""
    if isinstance(images, list):
        return [single for image in images for single in _split_images(image)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _is_single(images):
    return isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 3


def _read_each(images, read):
    return [_read_each(one, read) for one in images] if isinstance(images, (list, tuple)) else read(images)


def _read_picture(module, image, name):
    """An image, or an array or tensor of several, -> what diffusers reads right. `module` is that of the processor."""
    if isinstance(image, torch.Tensor):
        channels = image.shape[-3] if image.ndim in (3, 4) else 1
        if image.ndim == 2:
            image = image[None]
        if channels in (1, 3) and not image.is_floating_point():
            image = image / (1 if image.dtype == torch.bool else 255)
        return image.expand(*image.shape[:-3], 3, -1, -1) if channels == 1 else image
    if isinstance(image, np.ndarray):
        if np.issubdtype(image.dtype, np.floating) and image.ndim in (3, 4) and image.shape[-1] == 3:
            return image
        if image.ndim == 4:
            opened = [module.open_image(one, f"{name}=", any_channels=True) for one in image]
            return np.stack([np.asarray(one, dtype=np.float32) / 255 for one in opened])
    return module.open_image(image, f"{name}=", any_channels=True)


def _read_mask(module, mask, name):
    """The same for a mask; a list of masks for an array of several. ValueError for one that marks nothing.

    A tensor, which a program made, may be 0 all over as in diffusers: a warning says that nothing is filled.
    """
    if isinstance(mask, np.ndarray) and (mask.ndim == 4 or (mask.ndim == 3 and mask.shape[-1] > 4)):
        return [_read_mask(module, one, name) for one in mask]
    if not isinstance(mask, torch.Tensor):
        mask = module.open_mask(mask, f"{name}=")
        top = mask.getextrema()[1] / 255
    else:
        if not mask.is_floating_point():
            mask = mask / (255 if mask.numel() and mask.max() > 1 else 1)
        top = mask.max().item() if mask.numel() else 0
    if top < 0.5:
        logger.warning(
            f"{name}= is dark all over: nothing is filled. Pass one that is white where something is."
        )
    return mask


# LoRA files ---------------------------------------------------------------------------------------------------------

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
HALVES = {
    ".lora_linear_layer.down.": ".lora_A.",
    ".lora_linear_layer.up.": ".lora_B.",
    ".lora_down.": ".lora_A.",
    ".lora_up.": ".lora_B.",
}
# module, half, name of the adapter as peft writes it within a model
LORA_KEY = re.compile(
    r"(.+?)\.lora_([AB])(?:\.(.+))?\.(weight|bias)|(.+?)\.lora_magnitude_vector(?:\.(.+?))?(?:\.weight)?"
)
# what keys without a prefix begin with -> whose they are
OWNERS = dict.fromkeys(
    ("conv_in", "conv_out", "time_embedding", "down_blocks", "mid_block", "up_blocks"), "unet"
)
OWNERS |= dict.fromkeys(
    ("language_model", "vision_model", "image_to_text_projection", "aligner"), "text_encoder"
)
# in the keys of files that are told apart from LoRA -> their method
OTHER_METHODS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid.": "LoCon with a Tucker decomposition",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".vera_": "VeRA",
    ".ia3_": "(IA)3",
    ".on_input": "(IA)3",
    ".a1.": "GLoRA",
    ".diff": "differences of whole weights",
    ".w_norm": "differences of whole weights",
}


def _uncompiled(model):
    """The model that torch.compile has wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def _bare_copy(model):
    """A model without adapters around the same weights; fused ones are in them."""
    with torch.device("meta"):
        if isinstance(model, PreTrainedModel):
            bare = type(model)(copy.deepcopy(model.config))
        else:
            config, ip_adapter = (
                dict(model.config),
                isinstance(model.encoder_hid_proj, MultiIPAdapterImageProjection),
            )
            bare = type(model).from_config(config | ({"encoder_hid_dim_type": None} if ip_adapter else {}))
    weights, own = model.state_dict(), {}
    for key in bare.state_dict():
        module, _, kind = key.rpartition(".")
        own[key] = weights[key] if key in weights else weights[f"{module}.base_layer.{kind}"]
    bare.load_state_dict(own, assign=True)
    return bare


def _on_uncompiled_models(method):
    """A method of diffusers' LoRA loader, which passes over a model that torch.compile has wrapped, for these as well."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        models = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        compiled = {name: model for name, model in models.items() if model is not _uncompiled(model)}
        vars(self).update({name: _uncompiled(model) for name, model in compiled.items()})
        try:
            return method(self, *args, **kwargs)
        finally:
            vars(self).update(compiled)

    return call


def _refuse_other_methods(state_dict):
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, (torch.Tensor, int, float)):
            raise ValueError(
                f"It holds {str(key)[:100]!r} of the type {type(value).__name__}; a LoRA holds tensors alone."
            )
        method = next((name for part, name in OTHER_METHODS.items() if part in key), None)
        if method:
            raise ValueError(
                f"It is a {method} ({key[:150]!r}), and LoRA alone is read. Take a LoRA, or convert it with the tool that made "
                "it."
            )


def _check_kohya(state_dict):
    """Refuse what diffusers would not convert: half a pair, an alpha without one, unknown parts."""
    parts = {}
    for key in state_dict:
        module, _, part = key.partition(".")
        parts.setdefault(module, set()).add(part)
    pair = {"lora_down.weight", "lora_up.weight"}
    for module, found in parts.items():
        if pair - found:
            raise ValueError(f"{module} has no {min(pair - found)}, half of its pair. Is the file complete?")
        if found - pair - {"alpha"}:
            raise ValueError(f"{module}.{min(found - pair - {'alpha'})} is not a part of a LoRA.")
        alpha = state_dict.get(f"{module}.alpha")
        if alpha is not None:
            _number(f"{module}.alpha", alpha)


def _number(key, value):
    number = float(value) if not isinstance(value, torch.Tensor) or value.numel() == 1 else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} is not a finite number.")
    return number


def _spell_as_peft(state_dict):
    """({COMPONENT.MODULE.lora_A.weight: tensor}, {COMPONENT.MODULE.alpha: number}) of keys in any spelling but kohya's."""
    layers, alphas, adapters, strange = {}, {}, set(), []
    for original, value in state_dict.items():
        key = next(iter(convert_unet_state_dict_to_peft({original: None})))
        key = key.replace("base_model.model.", "", 1)
        for spelling, ours in HALVES.items():
            key = key.replace(spelling, ours)
        owner = OWNERS.get(key.partition(".")[0])
        key = f"{owner}.{key}" if owner else key
        match = LORA_KEY.fullmatch(key)
        if key.endswith(".alpha"):
            alphas[key] = _number(original, value)
            continue
        if match is None:
            strange.append(original)
            continue
        if match[1]:
            key, adapter = f"{match[1]}.lora_{match[2]}.{match[4]}", match[3]
        else:
            key, adapter = f"{match[5]}.lora_magnitude_vector", match[6]
        adapters.update([adapter] if adapter else ())
        if key in layers or len(adapters) > 1:
            names = f" of the adapters {', '.join(sorted(adapters)[:3])}" if len(adapters) > 1 else ""
            raise ValueError(
                f"It holds {key[:150]!r} more than once{names}. Expected one LoRA: save each to a file of its own."
            )
        layers[key] = value
    if strange:
        what = "It is not a LoRA" if not layers else "Not all of it is a LoRA"
        raise ValueError(
            f"{what}: {len(strange)} of {len(state_dict)} keys are for nothing known, such as {strange[0][:150]!r}."
        )
    return layers, alphas


def _module_of_alpha(key):
    """COMPONENT.MODULE of an alpha in diffusers' spelling, which ends in the converted name of a half."""
    key = next(iter(convert_unet_state_dict_to_peft({key.removesuffix(".alpha"): None})))
    return key.split(".lora_")[0]


def _check_values(layers):
    for key, value in layers.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(
                f"{key} is {getattr(value, 'dtype', type(value).__name__)}. Expected floating-point weights."
            )
        if value.numel() == 0 or not _all_finite(value):
            raise ValueError(f"{key} {tuple(value.shape)} has values that are not finite, or none at all.")


def _check_pairs(layers, alphas):
    for key, value in layers.items():
        module = key.split(".lora_")[0]
        for half in ("lora_A", "lora_B"):
            if f"{module}.{half}.weight" not in layers:
                raise ValueError(f"{module} has no {half}.weight, half of its pair. Is the file complete?")
        rank = layers[f"{module}.lora_B.weight"].shape[1:2]
        if key.endswith(".lora_A.weight") and value.shape[:1] != rank:
            ranks = f"{len(value)} and {rank[0] if rank else 'none'}"
            raise ValueError(f"The halves of {module} have the ranks {ranks}. Expected one rank.")
    for key in alphas:
        if f"{key.removesuffix('.alpha')}.lora_A.weight" not in layers:
            raise ValueError(f"{key} is there without the weights it belongs to. Is the file complete?")


def _all_finite(tensor):
    """Whether all values are finite; by the extremes, in one pass and without a copy."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = tensor.float()
    return all(map(math.isfinite, (extreme.item() for extreme in torch.aminmax(tensor))))


def _fits(model, prefix, key, value):
    """Whether a tensor of a LoRA, `prefix` and a name of a model's layer, has the shape of that layer."""
    module, _, half = key.rpartition(".lora_")
    if model is None or not key.startswith(prefix):
        return False
    try:
        layer = model.get_submodule(module.removeprefix(prefix))
    except AttributeError:
        return False
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    # not of the weight, which quantisation may have packed
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        sides, kernel = (layer.in_features, layer.out_features), ()
    elif isinstance(layer, torch.nn.Conv2d):
        sides, kernel = (layer.in_channels // layer.groups, layer.out_channels), layer.kernel_size
    else:
        return False
    if half == "A.weight":
        return tuple(value.shape[1:]) == (sides[0], *kernel)
    if half == "B.weight":
        return value.ndim > 1 and (len(value), *value.shape[2:]) == (sides[1], *(1 for _ in kernel))
    return value.numel() == sides[1]


def _read_adapter_config(source, weight_name, subfolder):
    """What peft's adapter_config.json next to a file says of the scale, or None."""
    if isinstance(source, dict):
        return None
    folder = Path(source).parent if Path(source).is_file() else Path(source) / (subfolder or "")
    path = folder / "adapter_config.json"
    if not path.is_file() or not str(weight_name or "adapter_model").startswith("adapter_model"):
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    names = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )
    return {name: config[name] for name in names if config.get(name) is not None}


def _with_prefixes(metadata, layers):
    """peft's settings under the names of their components, which one model's own file leaves out."""
    owners = {key.partition(".")[0] for key in layers}
    if not isinstance(metadata, dict):
        raise ValueError("Its settings for peft are not an object.")
    if len(owners) > 1 or any(key.partition(".")[0] in owners for key in metadata):
        return metadata
    return {f"{min(owners)}.{name}": value for name, value in metadata.items()}


class KosmosGPipeline(KosmosGPromptMixin, StableDiffusionPipeline):
    """Text-to-image: `pipe("<i> in the suit of <i>", images=[dog, armour]).images[0]`."""


class KosmosGImg2ImgPipeline(KosmosGPromptMixin, StableDiffusionImg2ImgPipeline):
    """Image-to-image: `image=` is what is changed, `images=` are the images of the prompt."""


class KosmosGInpaintPipeline(KosmosGPromptMixin, StableDiffusionInpaintPipeline):
    """Inpainting: `image=` and `mask_image=` say where, `images=` are the images of the prompt."""


class KosmosGControlNetPipeline(KosmosGPromptMixin, StableDiffusionControlNetPipeline):
    """Text-to-image under a ControlNet: `image=` is the control image, `images=` are the images of the prompt."""


class KosmosGControlNetImg2ImgPipeline(KosmosGPromptMixin, StableDiffusionControlNetImg2ImgPipeline):
    """Image-to-image under a ControlNet: `image=`, `control_image=`, and `images=` for the prompt."""


class KosmosGControlNetInpaintPipeline(KosmosGPromptMixin, StableDiffusionControlNetInpaintPipeline):
    """Inpainting under a ControlNet: `image=`, `mask_image=`, `control_image=`, and `images=` for the prompt."""
