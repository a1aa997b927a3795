"""Answers in words: the multimodal language model alone, reading a prompt of words and pictures and going on with it."""

import torch

from .modeling_kosmos_g import KosmosGTextEncoder
from .processing_kosmos_g import KosmosGProcessor, KosmosGTokenizer
from .tiny import build_tiny_pipeline

CAPTION_PROMPT = "An image of"  # what the paper of Kosmos-1 asks for captions with
MAX_NEW_TOKENS = 64


class Answerer:
    """Continues prompts of words and pictures, and says how likely a continuation is.

    Prompts are read one at a time: transformers' Kosmos-2 counts padding among the positions of what it generates, so
    that an answer would depend on how long the other prompts of its batch are.

    Args:
        text_encoder: a `KosmosGTextEncoder`. Its weights are used, not copied.
        tokenizer: its `KosmosGTokenizer`.
    """

    def __init__(self, text_encoder, tokenizer):
        self.model = text_encoder.to_causal_lm()
        self.tokenizer, self.processor = tokenizer, KosmosGProcessor(tokenizer)
        # nothing stands behind a picture that the model would name: its slots would be empty
        self.forbidden = [tokenizer.image_token_id, tokenizer.end_of_image_token_id]

    @torch.no_grad()
    def __call__(self, prompt, images=None, *, max_new_tokens=MAX_NEW_TOKENS, **options):
        """Continue one prompt until the model ends it.

        Args:
            prompt: of any form that `KosmosGProcessor` reads; a string has a `<i>` for each of `images`.
            images: the pictures of its `<i>` marks.
            max_new_tokens: longest answer.
            options: of transformers' `generate`, such as num_beams, do_sample, temperature; greedy without.

        Returns:
            The answer alone, as a string.

        Raises:
            ValueError: more than one prompt, an image word, a prompt that leaves no room for the answer; see also
                `KosmosGProcessor`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
        inputs = self._read(prompt, images, max_new_tokens)
        options = {"do_sample": False, "suppress_tokens": self.forbidden, **options}
        # that of the whole model insists on a picture
        generate = self.model.generate if "pixel_values" in inputs else self.model.text_model.generate
        ids = generate(**inputs, max_new_tokens=max_new_tokens, **options)
        answer = ids[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    @torch.no_grad()
    def loss(self, prompt, answer):
        """How unlikely an answer is.

        Args:
            prompt: chat content, a list of `{"type": "text", ...}` and `{"type": "image", ...}`.
            answer: a string, with a token at least.

        Returns:
            (mean negative log-likelihood of the answer's tokens, whether the model would choose each of them).

        Raises:
            ValueError: as a call, or an empty answer.
        """
        n_answer = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        if not n_answer:
            raise ValueError(f"The answer {answer!r} has no tokens. Pass some text.")
        # a stretch of its own, so that it is cut into tokens as it would be alone
        inputs = self._read([*prompt, {"type": "text", "text": answer}], None, 0)
        model = self.model if "pixel_values" in inputs else self.model.text_model
        logits = model(**inputs, use_cache=False, logits_to_keep=n_answer + 1).logits[0, :-1].float()
        targets = inputs["input_ids"][0, -n_answer:]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return float(loss), bool((logits.argmax(-1) == targets).all())

    def _read(self, prompt, images, n_answer):
        """What the model takes for one prompt."""
        batch = self.processor(prompt, images)
        input_ids, config = batch["input_ids"], self.model.config.text_config
        if len(input_ids) != 1:
            raise ValueError(f"{len(input_ids)} prompts were given. Pass one at a time.")
        if input_ids.max() >= config.vocab_size:
            raise ValueError("Image words cannot be asked about. Pass the picture itself, with a '<i>' mark.")
        length, longest = input_ids.shape[1], config.max_position_embeddings
        if length + n_answer > longest:
            raise ValueError(
                f"The prompt has {length} tokens and its answer up to {n_answer}; the model reads at most {longest} in all. "
                "Shorten the prompt, or ask for a shorter answer."
            )
        device, dtype = self.model.device, self.model.dtype
        inputs = {"input_ids": input_ids.to(device), "attention_mask": batch["attention_mask"].to(device)}
        if "pixel_values" in batch:
            inputs["pixel_values"] = batch["pixel_values"].to(device, dtype)
            inputs["image_embeds_position_mask"] = batch["image_token_mask"].to(device)
        return inputs


def load_answerer(model, dtype, device):
    """The two parts of a saved pipeline that read; neither U-Net nor VAE is touched.

    Args:
        model: folder or Hub id; None takes the small random model.
        dtype: torch dtype of the weights.
        device: where they go.

    Raises:
        OSError: the model cannot be loaded.
    """
    if model is None:
        pipe = build_tiny_pipeline()
        return Answerer(pipe.text_encoder.to(device, dtype), pipe.tokenizer)
    # Kosmos-G folders never hold pickle files; refuse to load any
    text_encoder = KosmosGTextEncoder.from_pretrained(
        model, subfolder="text_encoder", dtype=dtype, use_safetensors=True
    )
    tokenizer = KosmosGTokenizer.from_pretrained(model, subfolder="tokenizer")
    return Answerer(text_encoder.to(device).eval(), tokenizer)
