import argparse
from dataclasses import dataclass

import pytest

from kosmos_g_diffusers.fields import add_flags, check, setting


@dataclass(frozen=True)
class Checked:
    name: str | None = setting(None, "what it is called")
    steps: int = setting(50, "denoising steps", low=1, high=100)
    share: float = setting(0.5, "of 100%", low=0, high=1)
    kind: str | None = setting("a", "which of them", choices=("a", "b"))
    fast: bool = setting(False, "quickly")
    note: dict = setting(dict)

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0; expected a number from 1 to 100."),
        ({"steps": 1.0}, TypeError, "steps is of type float; expected int."),
        ({"steps": True}, TypeError, "steps is of type bool; expected int."),
        ({"share": float("nan")}, ValueError, "share is nan; expected a number from 0 to 1."),
        ({"share": "1"}, TypeError, "share is of type str; expected float."),
        ({"kind": "c"}, ValueError, "kind is 'c'; expected one of a, b."),
        ({"fast": 1}, TypeError, "fast is of type int; expected bool."),
        ({"name": 3}, TypeError, r"name is of type int; expected str \| None."),
    ],
)
def test_value_that_was_not_declared_is_named(values, error, message):
    with pytest.raises(error, match=message):
        Checked(**values)


def test_declared_values_pass_and_each_record_has_its_own_default():
    record = Checked(name="x", steps=1, share=1, kind=None)
    assert record.share == 1 and record.note == {} and record.note is not Checked().note


@dataclass(frozen=True)
class Flags:
    name: str | None = setting(None, "what it is called")
    steps: int = setting(50, "denoising steps")
    share: float = setting(0.5, "of 100%")
    kind: str = setting("a", "which of them", choices=("a", "b"))
    parts: tuple[str, ...] = setting((), "of the whole", metavar="PART")
    fast: bool = setting(False, "quickly")
    silent: int = 3


def test_flags_are_those_given():
    parser = argparse.ArgumentParser()
    add_flags(parser, Flags, leave_out=("name",), defaults={"steps": 7})
    assert vars(parser.parse_args([])) == {}
    given = vars(parser.parse_args("--steps 3 --share 1e-1 --kind b --parts x y --fast".split()))
    assert given == {"steps": 3, "share": 0.1, "kind": "b", "parts": ["x", "y"], "fast": True}
    text = parser.format_help()
    for words in (
        "--steps N",
        "(default: 7)",
        "--share NUMBER",
        "of 100% (default: 0.5)",
        "--kind a|b",
        "--no-fast",
    ):
        assert words in text
    assert "--silent" not in text and "--name" not in text
