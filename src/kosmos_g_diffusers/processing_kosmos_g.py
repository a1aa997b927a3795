"""Prompts of words and images -> token ids, masks and pixels (sec. 2.1 of the Kosmos-G paper, "image as a foreign language").

Letters of the shapes: B prompts in the batch, L tokens of the longest prompt, N images of the whole batch,
Q latent queries an image (64), S image size (224). Images are RGB.

This file is copied into saved model folders and stands alone: it needs transformers, torch, Pillow and requests only.
"""

import base64
import io
import json
import re
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin

import numpy as np
import PIL.ExifTags
import PIL.Image
import requests
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram, WordLevel
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.utils import logging

# what `open_image` takes; what a prompt is made of, chat content included; a prompt, or a batch of prompts
ImageLike = PIL.Image.Image | np.ndarray | torch.Tensor | str | Path
PromptPart = ImageLike | Mapping[str, Any]
PromptLike = str | Sequence[PromptPart]
PromptsLike = PromptLike | Sequence[PromptLike]
# the images of a prompt, or of each of a batch
ImagesLike = Sequence[ImageLike] | Sequence[Sequence[ImageLike] | None]

logger = logging.get_logger(__name__)

IMAGE_MARK = "<i>"
CAPTION_PROMPT = "An image of"  # what the paper of Kosmos-1 asks for captions with
# What CLIP ViT-L/14 was trained with; app_model.py:54-56 of the official code.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# Ids 0 to 3. A user may type "<s>", and that is text: so the entries are spelled with full-width brackets, which
# the normaliser (NFKC) turns into plain ones before the vocabulary is looked up. They can therefore never match.
BEGIN, PAD, END, UNKNOWN = SPECIAL_PIECES = ("＜s＞", "＜pad＞", "＜/s＞", "＜unk＞")
# Behind the text pieces, in the order of unilm/tasks/gpt_base.py:155-164. Never matched in text either.
EXTRA_SPECIAL_TOKENS = ("<mask>", "</doc>", "<image>", "</image>", "</chunk>", "</line>")

# Two ways to split a text can score the same where pieces repeat in another order: "xyxyx" is x+y+xyx and xyx+y+x. Other ties
# need different pieces of equal sums: seen in small vocabularies only, whose scores are those of a few counts.
PERIOD = re.compile(r"((.).{0,15}?)\1\2", re.DOTALL)
SMALL_VOCABULARY = 8192

IMAGE_WORD_PATTERN: re.Pattern[str] = re.compile(r"<[a-z][a-z0-9-]*>")
# what people write for an image word: other letters, spaces, weights, full-width or escaped brackets
BRACKETED = re.compile(r"(?:<|＜|&lt;)([^<>＜＞&\n]{1,64})(?:>|＞|&gt;)")
SURROGATE = re.compile("[\ud800-\udfff]")
OTHER_SYNTAX = frozenset({"lora", "lyco", "hypernet", "embedding", "segment"})
# What an image may be given as, beside PIL images, arrays and tensors
SOURCES = (str, Path, bytes, bytearray, memoryview)
MOST_IMAGE_BYTES = 64 * 1024**2  # of a file that is fetched, or written as base64
MOST_REDIRECTS = 5
DOWNLOAD_SECONDS = 60  # a file in all
SILENT_SECONDS = 10  # without a byte of it
MOST_PROFILE_BYTES = 4 * 1024**2  # of an image's colour profile
SAME_LEVELS = 2  # of 255: a profile that changes no colour by more is sRGB's
# mode of an image -> that of the colours which its profile describes
PROFILED_MODES = {
    **dict.fromkeys(("RGB", "RGBA", "RGBa", "RGBX", "P", "PA"), "RGB"),
    **dict.fromkeys(("L", "LA", "La"), "L"),
    "CMYK": "CMYK",
}
HELD_AS_XMP = ("xmp", "XML:com.adobe.xmp")
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes it upright
RESERVED_WORDS = frozenset({IMAGE_MARK, "<s>", "<pad>", "<unk>", "<mask>", "<image>"})

# What a small model may say of what it was trained on, in its tokenizer's settings
WORLD: dict[str, Any] = {"words": list, "most_images": int, "plain_background": bool, "ignores_case": bool}
MOST_WORDS = 8  # unknown ones that a warning names
BORDER = 2  # pixels at each side of an image: they tell its background
SAME_COLOUR = (
    50.0  # distance in RGB up to which a pixel is the background; that of a scanned drawing varies as well
)
PLAIN = 0.8  # share of such pixels in the border of a plain background


