"""One way to declare a setting of a dataclass, from which its check and its flag on the command line follow.

@dataclass(frozen=True)
class Settings:
    steps: int = setting(50, "denoising steps", low=1, high=10_000)

    def __post_init__(self):
        check(self)
"""

import argparse
import math
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from types import GenericAlias, UnionType
from typing import Any

TYPE, CHOICE, RANGE = "type", "choice", "range"  # what may be wrong with a value


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Iterable[Any] = (),
    metavar: str | None = None,
    **others: Any,
) -> Any:
    """A field of a dataclass.

    Args:
        default: a callable makes the default of each record.
        help: what it means, for people; ends without a full stop.
        low, high: of a number, both included; NaN is outside of any range.
        choices: values that it may have; empty for any.
        metavar: what the help calls its value; None takes a name by its type.
        others: kept in the field's `metadata`, next to all of these.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": tuple(choices), "metavar": metavar}
    metadata |= others
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


def is_of_type(value: object, kind: type | UnionType | GenericAlias) -> bool:
    """Whether a value is of an annotated type; an int will do for a float, a bool for nothing but a bool."""
    accepted = kind.__origin__ if isinstance(kind, GenericAlias) else kind | int if kind is float else kind
    return isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)


def find_problem(
    value: object,
    kind: type | UnionType,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Collection[Any] = (),
    **others: Any,
) -> str | None:
    """TYPE, CHOICE or RANGE, whichever is wrong with a value first; None if nothing is. None is in any range."""
    if not is_of_type(value, kind):
        return TYPE
    if choices and value is not None and value not in choices:
        return CHOICE
    if isinstance(value, (int, float)) and not low <= value <= high:  # also for NaN
        return RANGE
    return None


def check_value(
    name: str,
    value: object,
    kind: type | UnionType,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Collection[Any] = (),
    **others: Any,
) -> None:
    """TypeError or ValueError, which begins with `name`, if a value is not what was declared."""
    problem = find_problem(value, kind, low, high, choices)
    if problem == TYPE:
        expected = getattr(kind, "__name__", kind)
        raise TypeError(f"{name} is of type {type(value).__name__}; expected {expected}.")
    if problem == CHOICE:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
    if problem == RANGE:
        raise ValueError(f"{name} is {value}; expected a number from {low} to {high}.")


def check(record: Any) -> None:
    """TypeError or ValueError for the first field of a dataclass whose value is not what was declared."""
    for entry in fields(record):
        check_value(entry.name, getattr(record, entry.name), entry.type, **entry.metadata)


def add_flags(
    parser: argparse._ActionsContainer,
    settings: type | Iterable[Field[Any]],
    leave_out: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Give an argparse parser a flag for each declared field of a dataclass; those not given are absent from its result.

    Args:
        parser: argparse.ArgumentParser, or a group of one.
        settings: the dataclass, or some of its fields.
        leave_out: names of fields without a flag.
        defaults: name -> default that the help shows instead of the field's own.
    """
    entries = fields(settings) if isinstance(settings, type) else settings
    for entry in entries:
        if entry.metadata.get("help") and entry.name not in leave_out:
            default = (defaults or {}).get(entry.name, entry.default)
            text, choices, metavar = (entry.metadata[name] for name in ("help", "choices", "metavar"))
            add_flag(parser, entry.name, _without_none(entry.type), default, text, choices, metavar)


def add_flag(
    parser: argparse._ActionsContainer,
    name: str,
    kind: Any,
    default: Any,
    text: str,
    choices: Collection[Any] = (),
    metavar: str | None = None,
) -> None:
    """The flag `--name` of one setting of a type; its help is `text` and, unless that or zero says it, the default."""
    if default not in ("", (), 0, False, None, MISSING) and "(default:" not in text:
        text += f" (default: {default:g})" if kind is float else f" (default: {default})"
    options = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif choices:
        metavar = metavar or "|".join(choice for choice in choices if choice)
        parser.add_argument(flag, choices=choices, metavar=metavar, **options)
    elif kind in (tuple[str, ...], tuple[float, ...]):
        parser.add_argument(flag, nargs="+", type=kind.__args__[0], metavar=metavar, **options)
    else:
        metavar = metavar or {int: "N", float: "NUMBER"}.get(kind)
        parser.add_argument(flag, type=kind, metavar=metavar, **options)


def _without_none(kind):
    """`int | None` -> int."""
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in kind.__args__ if part is not type(None))
    return kind
