"""A benchmark from its manifest to its report, in one or many processes, as often as it takes."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..environment import check_device, package_versions
from ..files import check_output_folder, hash_bytes, write_bytes
from ..generation.settings import GenerationSettings
from ..provenance import MARKED, Marker
from .images import copy_generated, generate, identify_generated, identify_model, join_processes, open_folder
from .manifest import OWN_PICTURES, Manifest, hash_images
from .report import load_matplotlib, write_report
from .scoring import Scorer, has_scores, read_scores, score


def evaluate(
    manifest: Manifest,
    output: str | Path,
    scorers: Iterable[Scorer] = (),
    *,
    model: str | None = None,
    settings: dict[str, Any],
    device: str,
    batch_size: int,
    repair: bool = False,
    marker: Marker = MARKED,
    offload: str = "none",
) -> dict[str, Any] | None:
    """Make the images of a benchmark, score them and write the report; whatever is there already stays.

    Of a manifest with `generated`, the images are those that another model made: nothing is drawn.

    Args:
        manifest: what the benchmark asks for.
        output: results folder, new or of this very run.
        scorers: what scores the images next to the benchmark's own, see scoring.py.
        model: folder, Hub id, or None for the small model that ships.
        settings: dict of steps, guidance, scheduler, height, width, dtype and seed, with binding and
            quantize as far as they say something; {} where nothing is drawn.
        device: "cpu", "cuda", ...; with several processes each takes its own of that kind.
        batch_size: images at once. It changes images by rounding at most.
        repair: make images again that cannot be read.
        marker: a `provenance.Marker` of the images that are made now.
        offload: how the model is kept off the device, as GenerationSettings has it; it does not change images.

    Returns:
        The report as a dict; None in all processes but the first.

    Raises:
        ValueError, OSError, ImportError: see the functions called here. Nothing that is there is overwritten.
    """
    output, scorers = check_output_folder(output), [*manifest.scorers, *scorers]
    # all until the run is begun: before hours of work, and before anything is written
    load_matplotlib()
    if batch_size < 1:
        raise ValueError(f"The batch size is {batch_size}; expected 1 or more.")
    if not manifest.generated:
        GenerationSettings(prompt="", device=str(device), **settings)
    check_device(device)
    for scorer in scorers:
        if not has_scores(output, scorer.name):
            scorer.load()
    if manifest.distance:
        manifest.distance.load()
    state = join_processes(device)
    manifest = _begin(manifest, output, state, model, settings, device, batch_size)
    if manifest.generated:
        copy_generated(output, manifest, state)
    else:
        generate(output, manifest, state, device, repair, marker, offload)
    for scorer in scorers:
        score(output, manifest, scorer, state)
    distance = manifest.distance and manifest.distance.measure(output, manifest, state, device)
    if not state.is_main_process:
        return None
    report = write_report(output, manifest, *read_scores(output, manifest), distance)
    if manifest.finish:
        manifest.finish(output)
    return report


def _begin(manifest, output, state, model, settings, device, batch_size):
    """Write the manifest into a results folder, or check that the folder holds this very run.

    Returns:
        The manifest, with the conditions under which its images were begun.
    """
    own = manifest.data is None
    data = str(output / OWN_PICTURES if own else manifest.data)
    if state.is_main_process:
        used = [(task.pictures, *task.references) for task in manifest.tasks]
        names = sorted({name for groups in used for group in groups for name in group})
        if own:
            pictures = {name: hash_bytes(manifest.files[f"{OWN_PICTURES}/{name}"]) for name in names}
        else:
            pictures = hash_images(data, names)
        conditions = (
            {} if manifest.generated else {"device": torch.device(device).type, "batch_size": batch_size}
        )
        conditions["versions"] = package_versions()
        asked = replace(manifest, pictures=pictures, settings=settings, conditions=conditions)
        made_by = identify_generated(manifest.generated) if manifest.generated else identify_model(model)
        open_folder(output, replace(asked, data=OWN_PICTURES if own else data, model=made_by))
        for name, content in manifest.files.items():
            path = output / name
            if not path.exists() or path.read_bytes() != content:  # as a kill may have left it
                write_bytes(path, content)
    state.wait_for_everyone()
    found = Manifest.read(output)
    begun = {name: getattr(found, name) for name in ("settings", "conditions", "pictures")}
    path = manifest.generated.folder if manifest.generated else model and str(model)
    return replace(manifest, data=data, model={**found.model, "path": path}, **begun)