def _normalizer(unicode_rules):
    """Unicode rules, then single spaces and none outside, as SentencePiece's `remove_extra_whitespaces`."""
    return normalizers.Sequence(
        [*unicode_rules, normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    )


class KosmosGTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer with the ids of Kosmos-G: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the text pieces, six more specials.

    It adds `<s>` in front and nothing behind, as the official prompts do. Names of special tokens in a text are text.
    Beside the usual members it knows two sizes of the model it belongs to, `image_size` and `latent_query_num`; the *image
    words*: tokens such as `<my-dog>` with ids at or above the model's vocabulary; and of a small model its `world`.
    """

    model_input_names: list[str] = ["input_ids", "attention_mask"]

    @classmethod
    def from_sentencepiece(
        cls,
        path: str | Path,
        *,
        image_size: int = 224,
        latent_query_num: int = 64,
        model_max_length: int = 2048,
    ) -> "KosmosGTokenizer":
        """Build from the official `sentencepiece.bpe.model` (despite its name a unigram model).

        Args:
            path: the SentencePiece file. Reading it needs the packages sentencepiece and protobuf (extra `convert`).
            image_size: side of the images the vision tower reads, in pixels.
            latent_query_num: states an image takes in the prompt.
            model_max_length: longest prompt of the language model, in tokens.

        Raises:
            ValueError: the file is missing or is not a SentencePiece unigram model.
            ImportError: sentencepiece or protobuf is not installed.
        """
        try:
            from google.protobuf.message import DecodeError
            from sentencepiece import sentencepiece_model_pb2
        except ImportError as error:
            raise ImportError(
                "Reading a SentencePiece file needs the packages sentencepiece and protobuf: "
                "pip install 'kosmos-g-diffusers[convert]'"
            ) from error
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"There is no tokenizer file at {path}. Pass the path of the official sentencepiece.bpe.model."
            )
        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(path.read_bytes())
        except DecodeError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model ({path.stat().st_size:,} bytes that do not parse). "
                "Pass the official sentencepiece.bpe.model."
            ) from error
        if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM or len(model.pieces) < 4:
            raise ValueError(
                f"{path} holds {len(model.pieces)} pieces of a SentencePiece model that is not a unigram model. "
                "Pass the official sentencepiece.bpe.model, which is one despite its name."
            )
        pieces = [(piece.piece, piece.score) for piece in model.pieces if piece.type == piece.NORMAL]
        charsmap = model.normalizer_spec.precompiled_charsmap
        rules = [normalizers.Precompiled(charsmap)] if charsmap else [normalizers.NFKC()]
        return cls._build(pieces, rules, image_size, latent_query_num, model_max_length)

    @classmethod
    def from_vocabulary(
        cls,
        pieces: Iterable[tuple[str, float]],
        *,
        charsmap: bytes | None = None,
        image_size: int = 224,
        latent_query_num: int = 64,
        model_max_length: int = 2048,
        world: dict[str, Any] | None = None,
        lowercase: bool = False,
    ) -> "KosmosGTokenizer":
        """Build a small tokenizer from unigram pieces of one's own, for instance for a model trained on few captions.

        Args:
            pieces: list of (piece, log-probability); `▁` stands for the space before a word.
            charsmap: bytes of a SentencePiece normalisation table; None takes NFKC.
            image_size, latent_query_num, model_max_length: as in `from_sentencepiece`.
            world: what the model is trained on, see the property; the pipelines warn of all else.
            lowercase: whether capitals are read as small letters, as Stable Diffusion's own text encoder does.
        """
        rules = [normalizers.Precompiled(charsmap)] if charsmap else [normalizers.Nmt(), normalizers.NFKC()]
        if lowercase:
            rules.append(normalizers.Lowercase())
        tokenizer = cls._build(list(pieces), rules, image_size, latent_query_num, model_max_length)
        if world is not None:  # saved with the other settings
            tokenizer.init_kwargs["world"] = world
            tokenizer.world  # noqa: B018  # checked
        return tokenizer

    @classmethod
    def _build(cls, pieces, unicode_rules, image_size, latent_query_num, model_max_length):
        vocabulary = [(piece, 0.0) for piece in SPECIAL_PIECES] + pieces
        backend = Tokenizer(Unigram(vocabulary, unk_id=SPECIAL_PIECES.index(UNKNOWN), byte_fallback=False))
        backend.normalizer = _normalizer(unicode_rules)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, SPECIAL_PIECES.index(BEGIN))]
        )
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in EXTRA_SPECIAL_TOKENS])
        return cls(
            tokenizer_object=backend,
            bos_token=BEGIN,
            pad_token=PAD,
            eos_token=END,
            unk_token=UNKNOWN,
            extra_special_tokens=list(EXTRA_SPECIAL_TOKENS),
            split_special_tokens=True,  # a "<image>" that a user types is text
            clean_up_tokenization_spaces=False,
            model_max_length=model_max_length,
            image_size=image_size,
            latent_query_num=latent_query_num,
        )

    @property
    def image_size(self) -> int:
        return self.init_kwargs["image_size"]

    @property
    def latent_query_num(self) -> int:
        return self.init_kwargs["latent_query_num"]

    @property
    def world(self) -> dict[str, Any] | None:
        """What a small model was trained on; None for one that does not say, such as the released Kosmos-G.

        `words`, a list: all others mean nothing to it, capitals count unless `ignores_case`; `most_images` in a prompt;
        `plain_background`: whether all its images have a background of one colour. What is left out is not limited.
        """
        world = self.init_kwargs.get("world")
        if world is None:
            return None
        if (
            not isinstance(world, dict)
            or not all(isinstance(world[name], kind) for name, kind in WORLD.items() if name in world)
            or not all(isinstance(word, str) for word in world.get("words", ()))
        ):
            kinds = ", ".join(f"{name} ({kind.__name__})" for name, kind in WORLD.items())
            raise ValueError(
                f"The tokenizer's `world` is {str(world)[:80]!r}. Expected {kinds}: correct tokenizer_config.json, or take "
                "`world` out of it."
            )
        return world

    @property
    def image_token_id(self) -> int:
        """Id of `<image>`: begin of image, and the placeholder of the image's states."""
        return self.convert_tokens_to_ids("<image>")

    @property
    def end_of_image_token_id(self) -> int:
        return self.convert_tokens_to_ids("</image>")

    def _convert_token_to_id_with_added_voc(self, token):
        # The names people know, "<s>" for the entry "＜s＞"; no text piece can be called so.
        if token in ("<s>", "<pad>", "</s>", "<unk>"):
            token = token.replace("<", "＜").replace(">", "＞")
        return super()._convert_token_to_id_with_added_voc(token)

    def _encode_plus(self, text, text_pair=None, **kwargs):
        for one in [text] if isinstance(text, str) else text:
            near = None
            if isinstance(one, str):
                check_text(one, "A text")
                near = self.near_image_word(one)
            if near is not None:
                logger.warning_once(
                    f"{near[0]!r} is near the image word {near[1]} and is read as text. Write {near[1]} for the image."
                )
        words = self._split_ties(text, text_pair, kwargs)
        if words is None:
            encoded = super()._encode_plus(text, text_pair, **kwargs)
        else:
            encoded = self._encode_words(words, **kwargs)
        if any(encoding.overflowing for encoding in encoded.encodings or ()):
            self._warn_of_truncation(text, encoded, kwargs.get("add_special_tokens", True))
        return encoded

    def _split_ties(self, text, text_pair, kwargs):
        """Text, or list of texts -> its pieces as SentencePiece takes them; None where the backend takes the same ones."""
        texts = [text] if isinstance(text, str) else text
        if text_pair or not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            return None
        # offsets exist for the backend's pieces alone
        if kwargs.get("is_split_into_words") or kwargs.get("return_offsets_mapping"):
            return None
        if kwargs.get("split_special_tokens") is False:
            return None
        words = [list(self._split_at_image_words(one)) for one in texts]
        others = {}
        for part in {part for one in words for part in one if part.startswith("▁")}:
            if self.vocab_size <= SMALL_VOCABULARY or PERIOD.search(part):
                pieces = self._unigram.split(part)
                if pieces != [token.value for token in self._tokenizer.model.tokenize(part)]:
                    others[part] = pieces
        if not others:
            return None

        def split(part):
            if not part.startswith("▁"):
                return [part]
            return others.get(part) or [token.value for token in self._tokenizer.model.tokenize(part)]

        words = [[piece for part in one for piece in split(part)] for one in words]
        return words[0] if isinstance(text, str) else words

    def _split_at_image_words(self, text):
        """Yield the image words of a text, and what stands between them as the unigram model is given it."""
        names = "|".join(sorted(map(re.escape, self.image_words), key=len, reverse=True))
        for part in re.split(f"({names})", text) if names else [text]:
            if names and re.fullmatch(names, part):
                yield part
            else:
                part = self._tokenizer.normalizer.normalize_str(part)
                yield from (piece for piece, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(part))

    @property
    def _unigram(self):
        if getattr(self, "_own_unigram", None) is None:
            self._own_unigram = FloatUnigram(json.loads(self._tokenizer.to_str())["model"]["vocab"])
        return self._own_unigram

    def _encode_words(self, words, **kwargs):
        """As `_encode_plus`, of texts that are split into pieces and image words already."""
        pieces = {piece for one in words for piece in ([one] if isinstance(one, str) else one)}
        vocabulary = {piece: self.convert_tokens_to_ids(piece) for piece in {*pieces, *SPECIAL_PIECES}}
        whole = copy(self)
        whole._tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
        whole._tokenizer.post_processor = self._tokenizer.post_processor
        return super(KosmosGTokenizer, whole)._encode_plus(words, **{**kwargs, "is_split_into_words": True})

    def _warn_of_truncation(self, text, encoded, add_special_tokens):
        texts = text if isinstance(text, (list, tuple)) else [text]
        for index, (one, encoding) in enumerate(zip(texts, encoded.encodings, strict=True)):
            if encoding.overflowing:
                length = len(super()._encode_plus(one, add_special_tokens=add_special_tokens)["input_ids"])
                logger.warning(
                    f"Text {index} is {length} tokens long and was cut to {len(encoding.ids)}. Shorten it, or give "
                    "it to a Kosmos-G pipeline, which reads negative prompts of any length."
                )

    # Image words -----------------------------------------------------------------------------------------------

    @property
    def image_words(self) -> list[str]:
        """Names of the image words, in the order of their ids."""
        return [token.content for _, token in sorted(self.added_tokens_decoder.items()) if not token.special]

    def near_image_word(self, text: str) -> tuple[str, str] | None:
        """(what is written, the image word that is meant) of the first near miss of a known word in a text, or None.

        Near are `<Dog>`, `< dog >`, `<dog_2>`, `<my dog>`, `<dog:1.2>` and `<dogs>` where `<dog>` is known. All of them would
        be read as text.
        """
        words = self.image_words if BRACKETED.search(text) else ()
        known = {word: re.findall("[a-z0-9]+", word) for word in words}
        for match in BRACKETED.finditer(text):
            written, parts = match[0], re.findall("[^\\W_]+", match[1].casefold())
            # "<lora:dog:1>" is another program's way to load a file
            if written in known or written in RESERVED_WORDS or not parts or parts[0] in OTHER_SYNTAX:
                continue
            for word, of_word in known.items():
                if _is_near(parts, of_word):
                    return written, word
        return None

    def add_image_word(self, word: str) -> None:
        """Make `word` one token, with the next free id at or above the model's vocabulary. Raises ValueError."""
        self.add_image_words([word])

    def add_image_words(self, words: Iterable[str]) -> None:
        """As `add_image_word` for many, in this order: all of them, or none when one is refused."""
        known = set(self.image_words)
        for word in words:
            check_image_word(word, known)
            known.add(word)
        self.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])

    def remove_image_word(self, word: str) -> None:
        """Forget `word`; the words behind it move up by one id. Raises ValueError if there is no such word."""
        words = self.image_words
        if word not in words:
            known = ", ".join(words) or "none"
            raise ValueError(f"There is no image word {word!r} to remove. Known: {known}.")
        # tokenizers can add tokens but not remove any: build the backend again without it
        backend = Tokenizer(self._tokenizer.model)
        for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
            setattr(backend, part, getattr(self._tokenizer, part))
        kept = [token for _, token in sorted(self.added_tokens_decoder.items()) if token.content != word]
        backend.add_tokens(
            [AddedToken(token.content, special=token.special, normalized=False) for token in kept]
        )
        self._tokenizer = backend


