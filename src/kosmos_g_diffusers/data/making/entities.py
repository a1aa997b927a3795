"""Captions -> the things in them that can be cut out, by an instruction-tuned language model of transformers."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, pipeline

from ...quiet import brief_bars
from ..recipes import interleave

if TYPE_CHECKING:
    import torch

# what the official preparation asks for: foreground objects, nouns alone, no places, no adjectives, commas between;
# manifests hold the question, and a run is resumed with the same one only: its words stay as they are
INSTRUCTION = (
    "I will give you captions of pictures. For each, name the people, animals and objects in the foreground that could be "
    "cut out of the picture. Use the nouns of the caption as they stand there, without articles and adjectives. Leave out "
    "places, scenery and backgrounds, and whatever the caption does not name. Answer with the nouns alone, separated by "
    "commas, or with the word none."
)
EXAMPLES = (
    ("a small brown dog sleeping on a red sofa in a living room", "dog, sofa"),
    ("two men with hats riding horses on the beach at sunset", "men, hats, horses"),
    ("a view of the mountains on a foggy morning", "none"),
)
ARTICLES = re.compile(r"^(?:an?|the|some|his|her|its|their)\s+", re.IGNORECASE)
BULLET = re.compile(r"^\s*(?:[-*\u2022]+|\(?\d{1,3}[.):])\s*")
REMARK = re.compile(r"\([^)]*\)")
THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
QUOTES = " \t.!?:;\"'`*_[]{}<>\u201c\u201d\u2018\u2019"
MOST_CHARACTERS = 4000  # of an answer that are read


class EntityFinder:
    """Lists the things that captions name.

    Args:
        model: folder or Hub id of a language model with a chat template.
        device, dtype: where and in what precision it runs.
        max_new_tokens: of an answer.
        max_entities: the first so many of a caption are kept.

    Raises:
        OSError: the model cannot be loaded.
        ValueError: it has no chat template.
    """

    pipeline: Any
    max_new_tokens: int
    max_entities: int

    @brief_bars()
    def __init__(
        self,
        model: str,
        *,
        device: "str | torch.device",
        dtype: "torch.dtype",
        max_new_tokens: int = 64,
        max_entities: int = 8,
    ):
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if tokenizer.chat_template is None:
            raise ValueError(
                f"The language model {model} has no chat template. Pass one that is tuned to follow instructions."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        where = {"device": device, "dtype": dtype}
        self.pipeline = pipeline("text-generation", model=model, tokenizer=tokenizer, **where)
        self.max_new_tokens, self.max_entities = max_new_tokens, max_entities

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """For each caption a list of the entities in it, in reading order; empty if the answer names none."""
        pairs = zip(self.answers(captions), captions, strict=True)
        return [parse_entities(answer, caption)[: self.max_entities] for answer, caption in pairs]

    def answers(self, captions: Sequence[str]) -> list[str]:
        """What the model says to each caption, as it stands; the likeliest words, without chance."""
        chats = [build_chat(caption) for caption in captions]
        outputs = self.pipeline(
            chats,
            batch_size=len(chats),
            return_full_text=False,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            # templates that do not know it ignore it
            tokenizer_encode_kwargs={"enable_thinking": False},
        )
        return [output[0]["generated_text"] for output in outputs]


def build_chat(caption: str) -> list[dict[str, str]]:
    """The question, with examples as turns before it. All turns are user and assistant: some templates know no system."""
    chat = []
    for number, (text, answer) in enumerate((*EXAMPLES, (caption, None))):
        question = f"Caption: {text}"
        chat.append({"role": "user", "content": question if number else f"{INSTRUCTION}\n\n{question}"})
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
    return chat


def parse_entities(answer: str, caption: str) -> list[str]:
    """The entities of an answer that training can use, in the order and spelling of the caption.

    The answer may be separated by commas, semicolons or lines, be a JSON list, have bullets, numbers, quotes, articles,
    remarks in parentheses, or thoughts before it. What the caption does not name as a whole word is left out: so a
    model can be wrong, talk, or obey the caption, and nothing but words of the caption comes through. Colours and
    entities within others ("dog" next to "hot dog") are left out as `interleave` does when training reads the sample.
    """
    entities = {}
    for phrase in _phrases(THOUGHTS.sub(" ", answer[:MOST_CHARACTERS])):
        # "salt and pepper" if the caption says so; "dog and sofa" are two
        whole = _spelling(phrase, caption)
        parts = () if whole else re.split(r"\s(?:and|&)\s", phrase)
        for name in (whole, *(_spelling(part, caption) for part in parts)):
            if name is not None:
                entities.setdefault(name.lower(), name)
    entities = list(entities.values())
    return [entities[part] for part in interleave(caption, entities) if not isinstance(part, str)]


def _phrases(answer):
    start, end = answer.find("["), answer.rfind("]")
    if 0 <= start < end:
        try:
            listed = json.loads(answer[start : end + 1])
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
            return listed
    phrases = []
    for line in answer.splitlines():
        line = REMARK.sub(" ", BULLET.sub("", line))
        label, colon, rest = line.partition(":")  # "Objects: dog, sofa"
        phrases += re.split(r"[,;]", rest if colon and "," not in label else line)
    return phrases


def _spelling(phrase, caption):
    """The phrase without article and quotes, as the caption spells it; None if it is not there as whole words."""
    phrase = ARTICLES.sub("", re.sub(r"^\s*and\s+", "", phrase).strip(QUOTES)).strip(QUOTES)
    if phrase.lower() in ("", "none"):
        return None
    match = re.search(rf"\b{re.escape(phrase)}\b", caption, re.IGNORECASE)
    return match.group() if match else None
