"""The account of samples that could not be used, and the limit that stops a run."""

import json

import pytest

from kosmos_g_diffusers.data import SkipCounter, TooManyBadSamples


def add(counter, used, messages=(), **skipped):
    counter.add(used, skipped, list(messages))


def test_counts_and_examples_of_each_cause_are_in_the_summary():
    counter = SkipCounter(limit=0.5)
    add(counter, 90, [("image", "a.tsv:3 is damaged")], image=1)
    add(counter, 90, [("row", f"a.tsv:{line} has 2 columns") for line in range(9)], row=9)
    summary = counter.summary()
    assert "10 of 190 samples" in summary
    assert "row: 9, such as a.tsv:0 has 2 columns" in summary and "a.tsv:8" not in summary
    assert "image: 1, such as a.tsv:3 is damaged" in summary
    assert summary.index("row") < summary.index("image: 1")


def test_nothing_skipped_is_said_too():
    counter = SkipCounter()
    add(counter, 7)
    assert counter.summary() == "All 7 samples read could be used."


def test_the_run_stops_when_the_limit_is_passed_and_says_why():
    counter = SkipCounter(limit=0.01)
    add(counter, 198, image=2)  # exactly 1%
    with pytest.raises(TooManyBadSamples, match=r"(?s)3 of 201 samples \(1.49%\).*limit of 1.00%.*x.tsv:9"):
        add(counter, 0, [("image", "x.tsv:9 is damaged")], image=1)


def test_a_few_bad_samples_at_the_start_do_not_stop_a_run():
    counter = SkipCounter(limit=0.01)
    add(counter, 8, image=2)
    with pytest.raises(TooManyBadSamples):
        add(counter, 90)


def test_filtered_samples_are_counted_but_not_bad():
    counter = SkipCounter(limit=0.0)
    add(counter, 100, **{"filtered: small": 400})
    assert counter.bad == 0 and counter.seen == 100
    assert "filtered: small: 400" in counter.summary()


def test_a_limit_of_one_never_stops():
    counter = SkipCounter(limit=1)
    add(counter, 1, image=1000)


def test_counts_survive_a_resume():
    counter = SkipCounter()
    add(counter, 150, [("image", "x")], image=1)
    resumed = SkipCounter()
    resumed.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    assert resumed.summary() == counter.summary()
    with pytest.raises(TooManyBadSamples):
        add(resumed, 0, image=1)


@pytest.mark.parametrize("limit", [-0.1, 1.5])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ValueError, match="0 to 1"):
        SkipCounter(limit)


def read_batches(counter, count, long, different):
    """Batches of a sample each, of which `long` others were left out; returns what was said."""
    said = []
    for number in range(count):
        skipped = {"filtered: length": long}
        messages = [("filtered: length", f"0.tsv:{number} has 190 tokens of text, more than 85")]
        said.append(counter.add(1, skipped, messages, [f"0.tsv:{number % different}"]))
    return [text for text in said if text]


def test_a_run_says_once_that_most_samples_are_left_out():
    counter = SkipCounter()
    (text,) = read_batches(counter, 100, 19, 10)
    for part in (
        "950 of the first 1,000 samples",
        "50 samples, 10 different ones",
        "950 times filtered: length, such as 0.tsv:0 has",
    ):
        assert part in text
    assert "1,900 of 2,000 samples read could not be used" in counter.summary()
    resumed = SkipCounter()
    resumed.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    assert read_batches(resumed, 100, 19, 10) == []
    earlier = SkipCounter()
    earlier.load_state_dict({"seen": 40, "counts": {"filtered: length": 760}, "examples": {}})
    assert len(read_batches(earlier, 100, 19, 10)) == 1


def test_a_tenth_left_out_is_not_worth_a_word():
    counter = SkipCounter()
    assert [counter.add(90, {"filtered: small": 10}, [], ["a"]) for _ in range(20)] == [None] * 20