class FloatUnigram:
    """The best path through a text as SentencePiece finds it (unigram_model.cc, `EncodeOptimized`).

    Sums of scores are float32 there and float64 in tokenizers: where two paths score the same, as "!!" + "!!!!" and "!!!!" +
    "!!" do, rounding decides which is taken.

    Args:
        vocabulary: list of (piece, score), the special pieces first.
    """

    scores: dict[str, np.float32]
    unknown: np.float32
    longest: int

    def __init__(self, vocabulary: Sequence[Sequence[Any]]):
        pieces, scores = zip(*vocabulary[len(SPECIAL_PIECES) :], strict=True)
        scores = np.array(scores, dtype=np.float32)
        self.scores = dict(zip(pieces, scores, strict=True))
        self.unknown = scores.min() - np.float32(10)  # kUnkPenalty
        self.longest = max(map(len, pieces))

    def split(self, text: str) -> list[str]:
        """A text without spaces, "▁" in their place -> list of pieces; unknown letters in a row are one piece."""
        best, begins, known = [None] * (len(text) + 1), [0] * (len(text) + 1), [True] * (len(text) + 1)
        best[0] = np.float32(0)
        for begin in range(len(text)):
            for end in range(begin + 1, min(begin + self.longest, len(text)) + 1):
                score = self.scores.get(text[begin:end])
                is_known = score is not None
                if not is_known and end == begin + 1:
                    score = self.unknown
                if score is not None and (best[end] is None or best[begin] + score > best[end]):
                    best[end], begins[end], known[end] = best[begin] + score, begin, is_known
        pieces, end, after = [], len(text), True
        while end:
            piece = text[begins[end] : end]
            if known[end] or after:
                pieces.append(piece)
            else:
                pieces[-1] = piece + pieces[-1]
            end, after = begins[end], known[end]
        return pieces[::-1]


# save_pretrained puts a copy of this file into the folder
KosmosGTokenizer.register_for_auto_class("AutoTokenizer")


