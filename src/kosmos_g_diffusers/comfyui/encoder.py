"""What travels along a Kosmos-G link in ComfyUI, and what the nodes do with it.

ComfyUI keeps what a node returned and hands it to several others: nothing here changes what it is given. Image words belong to
a link, as LoRAs belong to a MODEL link, and the encoder knows them only while it reads a prompt.

Letters of the shapes: B images of a batch, H x W pixels, Q states of D numbers an image, K states of A numbers the condition
(77 of 768 for the released model).
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import PIL.Image
import torch
from comfy.model_patcher import ModelPatcher

from ..environment import as_dtype, default_dtype
from ..modeling_kosmos_g import VisionCache
from ..pipeline_kosmos_g import KosmosGPipeline
from ..processing_kosmos_g import IMAGE_MARK
from .checks import AUTO, count_problem, read_weights

# states of images, for all encoders: an image is encoded once, whatever the words around it
VISION_CACHE = VisionCache(2**26)
IN_PYTHON = "Add it with add_image_word(word, image)"
IN_COMFYUI = "Connect Image Word or Load Image Words between the loader and this node"
_READING = threading.RLock()  # held while the encoder knows the words of one link


class KosmosG(torch.nn.Module):
    """The text encoder for ComfyUI's memory management, which sets attributes that a transformers model has not free."""

    def __init__(self, text_encoder: torch.nn.Module):
        super().__init__()
        self.text_encoder = text_encoder


@dataclass(frozen=True)
class Encoder:
    """A loaded text encoder with its tokenizer, and the image words of this link.

    Attributes:
        pipe: KosmosGPipeline with a text encoder and a tokenizer alone.
        patcher: what ComfyUI moves between devices.
        words: name -> (images, Q, D), on the CPU.
    """

    pipe: KosmosGPipeline
    patcher: Any
    words: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def reading(self) -> Iterator[KosmosGPipeline]:
        """The pipeline, on its device and with the words of this link, as long as the block lasts."""
        # whole: a part of it on another device would need ComfyUI's own layers
        memory.load_models_gpu([self.patcher], force_full_load=True)
        with _READING, torch.no_grad():
            own = self.pipe.image_words  # of the folder
            try:
                self.pipe.text_encoder.add_image_words(self.words)
                self.pipe.tokenizer.add_image_words(list(self.words))
                yield self.pipe
            finally:
                for word in self.pipe.image_words:
                    if word not in own:
                        self.pipe.remove_image_word(word)


def load(source: str, dtype: str = AUTO) -> Encoder:
    """The encoder of a Kosmos-G folder or Hub id.

    Args:
        dtype: name of torch's, or AUTO.

    Raises:
        ValueError: it is not a Kosmos-G; the message names it.
    """
    device = memory.text_encoder_device()
    dtype = default_dtype(str(device)) if dtype == AUTO else dtype
    parts = dict.fromkeys(("unet", "vae", "scheduler", "safety_checker", "feature_extractor"))
    try:
        pipe = KosmosGPipeline.from_pretrained(source, dtype=as_dtype(dtype), use_safetensors=True, **parts)
        pipe.get_processor()
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{source!r} is not a Kosmos-G model that can be loaded: {reason} Take a folder that kosmos-g convert wrote."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe.vision_cache = VISION_CACHE
    offload = memory.text_encoder_offload_device()
    return Encoder(pipe, ModelPatcher(KosmosG(pipe.text_encoder), load_device=device, offload_device=offload))


