"""A benchmark from its plan to its report, in one or many processes, as often as it takes."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..environment import check_device, package_versions
from ..files import hash_bytes
from ..generation.settings import GenerationSettings
from .images import generate, identify_model, join_processes, open_folder
from .manifest import Manifest, hash_pictures
from .report import load_matplotlib, write_report
from .scoring import has_scores, read_scores, score

OWN_PICTURES = "pictures"  # folder of a run, for pictures that the benchmark draws


@dataclass(frozen=True)
class Plan:
    """What a benchmark asks for: everything but model and settings.

    Args:
        benchmark, options, tasks: as in `Manifest`.
        data: folder of the pictures; None takes the run's own folder `pictures`, with `files` in it.
        files: name -> bytes of pictures that the benchmark has drawn itself.
        published: name -> metric -> score, shown beside the run.
        notes: paragraphs of the report.
    """

    benchmark: str
    options: dict
    tasks: tuple
    data: str | None = None
    files: dict = field(default_factory=dict, repr=False)
    published: dict = field(default_factory=dict)
    notes: tuple = ()


def evaluate(plan, output, scorers, *, repair=False, **options):
    """Make the images of a plan, score them and write the report; whatever is there already stays.

    Args:
        output: results folder, new or of this very run.
        scorers: what scores the images, see scoring.py.
        repair: make images again that cannot be read.
        options: those of `open_run`.

    Returns:
        The report as a dict; None in all processes but the first.

    Raises:
        ValueError, OSError, ImportError: see the functions called here. Nothing that is there is overwritten.
    """
    load_matplotlib()  # this and the next two before hours of work, and before anything is written
    check_conditions(options["settings"], options["device"], options["batch_size"])
    load_scorers(scorers, output)
    state, manifest = open_run(plan, output, **options)
    generate(output, manifest, state, options["device"], repair)
    for scorer in scorers:
        score(output, manifest, scorer, state)
    if not state.is_main_process:
        return None
    scores, scorers = read_scores(output, manifest)
    return write_report(output, manifest, scores, scorers, plan.published, plan.notes)


def check_conditions(settings, device, batch_size):
    """Raise a ValueError that says what is wrong with a setting, the device or the batch size."""
    if batch_size < 1:
        raise ValueError(f"The batch size is {batch_size}; expected 1 or more.")
    GenerationSettings(prompt="", device=str(device), **settings)
    check_device(device)


def load_scorers(scorers, output):
    """Load what scores images, unless all its scores are there."""
    for scorer in scorers:
        if not has_scores(output, scorer.name):
            scorer.load()


def open_run(plan, output, *, model, settings, device, batch_size):
    """Write the manifest of a plan into a results folder, or check that the folder holds this very run.

    Args:
        model: folder, Hub id, or None for the small model that ships.
        settings: dict of steps, guidance, scheduler, height, width, dtype and seed.
        device: "cpu", "cuda", ...; with several processes each takes its own of that kind.
        batch_size: images at once. It changes images by rounding at most.

    Returns:
        (accelerate's `PartialState`, the manifest with the conditions under which its images were begun).
    """
    output = Path(output)
    state = join_processes(device)
    data = str(output / OWN_PICTURES if plan.data is None else plan.data)
    if state.is_main_process:
        names = {name for task in plan.tasks for name in (*task.pictures, *sum(task.references, ()))}
        drawn = {name: hash_bytes(content) for name, content in sorted(plan.files.items())}
        manifest = Manifest(
            benchmark=plan.benchmark,
            options=plan.options,
            model=identify_model(model),
            settings=settings,
            conditions={
                "device": torch.device(device).type,
                "batch_size": batch_size,
                "versions": package_versions(),
            },
            data=OWN_PICTURES if plan.data is None else data,
            pictures=drawn if plan.data is None else hash_pictures(data, names),
            tasks=tuple(plan.tasks),
        )
        open_folder(output, manifest)
        for name, content in plan.files.items():
            path = output / OWN_PICTURES / name
            path.parent.mkdir(exist_ok=True)
            if not path.exists() or path.read_bytes() != content:  # as a kill may have left it
                path.write_bytes(content)
    state.wait_for_everyone()
    manifest = replace(Manifest.read(output), data=data)
    manifest.model["path"] = None if model is None else str(model)
    return state, manifest