def check_text(text: str, name: str) -> None:
    """Raise a ValueError for a text with half a character, which no file and no tokenizer can hold."""
    if not text.isascii() and (found := SURROGATE.search(text)):
        raise ValueError(
            f"{name} has the lone surrogate {ascii(found[0])} at position {found.start()}: half a character, as in a text that "
            "was cut in two or read with a wrong encoding. Leave it out."
        )


def check_image_word(word: str, known_words: Iterable[str]) -> None:
    """Raise a ValueError unless `word` is a well-formed name that is still free."""
    if not isinstance(word, str) or not IMAGE_WORD_PATTERN.fullmatch(word) or word in RESERVED_WORDS:
        raise ValueError(
            f"{_cut(repr(word))} cannot name an image word. A name is lower-case letters, digits and hyphens in angle brackets, "
            f"such as '<my-dog>', and none of {', '.join(sorted(RESERVED_WORDS))}."
        )
    if word in known_words:
        raise ValueError(f"There is an image word {word!r} already. Remove it first, or take another name.")


def _is_near(parts, of_word):
    """Whether letters in brackets, in runs of letters and digits, are what a known word was meant to be."""
    written, known = "".join(parts), "".join(of_word)
    shorter, longer = sorted((parts, of_word), key=len)
    starts = range(len(longer) - len(shorter) + 1)
    is_part = any(longer[start : start + len(shorter)] == shorter for start in starts)
    # "<a>" is hardly "<a-white-cat>"
    if is_part and 2 * len("".join(shorter)) >= len(known):
        return True
    return SequenceMatcher(None, written, known, autojunk=False).ratio() >= 0.8


class Prompt(list[str | PIL.Image.Image]):
    """One prompt in reading order: strings (text, never a path) and RGB PIL images. Made by `KosmosGProcessor.parse`."""


class PromptBatch(list[Prompt]):
    """A list of `Prompt`, all of them checked by `KosmosGProcessor.parse`.

    Attributes:
        notes: phrases that a warning about these prompts is to say as well.
    """

    notes: Sequence[str]

    def __init__(self, prompts: Iterable[Prompt] = (), notes: Sequence[str] = ()):
        super().__init__(prompts)
        self.notes = notes


def outside_world(
    world: Mapping[str, Any], prompts: Iterable[Prompt], pixel_values: torch.Tensor | None = None
) -> list[str]:
    """What of some prompts a small model was not trained on.

    Args:
        world: of `KosmosGTokenizer.world`.
        prompts: `Prompt`s.
        pixel_values: (N, 3, S, S) of their images, as `KosmosGProcessor` gives them.

    Returns:
        Phrases of a sentence, such as "the word 'dog'"; [] if there is nothing of the kind.
    """
    notes = []
    if "words" in world:
        text = " ".join(part for prompt in prompts for part in prompt if isinstance(part, str))
        found = dict.fromkeys(re.findall(r"\w+|[^\w\s]", IMAGE_WORD_PATTERN.sub(" ", text)))
        known = set(world["words"])
        fold = str.lower if world.get("ignores_case") else str
        unknown = [repr(word) for word in found if fold(word) not in known]
        if unknown:
            more = f" and {len(unknown) - MOST_WORDS} more" if len(unknown) > MOST_WORDS else ""
            notes.append(f"the word{'s'[: len(unknown) > 1]} {', '.join(unknown[:MOST_WORDS])}{more}")
    most = max((sum(not isinstance(part, str) for part in prompt) for prompt in prompts), default=0)
    if most > world.get("most_images", most):
        notes.append(f"{most} images in a prompt (at most {world['most_images']})")
    if world.get("plain_background") and pixel_values is not None:
        n_photos = int((~_has_plain_background(pixel_values)).sum())
        if n_photos:
            notes.append(
                f"photos, or whatever has a background of more than one colour ({n_photos} of the images)"
            )
    return notes


def _has_plain_background(pixel_values):
    """(N, 3, S, S) normalised pixels -> (N,) bool: nearly all of an image's border is of one colour."""
    pixels = (
        pixel_values.float() * torch.tensor(IMAGE_STD).reshape(3, 1, 1) * 255
    )  # the mean is left: only distances count
    rows = torch.cat([pixels[..., :BORDER, :], pixels[..., -BORDER:, :]], dim=-2).flatten(2)
    columns = torch.cat([pixels[..., :BORDER], pixels[..., -BORDER:]], dim=-1).flatten(2)
    border = torch.cat([rows, columns], dim=-1)  # (N, 3, pixels of the border)
    distance = (border - border.median(dim=-1, keepdim=True).values).norm(dim=1)
    return (distance < SAME_COLOUR).float().mean(dim=-1) >= PLAIN


