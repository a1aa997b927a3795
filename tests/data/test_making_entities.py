"""What comes of a language model's answer: the caption's own words for things, whatever else it says."""

import json
import random

import pytest

from kosmos_g_diffusers.data.making import parse_entities
from kosmos_g_diffusers.data.making.entities import EXAMPLES, build_chat
from kosmos_g_diffusers.data.recipes import interleave
from kosmos_g_diffusers.files import hash_bytes

CAPTION = "A brown Dog sleeping on a red sofa next to two cats, salt and pepper and a hot dog"


@pytest.mark.parametrize(
    "answer",
    [
        "dog, sofa, cats",
        "Dog, Sofa, Cats.",
        "sofa,cats,   dog",
        "a dog, the sofa, some cats",
        "dog; sofa; cats",
        "dog\nsofa\ncats",
        "- dog\n- sofa\n- cats",
        "* dog\n* sofa\n* cats\n",
        "1. dog\n2. sofa\n3) cats",
        '["dog", "sofa", "cats"]',
        'Sure! ["dog", "sofa", "cats"] is the list.',
        '"dog", "sofa", "cats"',
        "**dog**, `sofa`, \u201ccats\u201d",
        "Objects: dog, sofa, cats",
        "Here are the objects in the foreground:\n\n- dog (brown)\n- sofa\n- cats",
        "dog, sofa, and cats",
        "dog and sofa and cats",
        "dog, sofa & cats",
        "dog, sofa, cats, dog, DOG",
        "<think>There is a hot dog, and a hat. Maybe salt and pepper.</think>\n\ndog, sofa, cats",
        "dog, elephant, living room, sofa, cats, cat",
        "dog, red, brown, sofa, cats",
    ],
)
def test_list_in_any_form_gives_the_words_of_the_caption(answer):
    assert parse_entities(answer, CAPTION) == ["Dog", "sofa", "cats"]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "none",
        "None.",
        "I am sorry, I cannot see the image.",
        "elephant",
        "og",
        "so",
        "<think>dog, sofa",
        "[",
        "[[[",
        ",,,",
    ],
)
def test_answer_without_things_of_the_caption_gives_none(answer):
    assert parse_entities(answer, CAPTION) == []


def test_none_is_an_answer_and_no_thing():
    assert parse_entities("none", "none of the dogs") == []


def test_phrase_with_and_stays_whole_where_the_caption_has_it():
    assert parse_entities("salt and pepper, sofa", CAPTION) == ["sofa", "salt and pepper"]


def test_name_within_another_is_left_out_as_in_training():
    # training would pass over "dog" next to "hot dog", and a cut-out that is never read costs work
    assert parse_entities("dog, hot dog", "a dog with a hot dog") == ["hot dog"]


def test_adjectives_that_the_caption_does_not_have_there_drop_the_name():
    assert parse_entities("brown sofa, red sofa", CAPTION) == ["red sofa"]


def test_entities_are_what_training_interleaves():
    rng = random.Random(0)
    words = [
        *CAPTION.replace(",", "").split(),
        "elephant",
        ",",
        ", ",
        "\n",
        "- ",
        "[",
        '"',
        "<think>",
        "(x",
        ")",
    ]
    for _ in range(500):
        answer = "".join(rng.choice(words) + rng.choice(["", " ", ", "]) for _ in range(rng.randrange(12)))
        entities = parse_entities(answer, CAPTION)
        kept = [part for part in interleave(CAPTION, entities) if not isinstance(part, str)]
        assert kept == list(range(len(entities))), answer


def test_endless_answer_is_read_in_part():
    assert parse_entities("dog, " * 1_000_000, CAPTION) == ["Dog"]
    assert parse_entities("[" * 100_000 + "]" * 100_000, CAPTION) == []
    assert parse_entities("(" * 100_000, CAPTION) == []


def test_question_ends_in_the_caption_and_alternates_turns():
    chat = build_chat("a dog")

    assert [turn["role"] for turn in chat] == ["user", "assistant"] * len(EXAMPLES) + ["user"]
    assert chat[-1]["content"] == "Caption: a dog"
    assert all(
        parse_entities(answer, caption) == answer.replace("none", "").split(", ")
        for caption, answer in EXAMPLES[:2]
    )


def test_question_is_that_of_the_first_version_whose_runs_are_resumed():
    question = json.dumps(build_chat("...")).encode()
    assert hash_bytes(question) == "7c656698ee18b9ed0295cfa2089e0966acd77c5ea53d088ccbdd146c34001eb9"
