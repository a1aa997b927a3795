"""The second pass over a manifest: scores of its images, a file for each scorer; a run that was killed is resumed."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import PIL.Image
from tqdm.auto import tqdm

from ..files import first_line, hash_file, hash_folder, write_text
from ..processing_kosmos_g import open_image
from .features import load_extractor
from .images import image_path
from .manifest import Manifest, Task
from .scorers import SCORERS

if TYPE_CHECKING:
    from accelerate import PartialState


class Scorer(Protocol):
    """What scores images: `load` comes first, `identity` says what it was that scored."""

    name: str
    identity: dict[str, Any]

    def load(self) -> None: ...

    def score(self, tasks: Sequence[Task], images: Sequence[PIL.Image.Image]) -> list[dict[str, float]]: ...


BATCH = 32  # images that a scorer sees at once


class FeatureScorer:
    """Scores by cosines of features: with the images of each subject, and with words where a task has them.

    Colour profiles are ignored, as the scripts of the papers do.

    Args:
        name: of SCORERS in scorers.py.
        source: folder, file or Hub id of its weights; None takes its own.
        device: where it runs.
        data: folder of the references.
    """

    name: str
    source: str | None
    device: str
    data: str | Path
    identity: dict[str, Any]

    def __init__(self, name: str, source: str | None, device: str, data: str | Path):
        self.name, self.source, self.device, self.data = name, source, device, data
        self.identity = {"scorer": name, "source": source or SCORERS[name]}
        if source is not None and Path(source).exists():
            digest = hash_folder(source) if Path(source).is_dir() else hash_file(source)
            self.identity = {"scorer": name, "sha256": digest}
        self._extractor, self._references = None, {}

    def load(self) -> None:
        """Load the weights, so that a mistake shows before hours of work."""
        if self._extractor is None:
            self._extractor = load_extractor(self.name, source=self.source, device=self.device)

    def score(self, tasks: Sequence[Task], images: Sequence[PIL.Image.Image]) -> list[dict[str, float]]:
        """A dict of scores for each task: of several subjects their mean, each one's own, and the worst."""
        self.load()
        features, results = self._extractor.features(images), [{} for _ in tasks]
        for metric, rows in features.items():
            for task, feature, scores in zip(tasks, rows, results, strict=True):
                references = [self._features_of(paths)[metric] for paths in task.references]
                cosines = [float((subject @ feature).mean()) for subject in references]
                if cosines:
                    scores[metric] = sum(cosines) / len(cosines)
                if len(cosines) > 1:
                    scores |= {f"{metric}_subject_{number}": one for number, one in enumerate(cosines, 1)}
                    scores[f"{metric}_worst_subject"] = min(cosines)
        with_words = [index for index, task in enumerate(tasks) if task.text is not None]
        if with_words and self._extractor.has_text:
            texts = self._extractor.text_features([tasks[index].text for index in with_words])
            cosines = (next(iter(features.values()))[with_words] * texts).sum(-1).tolist()
            for index, cosine in zip(with_words, cosines, strict=True):
                results[index][self._extractor.metrics[-1]] = cosine
        return results

    def _features_of(self, paths):
        """Features of a subject's references, computed once."""
        if paths not in self._references:
            images = [open_image(Path(self.data) / path, path, in_srgb=False) for path in paths]
            self._references[paths] = self._extractor.features(images)
        return self._references[paths]


def score(folder: str | Path, manifest: Manifest, scorer: Scorer, state: "PartialState") -> None:
    """Score all images of the manifest with `scorer`: `.name`, `.identity` (a dict) and `.score(tasks, images)`.

    Scores of images that have not changed since are kept.

    Raises:
        ValueError: scores of the same name were made by something else.
    """
    folder = Path(folder)
    path, parts = _score_path(folder, scorer.name), folder / "scores" / scorer.name
    known = _read_records(path, scorer.identity)
    for part in sorted(parts.glob("*.jsonl")):
        known |= _read_records(part, scorer.identity)
    chunks = manifest.chunks(BATCH)
    state.wait_for_everyone()
    mine = list(enumerate(chunks))[state.process_index :: state.num_processes]
    for number, tasks in tqdm(mine, desc=f"batches of {scorer.name}", disable=not state.is_main_process):
        files = {task.id: image_path(folder, task) for task in tasks}
        digests = {name: hash_file(file) for name, file in files.items()}
        if all(known.get(name, {}).get("sha256") == digest for name, digest in digests.items()):
            continue
        images = [open_image(files[task.id], str(files[task.id]), in_srgb=False) for task in tasks]
        records = []
        for (name, digest), one in zip(digests.items(), scorer.score(tasks, images), strict=True):
            rounded = {metric: round(value, 6) for metric, value in one.items()}
            records.append({"id": name, "sha256": digest, "scores": rounded})
        write_records(parts / f"{number:06}.jsonl", scorer.identity, records)
    state.wait_for_everyone()
    if state.is_main_process and parts.exists():
        for part in sorted(parts.glob("*.jsonl")):
            known |= _read_records(part, scorer.identity)
        write_records(path, scorer.identity, [known[task.id] for task in manifest.tasks])
        shutil.rmtree(parts)
    state.wait_for_everyone()


def read_scores(
    folder: str | Path, manifest: Manifest
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Scores of every scorer that has seen all images as they are now.

    Returns:
        (task id -> metric -> score, list of the scorers' identities).
    """
    digests = {task.id: hash_file(image_path(folder, task)) for task in manifest.tasks}
    scores, identities = {name: {} for name in digests}, []
    # in the order of the published tables, whatever was computed first
    known = {name: place for place, name in enumerate(SCORERS)}
    paths = (Path(folder) / "scores").glob("*.jsonl")
    for path in sorted(paths, key=lambda path: (known.get(path.stem, len(known)), path.stem)):
        records = _read_records(path)
        if all(records.get(name, {}).get("sha256") == digest for name, digest in digests.items()):
            identities.append(_read_identity(path))
            for name in digests:
                scores[name] |= records[name]["scores"]
    return scores, identities


def has_scores(folder: str | Path, name: str) -> bool:
    """Whether the scores of a scorer have been put together before; images may have changed since."""
    return _score_path(folder, name).exists()


def _score_path(folder, name):
    return Path(folder) / "scores" / f"{name}.jsonl"


def write_records(path: Path, identity: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in [identity, *records]))


def _read_identity(path):
    with open(path, encoding="utf-8") as file:
        return json.loads(file.readline())


def _read_records(path, identity=None):
    """Task id -> record; nothing if there is no file. With `identity`, only the scores of that very scorer."""
    if not path.exists():
        return {}
    try:
        found, *records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        records = {record["id"]: record for record in records}
        if not isinstance(found, dict):
            raise TypeError("its first line does not say by what")
    except (ValueError, KeyError, TypeError) as error:
        advice = "Delete it, and the scores are computed again."
        raise ValueError(f"{path} is damaged ({first_line(error)}). {advice}") from error
    if identity not in (None, found):
        made, asked = (
            ", ".join(f"{name} {value}" for name, value in facts.items()) for facts in (found, identity)
        )
        raise ValueError(
            f"{path} was made by {made}, and {asked} was asked for. Scores are never mixed: delete that file, or pass "
            "another --output."
        )
    return records