class KosmosGProcessor:
    """Turns prompts of words and images into what `KosmosGTextEncoder` reads.

    Args:
        tokenizer: a `KosmosGTokenizer`.
        image_size: side of the pixels the vision tower reads; None takes the tokenizer's.
        latent_query_num: states an image takes in the prompt; None takes the tokenizer's.
    """

    tokenizer: KosmosGTokenizer
    image_size: int
    latent_query_num: int

    def __init__(
        self, tokenizer: KosmosGTokenizer, image_size: int | None = None, latent_query_num: int | None = None
    ):
        self.tokenizer = tokenizer
        self.image_size = tokenizer.image_size if image_size is None else image_size
        self.latent_query_num = tokenizer.latent_query_num if latent_query_num is None else latent_query_num

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "KosmosGProcessor":
        """Read the tokenizer of `folder` (a path or Hub id; a pipeline's is in `subfolder="tokenizer"`)."""
        return cls(KosmosGTokenizer.from_pretrained(folder, **kwargs))

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def __call__(
        self,
        prompts: PromptsLike,
        images: ImagesLike | None = None,
        return_tensors: str = "pt",
        marks_are_text: bool = False,
        name: str = "prompt",
    ) -> BatchFeature:
        """Tokenise a batch of prompts and prepare its images.

        The layout of a prompt is `<s>`, then its text and images in reading order; an image is `<image>`, Q
        placeholders and `</image>`. There is no `</s>` (app_model.py:164-197 of the official code).

        Args:
            prompts: one prompt or a list of them. A prompt is a string with a `<i>` for each image, a list of
                strings and images in reading order, chat content (`[{"type": "text", "text": ...},
                {"type": "image", "image": ...}]`), or a chat (`[{"role": "user", "content": ...}]`, whose content is
                chat content or a string). A list of strings alone is a batch.
            images: the images of the `<i>` marks: a list for one prompt, a list of lists for a batch. An image is
                a PIL image of any mode, an array or tensor, a path or a URL.
            return_tensors: "pt", the only kind there is.
            marks_are_text: read a `<i>` as text, as the official code does in negative prompts.
            name: what an error calls a prompt, before its index.

        Returns:
            BatchFeature with `input_ids` (B, L) and `attention_mask` (B, L), int64, padded on the right;
            `image_token_mask` (B, L), bool, True where a state of an image belongs; and, when there are images,
            `pixel_values` (N, 3, S, S), float32, normalised with CLIP's mean and deviation, in reading order.

        Raises:
            ValueError, TypeError: prompts or images that cannot be read, counts that do not match, an unknown
                image word, or a prompt longer than the model reads. The prompt is named by its index.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} was given; only 'pt' (torch) is there.")
        batch = self.parse(prompts, images, marks_are_text=marks_are_text, name=name)
        encoded = [self.encode(prompt, f"{name} {index}") for index, prompt in enumerate(batch)]
        rows, slots, pixels = zip(*encoded, strict=True)
        shape = (len(rows), max(len(row) for row in rows))
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        image_token_mask = torch.zeros(shape, dtype=torch.bool)
        for index, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
            image_token_mask[index, : len(row)] = torch.tensor(slot)
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        data["image_token_mask"] = image_token_mask
        pixels = [image for prompt in pixels for image in prompt]
        if pixels:
            data["pixel_values"] = torch.from_numpy(np.stack(pixels))
        return BatchFeature(data)

    def preprocess(self, image: ImageLike) -> np.ndarray:
        """An image of any accepted kind -> (3, S, S) float32 array, bit for bit as the official preprocessing.

        Shorter side to S (bicubic, on the PIL image), centre crop, [0, 1], CLIP's mean and deviation in float64.
        """
        image = open_image(image, "The image")
        image = crop_to_square(image, self.image_size, PIL.Image.Resampling.BICUBIC)
        pixels = np.array(image).transpose(2, 0, 1) / 255.0
        pixels = (pixels - np.reshape(IMAGE_MEAN, (3, 1, 1))) / np.reshape(IMAGE_STD, (3, 1, 1))
        return pixels.astype(np.float32)

    def encode(
        self, prompt: Sequence[str | PIL.Image.Image], name: str = "prompt"
    ) -> tuple[list[int], list[bool], list[np.ndarray]]:
        """One prompt in reading order, strings and RGB PIL images, without a look for marks and image words.

        Returns:
            (ids, True at the slots of images, (3, S, S) float32 pixels of each image): three lists, the first two of one
            length.

        Raises:
            ValueError: it is longer than the model reads; `name` begins the message.
        """
        tokenizer, slots = self.tokenizer, self.latent_query_num
        image_ids = [tokenizer.image_token_id] * (1 + slots) + [tokenizer.end_of_image_token_id]
        image_mask = [False] + [True] * slots + [False]
        ids, mask, pixels = [tokenizer.bos_token_id], [False], []
        for part in prompt:
            if isinstance(part, str):
                # each stretch of text on its own: the one behind an image gets its own "▁", outer spaces vanish
                text_ids = tokenizer(part, add_special_tokens=False)["input_ids"]
                ids += text_ids
                mask += [False] * len(text_ids)
            else:
                ids += image_ids
                mask += image_mask
                pixels.append(self.preprocess(part))
        if len(ids) > tokenizer.model_max_length:
            raise ValueError(
                f"{name.capitalize()} is {len(ids)} tokens long ({len(pixels)} images take {len(image_ids)} each); the model "
                f"reads at most {tokenizer.model_max_length}. Shorten it: nothing is cut silently."
            )
        return ids, mask, pixels

    # Reading the forms a prompt may have -------------------------------------------------------------------------

    def parse(
        self,
        prompts: PromptsLike,
        images: ImagesLike | None = None,
        marks_are_text: bool = False,
        name: str = "prompt",
    ) -> PromptBatch:
        """Any form of prompt or batch -> list of `Prompt`, checked, its images opened and converted to RGB.

        Takes and raises what `__call__` does. What it returns is a value to be handed on: given to `__call__` or to this
        method again, it is not parsed once more.
        """
        if isinstance(prompts, PromptBatch):
            return prompts
        batch, image_lists = self._as_batch(prompts, images, name)
        parsed = [
            prompt
            if isinstance(prompt, Prompt)
            else self._parse_one(prompt, image_list, f"{name} {index}", marks_are_text)
            for index, (prompt, image_list) in enumerate(zip(batch, image_lists, strict=True))
        ]
        known = set(self.tokenizer.image_words) | RESERVED_WORDS
        for index, prompt in enumerate(parsed):
            text = " ".join(part for part in prompt if isinstance(part, str))
            check_text(text, f"{name} {index}".capitalize())
            near = self.tokenizer.near_image_word(text)
            if near is not None:
                raise ValueError(
                    f"{name.capitalize()} {index} has {near[0]!r}, which is near the image word {near[1]} and would be read as "
                    f"text. Write {near[1]} for the image, or the text without brackets."
                )
            unknown = sorted(set(IMAGE_WORD_PATTERN.findall(text)) - known)
            if unknown:
                words = ", ".join(self.tokenizer.image_words) or "none"
                raise ValueError(
                    f"{name.capitalize()} {index} uses {_cut(', '.join(unknown))}, which names no image word. Known words: {words}. "
                    "Add it with add_image_word(word, image), or write the text without angle brackets."
                )
        return PromptBatch(parsed)

    @staticmethod
    def _as_batch(prompts, images, name):
        """(list of prompts, list of as many image lists or None)."""
        if isinstance(prompts, tuple):
            prompts = list(prompts)
        if isinstance(prompts, (str, Prompt)):
            return [prompts], [_as_image_list(images, f"{name} 0")]
        if not isinstance(prompts, list):
            raise TypeError(
                f"A {name} of type {type(prompts).__name__} was given. Expected a string, a list of strings and images "
                "in reading order, chat content, or a list of these."
            )
        if not prompts:
            raise ValueError(f"An empty list of {name}s was given. Pass at least one {name}; '' is one.")
        if not _is_batch(prompts):
            return [prompts], [_as_image_list(images, f"{name} 0")]
        if images is None:
            return prompts, [None] * len(prompts)
        if not isinstance(images, (list, tuple)) or not all(
            image_list is None or isinstance(image_list, (list, tuple)) for image_list in images
        ):
            raise TypeError(
                f"images must be a list of lists for a batch of {len(prompts)} {name}s, one list (it may be empty) for "
                f"each {name}. A flat list belongs to a single {name}."
            )
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} lists of images were given for {len(prompts)} {name}s. Pass one list for each {name}."
            )
        return prompts, [_as_image_list(own, f"{name} {index}") for index, own in enumerate(images)]

    @staticmethod
    def _parse_one(prompt, images, name, marks_are_text):
        if isinstance(prompt, str):
            parts = [prompt]
        elif isinstance(prompt, (list, tuple)) and prompt:
            parts = [_read_content(part, name) for one in prompt for part in _read_message(one, name)]
        else:
            raise TypeError(
                f"{name.capitalize()} is of type {type(prompt).__name__}"
                + (" and empty" if isinstance(prompt, (list, tuple)) else "")
                + ". Expected a string, a list of strings and images, or chat content."
            )
        inline = sum(not isinstance(part, str) for part in parts)
        texts = [] if marks_are_text else [part for part in parts if isinstance(part, str)]
        n_marks = sum(text.count(IMAGE_MARK) for text in texts)
        n_images = len(images or ())
        if inline and (n_marks or n_images):
            raise ValueError(
                f"{name.capitalize()} holds {inline} images in reading order and also {n_marks} '<i>' marks with {n_images} "
                "images next to it. Use one way: images in the list, or '<i>' marks and images=."
            )
        if n_marks != n_images:
            raise ValueError(
                f"{name.capitalize()} has {n_marks} '<i>' marks but {n_images} images were given. Pass one image per "
                "'<i>', in reading order."
            )
        result, images, numbers = Prompt(), iter(images or ()), count()
        for part in parts:
            if not isinstance(part, str):
                result.append(open_image(part, f"Image {next(numbers)} of {name}"))
                continue
            first, *stretches = part.split(IMAGE_MARK) if n_marks else [part]
            result.append(first)
            for stretch in stretches:
                result += [open_image(next(images), f"Image {next(numbers)} of {name}"), stretch]
        return result


def _is_batch(prompts):
    """A list is a batch when it holds strings alone, or any list; else it is one prompt in reading order."""
    has_list = any(isinstance(part, (list, tuple)) for part in prompts)
    return has_list or all(isinstance(part, str) for part in prompts)


def _as_image_list(images, name):
    if images is None or isinstance(images, (list, tuple)):
        for image in images or ():
            if isinstance(image, (list, tuple)):
                raise TypeError(f"images of {name} holds a list. Pass a flat list of images for one prompt.")
        return images
    if isinstance(images, (*SOURCES, PIL.Image.Image)):
        return [images]
    raise TypeError(f"images of {name} is of type {type(images).__name__}. Pass a list, one image per '<i>'.")


def _read_message(part, name):
    """One element of a prompt -> its elements: of a message of a chat those of its content, in reading order."""
    if not isinstance(part, dict) or "role" not in part:
        return [part]
    content = part.get("content")
    if part["role"] != "user":
        raise ValueError(
            f"{name.capitalize()} holds a message of the role {str(part['role'])[:50]!r}. A prompt is what the user says: "
            "pass messages of the role 'user' alone."
        )
    if not isinstance(content, (str, list, tuple)):
        raise TypeError(
            f"{name.capitalize()} holds a message whose content is of type {type(content).__name__}. Expected a string or a "
            "list of text and images."
        )
    return [content] if isinstance(content, str) else list(content)


def _read_content(part, name):
    """One element of a reading-order list or of chat content -> string or image."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return part["text"]
    sources = [
        (key, part[key])
        for key in ("image", "image_url", "url", "path", "base64", "source")
        if part.get(key) is not None
    ]
    if kind in ("image", "image_url", "input_image") and len(sources) == 1:
        # strings of a reading-order list are text, so a path or URL is opened here
        return _open_content(*sources[0], f"An image of {name}")
    keys = ", ".join(sorted(map(str, part)))
    raise ValueError(
        f"{name.capitalize()} holds a content part of type {_short(kind)} with the keys {_short(keys)}. Expected {{'type': 'text', "
        "'text': ...}, {'type': 'image', 'image' or 'url' or 'path' or 'base64': ...} or {'type': 'image_url', 'image_url': ...}."
    )


