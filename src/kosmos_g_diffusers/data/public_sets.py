"""The table of public data sets: `kosmos-g data list`, and the names that `kosmos-g data import` takes. Its rows are public_sets.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("public_sets.json")
# where columns are known from, and what the table says of it
LAYOUTS = {
    "card": "",  # its own page
    "code": "columns: as other loaders of it use them",
    "form": "columns: by the form that its authors describe; no row of it was seen",
}


@dataclass(frozen=True)
class PublicSet:
    """A row of the table.

    Attributes:
        name: what import calls it.
        id: where it is: an id on the Hub, or an address.
        licence, size, good_for: for people.
        kind: caption, edit, composition, prompt or document.
        line: the line that reads it; {folder} is the folder that it was fetched to.
        columns: those that it has, as far as they matter here.
        layout: where its columns are known from, see `LAYOUTS`.
        files: patterns of what has to be fetched of a Hub repository, where `datasets` does not do that.
        archives: patterns of what has to be unpacked, in the folder.
        score: columns for --min-score, with commas between them.
        remark: what has to be known besides.
    """

    name: str
    id: str
    licence: str
    size: str
    good_for: str
    kind: str
    line: str
    columns: str
    layout: str
    files: Sequence[str] = ()
    archives: Sequence[str] = ()
    score: str = ""
    remark: str = ""


@cache
def read_public_sets() -> tuple[PublicSet, ...]:
    """All rows, in the table's order."""
    return tuple(PublicSet(**row) for row in json.loads(TABLE.read_text(encoding="utf-8")))


def find_public_set(source: str) -> PublicSet | None:
    """The row of a name; None for a line.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    found = next((row for row in read_public_sets() if row.name == source), None)
    if found is None and ":" not in source:
        names = ", ".join(row.name for row in read_public_sets())
        raise ValueError(
            f"{source!r} is not a known data set. Known: {names}; or pass a line such as datasets:NAME?image=COLUMN."
        )
    return found


def format_table() -> str:
    """The table as text for a terminal: name, kind, size, licence; below each what it is good for and its line."""
    rows = read_public_sets()
    widths = {name: max(len(getattr(row, name)) for row in rows) for name in ("name", "kind", "size")}
    lines = []
    for row in rows:
        head = "  ".join(getattr(row, name).ljust(size) for name, size in widths.items())
        lines += [f"{head}  {row.licence}", f"    {row.good_for}", f"    {row.id}", f"    {row.line}"]
        lines += [f"    {note}" for note in (LAYOUTS[row.layout], row.remark) if note]
    return "\n".join(lines)
