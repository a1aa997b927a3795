"""What a run consists of, written down before it starts: `manifest.jsonl` of a results folder.

Its first line says what is run (benchmark, model, settings), each further line is one image to make. A folder belongs to
one manifest: whatever would mix images of two settings is refused.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ..files import first_line, hash_file, write_text
from .generated import Generated

FORMAT = "kosmos_g_evaluation_1"  # raise it when an older package would read a new manifest wrongly
FILE_NAME = "manifest.jsonl"
SAVED = ("benchmark", "options", "model", "settings", "conditions", "data", "pictures")  # in its first line
OWN_PICTURES = "pictures"  # folder of a run, for input images that the benchmark draws
# a path of an image: nothing in it may lead elsewhere
TASK_ID = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*")


@dataclass(frozen=True)
class Task:
    """One image to make, and what it is compared with."""

    id: str  # path under images/, without .png
    unit: str  # what means and intervals are taken over, such as a subject
    row: str  # prompt of the table by prompt, the same for all units
    prompt: str  # with a <i> for each input image
    text: str | None  # what the image should show, in words alone; None where nothing is compared with words
    pictures: tuple[str, ...]  # input images, as paths from the data folder, one for each <i>
    references: tuple[Any, ...]  # for each subject a tuple of paths from the data folder
    seed: int
    truth: dict[str, Any] | None = None  # what a benchmark with a scorer of its own scores by

    def __post_init__(self) -> None:
        if not TASK_ID.fullmatch(self.id):
            raise ValueError(f"{self.id!r} cannot name an image. Use letters, digits and any of + - _ . /")
        from ..processing_kosmos_g import IMAGE_MARK

        n_marks, n_images = self.prompt.count(IMAGE_MARK), len(self.pictures)
        if n_marks != n_images:
            raise ValueError(f"The prompt of {self.id} has {n_marks} '<i>' marks and {n_images} images.")


@dataclass(frozen=True)
class Manifest:
    """What is run. A benchmark gives what it asks for; run.py adds model, settings, conditions and pictures.

    Of two manifests of one folder, all that is saved but `data` and `conditions` must be equal.

    Args:
        benchmark: its name, such as "dreambench".
        options: of the benchmark, such as its protocol.
        tasks: a `Task` for each image.
        data: the folder of input images and references, as the user wrote it; None if the benchmark draws them itself.
        model: what `identify_model` says.
        settings: steps, guidance, scheduler, height, width, dtype, seed.
        conditions: what changes pixels by rounding at most (versions, device, batch size): kept while images are made.
        pictures: path from the data folder -> SHA-256, of every input image and reference.

    Not saved, since the benchmark gives it again:
        files: path from the results folder -> bytes of what the benchmark adds to it, such as the input images that it draws.
        scorers: those that belong to the benchmark alone, see scoring.py.
        published: name -> metric -> score, shown next to the run.
        notes: paragraphs of the report.
        distance: a measure of all images together, see `Fid`.
        finish: is called with the results folder when its report is written.
        generated: the images, if another model made them.
        by_references: whether the report has a table by number of input images.
        keep_maps: whether the maps of each image are kept next to it, for a scorer.
    """

    benchmark: str
    options: dict[str, Any]
    tasks: tuple[Task, ...] = field(repr=False)
    data: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    scorers: tuple[Any, ...] = ()
    published: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    distance: Any = None
    finish: Callable[..., None] | None = None
    generated: Generated | None = None
    by_references: bool = False
    keep_maps: bool = False

    def __post_init__(self) -> None:
        seen = set()
        for task in self.tasks:
            if task.id in seen:
                raise ValueError(f"Two images would be called {task.id}.")
            seen.add(task.id)

    @property
    def units(self) -> list[str]:
        return list(dict.fromkeys(task.unit for task in self.tasks))

    def chunks(self, size: int) -> list[tuple[Task, ...]]:
        """Tasks in batches that are the same for every process and after every kill: their bits stay the same, too."""
        return [self.tasks[start : start + size] for start in range(0, len(self.tasks), size)]

    def write(self, folder: str | Path) -> None:
        header = {name: getattr(self, name) for name in SAVED}
        lines = [{"format": FORMAT, **header}, *(asdict(task) for task in self.tasks)]
        write_text(Path(folder) / FILE_NAME, "".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read what `write` wrote.

        Raises:
            ValueError: there is none, or it is something else.
        """
        path = Path(folder) / FILE_NAME
        try:
            header, *tasks = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            form = header.pop("format", None)
            if form != FORMAT:
                raise ValueError(f"its format is {form!r}, and this package reads {FORMAT!r}")
            for task in tasks:
                task["pictures"] = tuple(task["pictures"])
                task["references"] = tuple(map(tuple, task["references"]))
            if set(header) != set(SAVED):
                raise ValueError(f"it holds {', '.join(header)}, and {', '.join(SAVED)} are expected")
            return cls(**header, tasks=tuple(Task(**task) for task in tasks))
        except FileNotFoundError as error:
            raise ValueError(f"{str(folder)!r} is not a results folder: it has no {FILE_NAME}.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            advice = "Pass the --output of a kosmos-g evaluate of this version."
            raise ValueError(f"{path} cannot be used ({first_line(error)}). {advice}") from error

    def check_same(self, other: "Manifest", n_images_left: int) -> None:
        """Raise a ValueError that names what differs, unless `other` may continue in the folder of this manifest."""
        parts = ["options", "model", "settings", "conditions", "pictures"]
        if n_images_left == 0:  # new scores and reports may be made elsewhere, with other versions
            parts.remove("conditions")
        mine, theirs = _flatten(self, parts), _flatten(other, parts)
        keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        different = [f"{key}: {mine.get(key)!r} there, {theirs.get(key)!r} now" for key in keys]
        different += _compare_tasks(self.tasks, other.tasks)
        if not different:
            return
        shown = "; ".join(different[:6])
        more = f"; and {len(different) - 6} more" if len(different) > 6 else ""
        raise ValueError(
            f"The results folder holds a run of other settings ({shown}{more}). Runs are never mixed: repeat those settings, "
            "or pass another --output."
        )


def _flatten(manifest, parts):
    """Name -> value of everything but the images that two runs can differ in."""
    flat = {"benchmark": manifest.benchmark}
    for name in parts:
        flat.update({f"{name}.{key}": value for key, value in getattr(manifest, name).items()})
    flat.pop("model.path", None)  # where the same weights lie does not matter
    flat["number of images"] = len(manifest.tasks)
    return _as_read(flat)


def _as_read(content):
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(content))