def _open_content(key, source, name):
    """The image of a content part, under the key that chat APIs have for it, -> RGB PIL image."""
    if key == "source" and isinstance(
        source, dict
    ):  # {"type": "base64", "data": ...} or {"type": "url", "url": ...}
        key, source = ("base64", source.get("data")) if "data" in source else ("url", source.get("url"))
    elif key == "image_url" and isinstance(source, dict):
        source = source.get("url")
    if key != "base64":
        return open_image(source, name)
    if not isinstance(source, (str, bytes)):
        raise TypeError(f"{name} is given as base64 of type {type(source).__name__}. Expected a string.")
    try:
        text = source if isinstance(source, str) else source.decode("ascii")
        data = _decode_data_url(text) if _is_data_url(text) else _decode_base64(text)
    except ValueError as error:
        raise ValueError(
            f"{name} is not base64 of an image: {_short(source)} ({_reason(error)}). Pass the bytes of an image file as base64."
        ) from error
    return open_image(data, name)


# Images --------------------------------------------------------------------------------------------------------------


def open_image(
    image: ImageLike, name: str, any_channels: bool = False, in_srgb: bool = True
) -> PIL.Image.Image:
    """Any accepted kind of image -> RGB PIL image, turned upright by its EXIF orientation; transparency lies over white.

    Args:
        image: PIL image of any mode, path, URL (http, https or data), bytes of a file, open binary file, array (H, W, 3) or
            tensor (3, H, W); integers in [0, 255], floats in [0, 1].
        name: what an error calls it.
        any_channels: take arrays (H, W) and (H, W, 1 to 4), tensors (H, W) and (1 to 4, H, W) as well.
        in_srgb: convert to sRGB by the colour profile that the image carries, where that is of other colours and can be used.

    Raises:
        ValueError: it cannot be read, is empty, has more pixels than Pillow's limit for decompression bombs, or more bytes,
            fetched or written as base64, than `MOST_IMAGE_BYTES`.
        TypeError: it is of another type.
    """
    image = read_image(image, name, any_channels)
    try:
        return _to_rgb(_to_srgb(image) if in_srgb else image)
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(image, name, error) from error


