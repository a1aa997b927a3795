"""How captions, edits and compositions become prompts, with the words dropped and the backgrounds chosen."""

import random
from collections import Counter

import pytest

from kosmos_g_diffusers.data import BadSample
from kosmos_g_diffusers.data.recipes import (
    caption_sample,
    composition_sample,
    edit_sample,
    interleave,
)


@pytest.mark.parametrize(
    "caption, entities, with_words, without_words",
    [
        ("a dog on a sofa", ["dog", "sofa"], ["a dog", 0, " on a sofa", 1], ["a ", 0, " on a ", 1]),
        # by their place in the caption, not in the list
        ("a dog on a sofa", ["sofa", "dog"], ["a dog", 1, " on a sofa", 0], ["a ", 1, " on a ", 0]),
        # words reach to the next space or mark
        ("the dog's bowl, full", ["dog"], ["the dog's", 0, " bowl, full"], ["the ", 0, " bowl, full"]),
        ("Dogs, cats.", ["dogs", "cats"], ["Dogs", 0, ", cats", 1, "."], [0, ", ", 1, "."]),
        # the caption begins with an entity: the official loader raises IndexError when its words are dropped
        ("dog in snow", ["dog"], ["dog", 0, " in snow"], [0, " in snow"]),
        # a colour, no whole word, not there at all, part of another tag
        ("a red hotdog", ["red", "dog", "cat"], ["a red hotdog"], ["a red hotdog"]),
        ("a hot dog", ["dog", "hot dog"], ["a hot dog", 1], ["a ", 1]),
        # two tags over the same words: the first that ends wins
        ("a big old dog", ["big old", "old dog"], ["a big old", 0, " dog"], ["a ", 0, " dog"]),
        ("a dog", ["", "dog"], ["a dog", 1], ["a ", 1]),
        ("a (dog", ["(dog"], ["a (dog"], ["a (dog"]),
    ],
)
def test_entities_stand_behind_their_words_or_in_their_place(caption, entities, with_words, without_words):
    assert interleave(caption, entities) == with_words
    assert interleave(caption, entities, keep_words=False) == without_words


def compose(seed, **options):
    rng = random.Random(seed)
    return composition_sample(
        "k",
        "a dog on a sofa",
        ["dog", "sofa"],
        lambda number, whole: (number, whole),
        "target",
        rng,
        **options,
    )


def test_a_composition_drops_all_words_or_none_and_chooses_each_background():
    prompts = Counter(compose(seed).prompt for seed in range(4000))
    assert len(prompts) == 8  # words or none, times two backgrounds
    assert all(number == pytest.approx(500, abs=100) for number in prompts.values())
    assert ("a dog", (0, True), " on a sofa", (1, False)) in prompts
    assert ("a ", (0, True), " on a ", (1, True)) in prompts


def test_probabilities_of_a_composition_can_be_set():
    assert {compose(seed, word_dropout=0, background=1).prompt for seed in range(20)} == {
        ("a dog", (0, True), " on a sofa", (1, True))
    }
    assert {compose(seed, word_dropout=1, background=0).prompt for seed in range(20)} == {
        ("a ", (0, False), " on a ", (1, False))
    }


def test_a_composition_keeps_its_caption_and_target():
    sample = compose(0)
    assert (sample.key, sample.caption, sample.target) == ("k", "a dog on a sofa", "target")


def edit(seed=0, words="a garden", **options):
    return edit_sample("k", words, "make it snow", "before", "after", None, random.Random(seed), **options)


def test_an_edit_loses_its_input_caption_half_of_the_time():
    prompts = Counter(edit(seed).prompt for seed in range(2000))
    assert set(prompts) == {("a garden", "before", "make it snow"), ("before", "make it snow")}
    assert prompts["before", "make it snow"] == pytest.approx(1000, abs=100)
    assert edit().target == "after"


def test_an_edit_may_have_no_input_caption():
    assert {edit(seed, words=words).prompt for seed in range(9) for words in ("", " ", None)} == {
        ("before", "make it snow")
    }


def test_a_caption_is_its_own_prompt():
    sample = caption_sample("k", " a dog ", "image")
    assert (sample.prompt, sample.caption, sample.target) == (("a dog",), "a dog", "image")


@pytest.mark.parametrize("caption", ["", " \t ", None, 7, ["a"]])
def test_an_empty_caption_is_refused(caption):
    with pytest.raises(BadSample, match="x.tsv:3 has .* caption") as caught:
        caption_sample("x.tsv:3", caption)
    assert caught.value.cause == "caption"
    with pytest.raises(BadSample):
        composition_sample("x.tsv:3", caption, ["dog"], None, None, random.Random(0))
    with pytest.raises(BadSample):
        edit_sample("x.tsv:3", "words", caption, "before", "after", None, random.Random(0))