def _compare_tasks(found, asked):
    """What differs between the images of two runs, in a sentence; [] if nothing does."""
    found, asked = ({task.id: _as_read(asdict(task)) for task in tasks} for tasks in (found, asked))
    different = [name for name in found | asked if found.get(name) != asked.get(name)]
    if not different:
        return []
    name = different[0]
    if name not in found or name not in asked:
        how = f"is only {'there' if name in found else 'now'}"
    else:
        key = next(key for key in found[name] if found[name][key] != asked[name][key])
        how = f"has the {key} {found[name][key]!r} there, {asked[name][key]!r} now"
    return [f"{len(different)} images differ, such as {name}, which {how}"]


def as_id(text: str) -> str:
    """A name as a part of a task's id."""
    return "".join(letter if letter.isalnum() or letter in "_+-." else "-" for letter in text)


def derive_seed(base: int, *parts: str | int) -> int:
    """A seed that belongs to `parts`, such as subject, prompt and index, whatever else is made in the same run.

    32 bits, since torch's generator on the CPU takes no more.
    """
    digest = hashlib.sha256("\0".join(map(str, (base, *parts))).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def check_images(data: str | Path, paths: Iterable[str]) -> None:
    """ValueError that names all images which are not in the data folder."""
    missing = [path for path in sorted(set(paths)) if not (Path(data) / path).is_file()]
    if missing:
        found = f"{len(missing)} images are not in {str(data)!r}: {', '.join(missing)}"
        raise ValueError(f"{found}. Complete the data folder.")


def hash_images(data: str | Path, paths: Iterable[str]) -> dict[str, str]:
    """Path from `data` -> SHA-256. All are opened as well: one that is damaged must show before hours of work.

    Raises:
        ValueError: images are missing or cannot be read; all of them are named.
    """
    from ..processing_kosmos_g import open_image

    check_images(data, paths)
    damaged = []
    for path in paths:
        try:
            open_image(Path(data) / path, path)
        except ValueError as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(f"{len(damaged)} images of {str(data)!r} are damaged. {' '.join(damaged)}")
    return {path: hash_file(Path(data) / path) for path in paths}