def read_image(image: ImageLike, name: str, any_channels: bool = False) -> PIL.Image.Image:
    """As `open_image`, but a PIL image of its own mode: transparency and 16 bits are kept. Raises the same."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image, name, any_channels)
    if isinstance(image, SOURCES) or hasattr(image, "read"):
        source = image
        try:
            image = _open_source(source)
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes make Pillow's decoders raise nearly anything
            raise ValueError(
                f"{name} cannot be read from {_short(source)} ({_reason(error)}). Pass the path or URL of an image that opens."
            ) from error
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(
            f"{name} is of type {type(image).__name__}. Expected a PIL image, an array, a tensor, a path, a URL or bytes."
        )
    if not image.width or not image.height:
        raise ValueError(f"{name} is {image.width} x {image.height} pixels. Pass one with at least a pixel.")
    _check_pixel_count(image.width, image.height, name)
    try:
        image.load()
        return _turn_upright(image)
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise _undecodable(image, name, error) from error


def open_mask(mask: ImageLike, name: str) -> PIL.Image.Image:
    """Any accepted kind of mask -> L PIL image, upright, light where it marks something.

    Paint programs write white on black, any colour on transparent, or 0 and 1: where the transparency varies and nothing that
    is visible is light, what was painted at all is marked; a mask without a value above 1 is made 255 times as light.

    Args:
        mask: what `open_image` takes with `any_channels`, boolean arrays and tensors too.
        name: what an error calls it.

    Raises:
        ValueError, TypeError: as `open_image`; or all of it is black.
    """
    mask = read_image(mask, name, any_channels=True)
    try:
        light = _lightness(mask)
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(mask, name, error) from error
    top = light.getextrema()[1]
    if top == 0:
        raise ValueError(f"{name} marks nothing: all of it is black. Paint white what is to be filled.")
    return light.point(lambda value: 255 * value) if top == 1 else light


def _lightness(mask):
    if mask.mode in ("1", "L") and not mask.has_transparency_data:
        return mask.convert("L")
    if mask.mode.startswith("I") and mask.getextrema()[1] == 1:  # 0 and 1, of 65,535
        return PIL.Image.fromarray(np.asarray(mask).astype(np.uint8))
    if not mask.has_transparency_data or mask.mode.startswith("I"):
        return _to_rgb(mask).convert("L")
    mask = _to_rgba(mask)
    alpha = mask.getchannel("A")
    visible = PIL.Image.alpha_composite(PIL.Image.new("RGBA", mask.size, "black"), mask).convert("L")
    is_opaque = alpha.getextrema()[0] == 255
    return visible if is_opaque or visible.getextrema()[1] > 127 else alpha


def _undecodable(image, name, error):
    return ValueError(
        f"{name} (mode {image.mode}, {image.width} x {image.height}) cannot be decoded ({_reason(error)}). "
        "Pass an image that opens in RGB."
    )


def _short(value, length=100):
    """What was given, in an error: never more than `length` characters of it."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value):,} bytes"
    return repr(_cut(str(value), length))


