"""Answers in words: the multimodal language model alone, reading a prompt of words and images and continuing it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Kosmos2ForConditionalGeneration

    from .modeling_kosmos_g import KosmosGTextEncoder
    from .processing_kosmos_g import ImageLike, KosmosGProcessor, KosmosGTokenizer, PromptLike

MAX_NEW_TOKENS = 64


class Answerer:
    """Continues prompts of words and images.

    Prompts are read one at a time: transformers' Kosmos-2 counts padding among the positions of what it generates, so
    that an answer would depend on how long the other prompts of its batch are.

    Args:
        text_encoder: a `KosmosGTextEncoder`. Its weights are used, not copied.
        tokenizer: its `KosmosGTokenizer`.
    """

    model: "Kosmos2ForConditionalGeneration"
    tokenizer: "KosmosGTokenizer"
    processor: "KosmosGProcessor"
    forbidden: list[int]

    def __init__(self, text_encoder: "KosmosGTextEncoder", tokenizer: "KosmosGTokenizer"):
        from .processing_kosmos_g import KosmosGProcessor

        self.model = text_encoder.to_causal_lm()
        self.tokenizer, self.processor = tokenizer, KosmosGProcessor(tokenizer)
        # nothing stands behind an image that the model would name: its slots would be empty
        self.forbidden = [tokenizer.image_token_id, tokenizer.end_of_image_token_id]

    def __call__(
        self,
        prompt: "PromptLike",
        images: "Sequence[ImageLike] | None" = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **options: Any,
    ) -> str:
        """Continue one prompt until the model ends it.

        Args:
            prompt: of any form that `KosmosGProcessor` reads; a string has a `<i>` for each of `images`.
            images: the images of its `<i>` marks.
            max_new_tokens: longest answer; it ends before where the model's positions do.
            options: of transformers' `generate`, such as num_beams, do_sample, temperature; greedy without.

        Returns:
            The answer alone, as a string.

        Raises:
            ValueError: more than one prompt, an image word, a prompt that leaves no room for the answer; see also
                `KosmosGProcessor`.
        """
        import torch

        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
        inputs = self._read(prompt, images)
        length, longest = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if length >= longest:
            room = f"the model reads at most {longest}: there is no room for an answer"
            raise ValueError(f"The prompt has {length} tokens, and {room}. Shorten it.")
        options = {"do_sample": False, "suppress_tokens": self.forbidden, **options}
        # that of the whole model insists on an image
        generate = self.model.generate if "pixel_values" in inputs else self.model.text_model.generate
        with torch.no_grad():
            ids = generate(**inputs, max_new_tokens=min(max_new_tokens, longest - length), **options)
        return self.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()

    def _read(self, prompt, images):
        """What the model takes for one prompt."""
        batch = self.processor(prompt, images)
        input_ids = batch["input_ids"]
        if len(input_ids) != 1:
            raise ValueError(f"{len(input_ids)} prompts were given. Pass one at a time.")
        if input_ids.max() >= self.model.config.text_config.vocab_size:
            raise ValueError("Image words cannot be asked about. Pass the image itself, with a '<i>' mark.")
        device, dtype = self.model.device, self.model.dtype
        inputs = {"input_ids": input_ids.to(device), "attention_mask": batch["attention_mask"].to(device)}
        if "pixel_values" in batch:
            inputs["pixel_values"] = batch["pixel_values"].to(device, dtype)
            inputs["image_embeds_position_mask"] = batch["image_token_mask"].to(device)
        return inputs


def load_answerer(model: str | Path, dtype: "torch.dtype", device: "str | torch.device") -> Answerer:
    """The two parts of a saved pipeline that read; neither U-Net nor VAE is touched.

    Args:
        model: folder or Hub id.
        dtype: torch dtype of the weights.
        device: where they go.

    Raises:
        OSError: the model cannot be loaded.
    """
    text_encoder, tokenizer = load_reader(model, dtype)
    return Answerer(text_encoder.to(device), tokenizer)


def load_reader(model: str | Path, dtype: "torch.dtype") -> "tuple[KosmosGTextEncoder, KosmosGTokenizer]":
    """Text encoder, on the CPU in evaluation mode, and tokenizer of a saved pipeline; raises as `load_answerer`."""
    from .loading import load_pretrained
    from .modeling_kosmos_g import KosmosGTextEncoder
    from .processing_kosmos_g import KosmosGTokenizer

    try:
        # Kosmos-G folders never hold pickle files; refuse to load any
        options = {"subfolder": "text_encoder", "dtype": dtype, "use_safetensors": True}
        text_encoder = load_pretrained(KosmosGTextEncoder, model, **options)
        tokenizer = KosmosGTokenizer.from_pretrained(model, subfolder="tokenizer")
    except OSError as error:
        raise OSError(
            f"The model {str(model)!r} cannot be loaded ({error}). Pass the folder that kosmos-g convert has written, or a Hub id "
            "that can be fetched."
        ) from error
    return text_encoder.eval(), tokenizer


def as_text(text: str) -> str:
    """A string in which nothing is a mark or an image word, for text from elsewhere.

    Its brackets become full-width ones, which no mark has; the tokenizer's Unicode rules make them plain again.
    """
    return text.replace("<", "＜").replace(">", "＞")
