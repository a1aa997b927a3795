"""Samples -> the tensors that each stage reads. The random numbers of training are drawn here, sample by sample.

Each collate has `prepare(sample, generator)`, which turns a sample into a row (a dict) or raises BadSample, and is
called on a list of rows to make the batch (a dict of tensors). They are picklable, for the workers of a DataLoader.

Letters: B samples, L tokens of the longest, N images of the batch, S side of the images the encoder reads,
H side of the images to draw, h side of their latents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedTokenizerBase

from ..processing_kosmos_g import KosmosGProcessor, crop_to_square
from .sample import BadSample, FilteredSample, Sample

Row = dict[str, Any]  # what `prepare` makes of a sample
Batch = dict[str, torch.Tensor]

IGNORED = -100  # torch's cross_entropy leaves such labels out
MOST_ASPECT = 50


class _Prompts:
    """What the stages share: prompts to ids, masks and pixels, padded on the right."""

    def __init__(self, processor, max_text_tokens):
        self.processor, self.max_text_tokens = processor, max_text_tokens

    def prepare(self, key, prompt):
        """{"ids", "slots", "pixels"} as `KosmosGProcessor` makes them of the same words and images."""
        images = [part for part in prompt if not isinstance(part, str)]
        if not images and not "".join(prompt).strip():
            raise BadSample("caption", f"{key} has an empty prompt")
        for image in images:
            _check_aspect(image, key)
        # not the processor's call: that refuses "<b>" as an unknown image word, and in collected text it is text
        try:
            ids, slots, pixels = self.processor.encode(prompt)
        except ValueError as error:
            raise FilteredSample("length", f"{key}: {error}") from error
        text_tokens = len(ids) - 1 - len(pixels) * (2 + self.processor.latent_query_num)
        most = self.max_text_tokens
        if most is not None and text_tokens > most:
            raise FilteredSample("length", f"{key} has {text_tokens} tokens of text, more than {most}")
        return {"ids": ids, "slots": slots, "pixels": pixels}

    def pad(self, rows):
        """Rows -> `input_ids`, `attention_mask` and, with images, `image_token_mask` and `pixel_values`."""
        shape = (len(rows), max(len(row["ids"]) for row in rows))
        batch = {
            "input_ids": torch.full(shape, self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.bool),
        }
        slots = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            length = len(row["ids"])
            batch["input_ids"][number, :length] = torch.tensor(row["ids"])
            batch["attention_mask"][number, :length] = True
            slots[number, :length] = torch.tensor(row["slots"])
        pixels = [image for row in rows for image in row["pixels"]]
        if pixels:
            batch["image_token_mask"] = slots
            batch["pixel_values"] = torch.from_numpy(np.stack(pixels))
        return batch


def put_image_first(sample: Sample) -> tuple[str | PIL.Image.Image, ...]:
    """What stage 1 reads of a sample: of a captioned image the image, then its caption; else the prompt."""
    if sample.target is not None and sample.prompt == (sample.caption,):
        return (sample.target, *sample.prompt)
    return sample.prompt


class PretrainCollate:
    """Stage 1, next-token prediction over text, captioned images and interleaved documents.

    A sequence ends in `</s>`. A sample whose prompt is its caption and that has an image becomes image, caption.

    Args:
        processor: a `KosmosGProcessor`.
        max_text_tokens: samples with more tokens of text are left out; None keeps all that the model can read.

    The batch: `input_ids` (B, L) int64 without the last `</s>`; `labels` (B, L) int64, the next token where that is
    text, `</s>` or the mark that begins an image, -100 where it belongs to the image or is padding;
    `attention_mask` (B, L) bool; with images `image_token_mask` (B, L) bool and `pixel_values` (N, 3, S, S) float32.
    """

    prompts: _Prompts

    def __init__(self, processor: KosmosGProcessor, *, max_text_tokens: int | None = None):
        self.prompts = _Prompts(processor, max_text_tokens)

    def prepare(self, sample: Sample, generator: torch.Generator) -> Row:
        row = self.prompts.prepare(sample.key, put_image_first(sample))
        tokenizer = self.prompts.processor.tokenizer
        following = [*row["ids"][1:], tokenizer.eos_token_id]
        of_image = [*row["slots"][1:], False]
        row["labels"] = [
            IGNORED if inside or token == tokenizer.end_of_image_token_id else token
            for token, inside in zip(following, of_image, strict=True)
        ]
        return row

    def __call__(self, rows: Sequence[Row]) -> Batch:
        batch = self.prompts.pad(rows)
        batch["labels"] = torch.full(batch["input_ids"].shape, IGNORED)
        for number, row in enumerate(rows):
            batch["labels"][number, : len(row["labels"])] = torch.tensor(row["labels"])
        return batch


class AlignCollate:
    """Stage 2, captions alone: for our encoder and for the text encoder it is aligned to.

    Args:
        processor: a `KosmosGProcessor`.
        target_tokenizer: tokenizer of the target text encoder. Captions that it would have to cut are left out, as in
            the official loader: the two encoders would read different texts.
        max_text_tokens: the same for our own tokens; 85 as in the official loader.

    The batch: `input_ids` (B, L) int64, `attention_mask` (B, L) bool, and `clip_input_ids` (B, 77) int64, padded to the
    target's full length.
    """

    prompts: _Prompts

    target_tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        processor: KosmosGProcessor,
        target_tokenizer: PreTrainedTokenizerBase,
        *,
        max_text_tokens: int | None = 85,
    ):
        self.prompts = _Prompts(processor, max_text_tokens)
        self.target_tokenizer = target_tokenizer

    def prepare(self, sample: Sample, generator: torch.Generator) -> Row:
        if not (sample.caption or "").strip():
            raise BadSample("caption", f"{sample.key} has no caption for the alignment stage to learn from")
        row = self.prompts.prepare(sample.key, (sample.caption,))
        most = self.target_tokenizer.model_max_length
        # the length is looked at here: a warning of transformers for each long caption would flood the log
        options = {"padding": "max_length", "max_length": most, "truncation": False, "verbose": False}
        row["clip_input_ids"] = ids = self.target_tokenizer(sample.caption, **options)["input_ids"]
        if len(ids) > most:
            message = f"{sample.key} has {len(ids)} tokens for the target text encoder, which reads {most}"
            raise FilteredSample("length", message)
        return row

    def __call__(self, rows: Sequence[Row]) -> Batch:
        batch = self.prompts.pad(rows)
        batch["clip_input_ids"] = torch.tensor([row["clip_input_ids"] for row in rows])
        return batch


class InstructCollate:
    """Stage 3: prompts of words and images, and the image to draw with its noise.

    Args:
        processor: a `KosmosGProcessor`.
        resolution: side of the images to draw (H), in pixels.
        num_train_timesteps: of the noise scheduler; timesteps are drawn evenly from [0, num_train_timesteps).
        latent_channels, vae_scale_factor: of the VAE; h = H / vae_scale_factor.
        condition_dropout: probability that a sample trains without its prompt, for classifier-free guidance.
        max_text_tokens: samples with more tokens of text are left out; 128 as in the official loader.
        resize: bring targets to H x H as the official code does (shorter side, bilinear, then the centre). False takes
            them as they are and refuses any other size, for images that resampling would blur.

    The batch: `input_ids` (B, L) int64, `attention_mask` (B, L) bool, with images `image_token_mask` (B, L) bool and
    `pixel_values` (N, 3, S, S) float32; `target_pixel_values` (B, 3, H, H) float32 in [-1, 1]; `latent_noise` and
    `noise` (B, latent_channels, h, h) float32, for the VAE's sample and for the diffusion; `timesteps` (B,) int64;
    `drop_condition` (B,) bool.
    """

    prompts: _Prompts

    resolution: int
    resize: bool
    num_train_timesteps: int
    condition_dropout: float
    latent_shape: tuple[int, int, int]

    def __init__(
        self,
        processor: KosmosGProcessor,
        resolution: int = 512,
        *,
        num_train_timesteps: int = 1000,
        latent_channels: int = 4,
        vae_scale_factor: int = 8,
        condition_dropout: float = 0.1,
        max_text_tokens: int | None = 128,
        resize: bool = True,
    ):
        self.prompts = _Prompts(processor, max_text_tokens)
        if resolution < 1 or resolution % vae_scale_factor:
            raise ValueError(
                f"resolution={resolution} was given. Expected a multiple of the VAE's factor, {vae_scale_factor}."
            )
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout={condition_dropout} is not a probability, 0 to 1.")
        self.resolution, self.resize = resolution, resize
        self.num_train_timesteps, self.condition_dropout = num_train_timesteps, condition_dropout
        side = resolution // vae_scale_factor
        self.latent_shape = (latent_channels, side, side)

    def prepare(self, sample: Sample, generator: torch.Generator) -> Row:
        if sample.target is None:
            raise BadSample("target", f"{sample.key} has no image to draw for the instruction stage")
        row = self.prompts.prepare(sample.key, sample.prompt)
        row["target_pixel_values"] = self._prepare_target(sample)
        row["latent_noise"] = torch.randn(self.latent_shape, generator=generator)
        row["noise"] = torch.randn(self.latent_shape, generator=generator)
        row["timesteps"] = torch.randint(self.num_train_timesteps, (), generator=generator)
        row["drop_condition"] = torch.rand((), generator=generator) < self.condition_dropout
        return row

    def __call__(self, rows: Sequence[Row]) -> Batch:
        batch = self.prompts.pad(rows)
        for name in ("target_pixel_values", "latent_noise", "noise", "timesteps", "drop_condition"):
            batch[name] = torch.stack([row[name] for row in rows])
        return batch

    def _prepare_target(self, sample):
        if not self.resize and sample.target.size != (self.resolution, self.resolution):
            raise ValueError(
                f"The target of {sample.key} is {sample.target.width} x {sample.target.height} pixels, but every target "
                f"must be {self.resolution} x {self.resolution} when they are not resized. Make them one size, or set "
                "resize=True."
            )
        _check_aspect(sample.target, sample.key)
        return preprocess_target(sample.target, self.resolution)


def preprocess_target(image: PIL.Image.Image, resolution: int) -> torch.Tensor:
    """An RGB PIL image -> (3, H, H) float32 tensor in [-1, 1]: shorter side to H (bilinear, on the PIL image), centre crop.

    The numbers of torchvision's `Resize` and `CenterCrop` in the official loaders (openimage_loader.py:47-51).
    """
    image = crop_to_square(image, resolution, PIL.Image.Resampling.BILINEAR)
    pixels = (np.array(image).transpose(2, 0, 1) / 255.0 - 0.5) / 0.5  # in float64, as there
    return torch.from_numpy(pixels.astype(np.float32))


def _check_aspect(image, key):
    """A strip, its shorter side brought to the model's size, could be as large as a decompression bomb."""
    if max(image.size) > MOST_ASPECT * min(image.size):
        size = f"{image.width} x {image.height}"
        raise BadSample("image", f"{key} has an image of {size} pixels, too narrow to crop a square from")