def _cut(text, length=100):
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _reason(error):
    """One short line about an error, without what was given, which its text may repeat."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is not an image that Pillow knows"
    if isinstance(error, requests.RequestException):
        return f"no answer: {type(error).__name__}"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().partition("\n")[0][:100] or type(error).__name__


def _open_source(source):
    """A path, URL, bytes or open file -> PIL image, not decoded yet."""
    if hasattr(source, "read"):
        source = source.read(MOST_IMAGE_BYTES + 1)
        _check_bytes(len(source))
    if not isinstance(source, (str, Path)):
        image = PIL.Image.open(io.BytesIO(source))
    elif _is_data_url(str(source)):
        image = PIL.Image.open(io.BytesIO(_decode_data_url(source)))
    elif str(source).lower().startswith(("http://", "https://")):
        image = PIL.Image.open(io.BytesIO(_download(source)))
    elif Path(source).is_file():
        image = PIL.Image.open(source)
    else:
        raise ValueError("there is no such file, and a URL begins with http://, https:// or data:")
    if image.format == "EPS":  # Pillow would have Ghostscript run it
        raise ValueError("it is an EPS file, which is a program")
    return image


def _check_bytes(size):
    if size > MOST_IMAGE_BYTES:
        raise ValueError(f"it is larger than {MOST_IMAGE_BYTES // 1024**2} MB")


def _is_data_url(text):
    return text[:5].lower() == "data:"


def _decode_data_url(url):
    """data:[media type][;base64],... -> bytes."""
    head, comma, body = url.partition(",")
    _check_bytes(len(body) // 4 * 3)
    if not comma:
        raise ValueError("a data: URL has a comma before its data")
    data = unquote_to_bytes(body)
    return _decode_base64(data.decode("ascii")) if head.lower().endswith(";base64") else data


def _decode_base64(text):
    """Base64, in one line or many, with or without its padding -> bytes."""
    _check_bytes(len(text) // 4 * 3)
    text = "".join(text.split())
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _download(url):
    """The body of an answer to an HTTP request -> bytes, within `MOST_IMAGE_BYTES` and `DOWNLOAD_SECONDS`."""
    result = {}

    def work():
        try:
            result["body"] = _fetch(url, lambda: "late" in result)
        except BaseException as error:
            result["error"] = error

    # a server may send a byte every few seconds, which no time-out of a socket ends
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(DOWNLOAD_SECONDS)
    if worker.is_alive():
        result["late"] = True
        raise ValueError(f"it did not arrive within {DOWNLOAD_SECONDS} seconds")
    if "error" in result:
        raise result["error"]
    return result["body"]


def _fetch(url, is_late):
    # below Session.get, which reads the body of a redirect, however long it is
    with requests.Session() as session:
        for _ in range(MOST_REDIRECTS + 1):
            request = requests.Request("GET", url, headers={"Accept-Encoding": "gzip, deflate"})
            request = session.prepare_request(request)
            settings = session.merge_environment_settings(request.url, {}, True, None, None)
            adapter = session.get_adapter(request.url)
            with adapter.send(request, timeout=SILENT_SECONDS, **settings) as response:
                if response.is_redirect:
                    url = urljoin(url, response.headers["location"])
                elif response.status_code != 200:
                    reason = response.reason or ""
                    raise ValueError(f"the server answers {response.status_code} {reason}".rstrip())
                else:
                    return _read_body(response, is_late)
    raise ValueError(f"the server redirects more than {MOST_REDIRECTS} times")


def _read_body(response, is_late):
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise ValueError(f"the server encodes it as {encoding[:20]!r}; expected gzip or deflate")
    is_packed = encoding not in ("identity", "")
    body, decoder = bytearray(), None
    for chunk in response.raw.stream(2**16, decode_content=False):
        if is_packed:  # not by urllib3, which unpacks whatever a chunk becomes
            if decoder is None:
                # gzip or zlib by their heads; what is called deflate may have none
                is_bare = encoding == "deflate" and chunk[0] & 0x0F != zlib.DEFLATED
                decoder = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32)
            chunk = decoder.decompress(chunk, MOST_IMAGE_BYTES + 1 - len(body))
        body += chunk
        _check_bytes(len(body))
        if is_late():
            break
    if decoder is not None and not decoder.eof:
        raise ValueError("its end is missing")
    return bytes(body)


def _turn_upright(image):
    """As PIL.ImageOps.exif_transpose, which refuses an image for its damaged EXIF."""
    turn = TURNS.get(_orientation(image))
    if turn is None:
        return image.copy()
    image = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", *HELD_AS_XMP):  # it is not to be turned again
        image.info.pop(key, None)
    return image


def _orientation(image):
    """Orientation of a decoded image by EXIF, else by XMP; 1, upright, where neither can be read."""
    xmp = PIL.Image.Image()
    xmp.info = {key: image.info[key] for key in HELD_AS_XMP if key in image.info}
    for source in (image, xmp):
        try:
            value = source.getexif().get(PIL.ExifTags.Base.Orientation, 1)
            return int(value[0] if isinstance(value, tuple) else value)
        except MemoryError:
            raise
        except Exception:  # noqa: S112, BLE001  # damaged bytes make Pillow raise nearly anything
            continue
    return 1


def crop_to_square(
    image: PIL.Image.Image, side: int, resample: PIL.Image.Resampling, size: int | None = None
) -> PIL.Image.Image:
    """A PIL image, its shorter side resized to `side`, then the centre: the sizes of torchvision's Resize and CenterCrop.

    Args:
        image: PIL image.
        side: pixels of the shorter side before cropping.
        resample: of `PIL.Image.Resampling`.
        size: pixels of both sides of the crop; None takes `side`.

    Raises:
        ValueError: it is a strip that would have more pixels, resized, than Pillow's limit for decompression bombs.
    """
    width, height = image.size
    sides = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    _check_pixel_count(*sides, f"The image of {width} x {height} pixels, resized,")
    image = image.resize(sides, resample)
    # round half to even: with a floor the crop of an odd margin would be off by one pixel
    size = size or side
    left, top = (round((length - size) / 2) for length in sides)
    return image.crop((left, top, left + size, top + size))


def _check_pixel_count(width, height, name):
    limit = PIL.Image.MAX_IMAGE_PIXELS  # None when the user has lifted it
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{name} has {width} x {height} = {width * height:,} pixels, more than the {limit:,} that count as a "
            "decompression bomb. Make it smaller, or set PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        )


def _to_rgb(image):
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    # "I;16" and kin, and the 32-bit mode that older Pillow opens 16-bit files in
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values from {values.min():g} to {values.max():g}, expected 16 bit: 0 to 65535")
        return PIL.Image.fromarray((values / 257.0).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_array(np.repeat(np.asarray(image)[..., None], 3, axis=-1), "The image")
    if image.has_transparency_data:
        image = _to_rgba(image)
        background = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(background, image)
    return image.convert("RGB")


def _to_srgb(image):
    """A PIL image in the colours of sRGB, by its own profile; itself where that is missing, broken or sRGB's."""
    profile, mode = image.info.get("icc_profile"), PROFILED_MODES.get(image.mode)
    if mode is None or not isinstance(profile, bytes) or not 0 < len(profile) <= MOST_PROFILE_BYTES:
        return image
    transform = _transform_to_srgb(profile, mode)
    if transform is None:
        return image
    alpha = _to_rgba(image).getchannel("A") if image.has_transparency_data else None
    colours = image if alpha is None else _to_rgba(image)
    colours = transform.apply(colours.convert(mode))
    if alpha is not None:
        colours.putalpha(alpha)
    colours.info.pop("icc_profile", None)
    return colours


@lru_cache(maxsize=8)
def _transform_to_srgb(profile, mode):
    """Bytes of an ICC profile -> Pillow's transform to sRGB; None where it cannot be used or would change next to nothing."""
    try:
        from PIL import ImageCms

        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return transform
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        samples = PIL.Image.fromarray(grid if mode == "RGB" else levels[None])
        change = np.subtract(transform.apply(samples), samples.convert("RGB"), dtype=int)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # of a build without it, or of a profile by anybody
        return None
    return transform if np.abs(change).max() > SAME_LEVELS else None


def _to_rgba(image):
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _from_array(array, name, any_channels=False):
    is_tensor = isinstance(array, torch.Tensor)
    if is_tensor:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if any_channels and array.ndim == 2:
        array = array[None] if is_tensor else array[..., None]
    channels, known = ("1 to 4", (1, 2, 3, 4)) if any_channels else ("3", (3,))
    layout = f"({channels}, height, width)" if is_tensor else f"(height, width, {channels})"
    if array.ndim != 3 or array.shape[0 if is_tensor else -1] not in known or 0 in array.shape:
        kind = "" if any_channels else ", RGB"
        raise ValueError(f"{name} is an array of shape {tuple(array.shape)}. Expected {layout}{kind}.")
    if array.dtype == bool:
        array = array * np.uint8(255)
    floating = np.issubdtype(array.dtype, np.floating)
    top = 1.0 if floating else 255
    if not (array.min() >= 0 and array.max() <= top):  # also False for NaN
        raise ValueError(
            f"{name} is an array of {array.dtype} with values from {array.min():g} to {array.max():g}. "
            "Expected floats in [0, 1] or integers in [0, 255]."
        )
    array = array.transpose(1, 2, 0) if is_tensor else array
    array = (array * 255).round().astype(np.uint8) if floating else array.astype(np.uint8)
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
