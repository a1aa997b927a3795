"""What a body of JSON may be: as many values as are taken, counted before one is made, and text in UTF-8."""

import itertools
import json
import random
import tracemalloc

import pytest

from kosmos_g_diffusers.serving.access import Refused
from kosmos_g_diffusers.serving.bodies import MAX_BODY, MAX_VALUES, Bodies, read_json_body


@pytest.mark.parametrize("small", ["{}", "[]", '""', '{"a":[]}', "0"])
def test_values_are_counted_before_they_are_made(small):
    body = ('{"prompt": "a hat", "images": [' + ",".join(itertools.repeat(small, 500_000)) + "]}").encode()
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="too many values"):
            read_json_body(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(body) + 6_000_000  # its text


def test_as_many_values_as_there_may_be_are_taken_and_no_more():
    chooser = random.Random(0)
    texts = ('a, b [c] {d} "e" \\', "", "\\", '"', "ü\n\u2028", "data:image/png;base64,AAAA")
    for spare in (0, -1):
        # the object itself, its list, and the entries
        entries = [
            chooser.choice([*texts, 1, -1.5e3, None, True]) for _ in range(MAX_VALUES - 2 - spare - 2_000)
        ]
        body = {"many": [*entries, *({"a": "b"} for _ in range(1_000))]}
        for options in ({}, {"ensure_ascii": False}, {"indent": 1}):
            text = json.dumps(body, **options).encode()
            if spare == 0:
                assert read_json_body(text) == body
            else:
                with pytest.raises(Refused, match="too many values"):
                    read_json_body(text)


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "a hat"}'.encode("utf-16"),
        '{"prompt": "a hat"}'.encode("utf-32-le"),
        b'{"prompt": "\xff"}',
        b'{"prompt": "' + b'\\"' * 2_000_000,  # quotes that open and end nothing
        b'{"prompt": ' + b"[" * 50_000,
        b'{"prompt": ' + b"9" * 5_000 + b"}",
    ],
)
def test_what_is_no_json_in_utf_8_is_told(body):
    with pytest.raises(Refused, match="not JSON"):
        read_json_body(body)
    assert read_json_body(b'\xef\xbb\xbf{"prompt": "a hat"}') == {"prompt": "a hat"}


def test_bodies_are_counted_by_their_lengths_or_as_the_largest():
    bodies = Bodies(2 * MAX_BODY)
    with bodies.holding({"content-length": "5"}), bodies.holding({}):  # the second does not say
        with pytest.raises(Refused, match="reading too many"), bodies.holding({}):
            pass
        with bodies.holding({"content-length": str(MAX_BODY - 5)}):
            pass
    for length in ("x", "-1", "9" * 30, str(2**40)):
        with bodies.holding({"content-length": length}), bodies.holding({}):
            pass