def as_images(batch: torch.Tensor) -> list[PIL.Image.Image]:
    """ComfyUI's IMAGE (B, H, W, C), [0, 1] -> PIL images, with the pixels of the file where there is one.

    Raises:
        ValueError: values that are not finite.
    """
    if not batch.isfinite().all():
        raise ValueError("An image has values that are NaN or infinite. Check the node that it comes from.")
    pixels = (batch.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def spread(text: str, batches: Sequence[torch.Tensor]) -> tuple[str, list[PIL.Image.Image]]:
    """(text, images) for the pipeline: a batch of several images takes as many marks, one behind the other."""
    images = [as_images(batch) for batch in batches]
    first, *stretches = text.split(IMAGE_MARK)
    if len(stretches) == len(images):
        text = first + "".join(
            IMAGE_MARK * len(one) + rest for one, rest in zip(images, stretches, strict=True)
        )
    return text, [image for one in images for image in one]


def encode(encoder: Encoder, text: str, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """A prompt of words and images -> (1, K, A): what `KosmosGPipeline.encode_prompt` gives, in float32 on the CPU.

    Raises:
        ValueError: counts that do not match, an unknown image word, a prompt that is too long.
    """
    if problem := count_problem(text, len(batches)):
        raise ValueError(problem)
    text, images = spread(text, batches)
    with _explained(), encoder.reading() as pipe:
        return _hand_on(pipe.encode_prompt(text, images=images or None, do_classifier_free_guidance=False)[0])


def encode_negative(encoder: Encoder, text: str, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same for what is to be avoided; an empty text is the null condition, and without images a mark is text."""
    if problem := count_problem(text, len(batches), marks_are_text=True):
        raise ValueError(problem)
    text, images = spread(text, batches) if batches else (text, None)
    with _explained(), encoder.reading() as pipe:
        config = pipe.text_encoder.config
        stand_in = torch.zeros(1, config.num_queries, config.aligner_hidden_size)
        return _hand_on(
            pipe.encode_prompt(None, prompt_embeds=stand_in, negative_prompt=text, negative_images=images)[1]
        )


def add_word(encoder: Encoder, name: str, batch: torch.Tensor, strength: float) -> Encoder:
    """The encoder with one more word, for the images of a batch in their order. Raises ValueError as `add_image_word`."""
    return _with_words(encoder, lambda pipe: pipe.add_image_word(name, as_images(batch), strength))


def load_words(encoder: Encoder, path: str | Path) -> Encoder:
    """The encoder with the words of a file. Raises ValueError as `load_image_words`."""
    return _with_words(encoder, lambda pipe: pipe.load_image_words(path))


def save_words(encoder: Encoder, path: str | Path) -> None:
    """Write the words of a link to a file. Raises ValueError if there are none."""
    with encoder.reading() as pipe:
        pipe.save_image_words(path)


def blend(conditionings: Sequence[list[Any]], weights: str) -> list[Any]:
    """Weighted mean of CONDITIONINGs, as `KosmosGPipeline.blend`, with the options of the first one.

    Args:
        weights: numbers with commas between them.

    Raises:
        ValueError: other numbers of weights, or conditionings of several parts or of different shapes.
    """
    values = read_weights(weights, len(conditionings))
    parts = max(map(len, conditionings), default=1)
    if parts > 1:
        raise ValueError(f"A conditioning of {parts} parts cannot be blended. Blend first, then combine.")
    states = [conditioning[0][0] for conditioning in conditionings]
    shapes = {tuple(one.shape) for one in states}
    if len(shapes) > 1:
        raise ValueError(
            f"Conditionings of the shapes {sorted(shapes)} cannot be blended. Give all the same shape."
        )
    return [[KosmosGPipeline.blend_conditions(torch.cat(states), values), dict(conditionings[0][0][1])]]


def check_model(encoder: Encoder, model: Any) -> None:
    """Raise ValueError unless a MODEL reads states of the encoder's width."""
    config = getattr(getattr(getattr(model, "model", None), "model_config", None), "unet_config", {})
    width, own = config.get("context_dim"), encoder.pipe.text_encoder.config.aligner_hidden_size
    if width != own:
        takes = "reads no states of this kind" if width is None else f"takes {width}"
        raise ValueError(
            f"This encoder gives {own}-wide states, this model {takes}. Take a model of the Stable Diffusion 1.5 family (768), "
            "or the small model's own U-Net (Load Sprites) for the small encoder."
        )


@contextmanager
def _explained():
    """Errors that name Python's way to add a word name the nodes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(IN_PYTHON, IN_COMFYUI)) from error


def _hand_on(condition):
    return condition.to(memory.intermediate_device(), torch.float32)


def _with_words(encoder, add):
    with encoder.reading() as pipe:
        known = set(pipe.image_words)
        add(pipe)
        parts = zip(pipe.image_words, pipe.text_encoder.image_words, strict=True)
        new = {name: states().to("cpu", copy=True) for name, states in parts if name not in known}
    return replace(encoder, words={**encoder.words, **new})
