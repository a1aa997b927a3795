"""FID-30k: images for captions of MS-COCO val2014 against its photographs, as the Kosmos-G paper (sec. 4.3) measures it.

As in microsoft/unilm, kosmos-g/sample_kosmosg_coco.py, captions are drawn with Python's `random` (seed 0 draws the same
ones) and all photographs of the annotations are the real ones. Both kinds are reduced to 256 pixels and cropped there; the
official script does so with photographs, and with images when it reads them again, but not when it has just made them.

Features of the pictures are kept in the results folder, a file for each thousand, so that this pass goes on where it was
and is split over processes, too.
"""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from ...captioning import as_text
from ...files import hash_bytes, hash_file, write_text, written_atomically
from ...processing_kosmos_g import open_image
from .. import report as reports
from ..images import generate, image_path
from ..manifest import Task, derive_seed
from ..run import Plan, check_conditions, load_scorers, open_run
from ..scoring import read_scores, score
from ..sheets import write_sheets

SETTINGS = {"steps": 250, "guidance": 3.0, "scheduler": "ddim"}
COUNT = 30_000
SIZE = 256  # pixels, both sides of what is compared
PUBLISHED = {"Kosmos-G paper": {"fid": 10.99}}
INSTALL = "pip install torchmetrics torch-fidelity torchvision"
SHARD, BATCH = 1000, 32  # pictures of a file of features, and that the network sees at once
FEW = 20  # names that an error spells out


def read_annotations(path):
    """Photographs and captions of a file of COCO's captions.

    Returns:
        (file names of all photographs, annotations: dicts with `id`, `image_id` and `caption`).

    Raises:
        ValueError: the file is missing or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There are no annotations at {str(path)!r}. Pass captions_val2014.json of COCO.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: image["file_name"] for image in content["images"]}
        annotations = content["annotations"]
        for annotation in annotations:
            if not isinstance(annotation["caption"], str) or annotation["image_id"] not in images:
                raise ValueError(f"annotation {annotation['id']} has no caption or is of no image")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} does not hold COCO's captions ({type(error).__name__}: {error}). Expected a JSON object with the "
            "lists images (id, file_name) and annotations (id, image_id, caption), as in captions_val2014.json."
        ) from error
    if not annotations:
        raise ValueError(f"{str(path)!r} holds no captions.")
    return list(images.values()), annotations


def draw_captions(annotations, count, seed):
    """`count` annotations, drawn as the official code draws them."""
    if not 2 <= count <= len(annotations):
        raise ValueError(f"{count} captions were asked for; expected 2 to {len(annotations)}, all there are.")
    return random.Random(seed).sample(annotations, count)


def build_tasks(captions, seed):
    """A `Task` for each annotation."""
    return tuple(
        Task(
            id=f"{number // 1000:03}/{number:06}",
            unit=f"{number:06}",
            row="captions",
            prompt=as_text(annotation["caption"]),
            text=annotation["caption"],
            pictures=(),
            references=(),
            seed=derive_seed(seed, "coco", annotation["id"], annotation["caption"]),
        )
        for number, annotation in enumerate(captions)
    )


def evaluate(
    annotations, images, output, *, count, seed, inception=None, scorers=(), repair=False, **options
):
    """Make images for captions, compare them with the photographs, write the report; what is there already stays.

    Args:
        annotations: captions_val2014.json of COCO.
        images: folder of its photographs.
        output: results folder, new or of this very run.
        count, seed: of the captions; the seed is also that of the images.
        inception: file of the Inception network's weights; None lets torch-fidelity download them.
        scorers: what else scores the images, see scoring.py.
        repair: make images again that cannot be read.
        options: those of `open_run`.

    Returns:
        The report as a dict; None in all processes but the first.

    Raises:
        ValueError, OSError, ImportError: see the functions called here. Nothing that is there is overwritten.
    """
    output, images = Path(output), Path(images)
    reports.load_matplotlib()  # this and all until the run is opened: before hours of work and before anything is written
    check_conditions(options["settings"], options["device"], options["batch_size"])
    names, captions = read_annotations(annotations)
    captions = draw_captions(captions, count, seed)
    _check_photographs(images, names)
    extractor = load_inception(inception)
    plan = Plan(
        benchmark="coco",
        options={"captions": hash_file(annotations), "count": count, "size": SIZE},
        tasks=build_tasks(captions, seed),
        data=str(images),
    )
    load_scorers(scorers, output)
    state, manifest = open_run(plan, output, **options)
    if state.is_main_process:
        write_text(output / "captions.json", json.dumps(captions, indent=1) + "\n")
    generate(output, manifest, state, options["device"], repair)
    for scorer in scorers:
        score(output, manifest, scorer, state)
    extractor.to(options["device"] if state.num_processes == 1 else state.device)
    folders = output / "features" / "photographs", output / "features" / "images"
    write_features(folders[0], [images / name for name in names], extractor, state)
    write_features(folders[1], [image_path(output, task) for task in manifest.tasks], extractor, state)
    if not state.is_main_process:
        return None
    fid = frechet_distance(*(read_features(folder) for folder in folders))
    return _write_report(output, manifest, fid, len(names), extractor.identity)


def _check_photographs(folder, names):
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - FEW} more" if len(missing) > FEW else ""
        raise ValueError(
            f"{len(missing)} of {len(names)} photographs are not in {str(folder)!r}: {', '.join(missing[:FEW])}{more}. Pass "
            "--images, the folder val2014 of COCO, and complete it."
        )


def _write_report(output, manifest, fid, n_photographs, network):
    """The report of the engine, with the FID, which belongs to no single image, in the first place."""
    scores, scorers = read_scores(output, manifest)
    report = reports.summarise(manifest, scores, [network, *scorers], 0, PUBLISHED)
    n_images = len(manifest.tasks)
    entry = {"mean": round(fid, 6), "interval": None, "units": n_images}
    report["metrics"] = {"fid": entry, **report["metrics"]}
    report["counts"]["photographs"] = n_photographs
    notes = [f"FID: {n_images:,} images against {n_photographs:,} photographs, {SIZE} x {SIZE} pixels."]
    if n_images != COUNT:
        notes.append(
            f"The published FID is of {COUNT:,} images. It grows as images get fewer: these two do not compare."
        )
    sheets = write_sheets(output, manifest, scores)
    write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "report.md", reports.as_markdown(report, [], sheets, notes))
    return report


# FID -----------------------------------------------------------------------------------------------------------------


class Inception(torch.nn.Module):
    """torchmetrics' network of the FID: (N, 3, H, W) uint8 -> (N, 2048), resized to 299 pixels in between."""

    def __init__(self, network, identity):
        super().__init__()
        self.network, self.identity = network, identity

    @torch.no_grad()
    def forward(self, pixels):
        return self.network(pixels.to(next(self.network.parameters()).device))


def load_inception(weights):
    """The network of the original FID, with the weights that torch-fidelity has converted.

    Args:
        weights: its file pt_inception-2015-12-05-6726825d.pth; None downloads it once.

    Raises:
        ImportError: torchmetrics or torch-fidelity is not installed.
        OSError: the weights cannot be downloaded or read.
    """
    try:
        import torch_fidelity  # noqa: F401  torchmetrics would not say that it needs torchvision
        from torchmetrics.image.fid import NoTrainInceptionV3
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: torchvision beside another torch than its own
        raise ImportError(f"FID needs torchmetrics and torch-fidelity ({error}): {INSTALL}") from error
    if weights is not None and not Path(weights).is_file():
        raise OSError(f"There are no weights of the Inception network at {str(weights)!r}.")
    try:
        if weights is not None:
            torch.load(
                weights, weights_only=True
            )  # torch-fidelity would run what a pickle holds: refuse that here
        network = NoTrainInceptionV3(
            "inception-v3-compat",
            ["2048"],
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(
            f"The weights of the Inception network cannot be loaded ({error}). Without a network, download "
            "pt_inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity elsewhere and pass --inception FILE."
        ) from error
    identity = {"scorer": "fid", "network": "inception-v3-compat of torch-fidelity"}
    if weights is not None:
        identity["sha256"] = hash_file(weights)
    return Inception(network, identity)


def crop(image, size=SIZE):
    """RGB PIL image -> (3, size, size) uint8: shorter side to `size`, then the middle."""
    width, height = image.size
    if width <= height:
        shape = size, int(size * height / width)
    else:
        shape = int(size * width / height), size
    image = image.resize(shape, PIL.Image.Resampling.BILINEAR)  # Pillow averages over what it leaves out
    left, top = (round((side - size) / 2) for side in shape)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def write_features(folder, paths, extractor, state):
    """Compute the features of pictures that are not in `folder` yet, each file by one process.

    Args:
        paths: of the pictures.
        extractor: (N, 3, S, S) uint8 -> (N, D); its `identity` is a dict that says what it is.
        state: accelerate's `PartialState`.
    """
    shards = [paths[start : start + SHARD] for start in range(0, len(paths), SHARD)]
    mine = list(enumerate(shards))[state.process_index :: state.num_processes]
    for number, shard in tqdm(mine, desc=f"features of {folder.name}", disable=not state.is_main_process):
        path = _shard_path(folder, number)
        digest = hash_bytes(json.dumps([extractor.identity, SIZE, *map(hash_file, shard)]).encode())
        if path.exists() and _read_digest(path) == digest:
            continue
        rows = []
        for start in range(0, len(shard), BATCH):
            pixels = torch.stack([crop(open_image(path, str(path))) for path in shard[start : start + BATCH]])
            rows.append(extractor(pixels).float().cpu())
        with written_atomically(path) as file:
            file.write(save({"features": torch.cat(rows)}, {"sha256": digest}))
    state.wait_for_everyone()
    if state.is_main_process:  # of more pictures than there are now
        for path in sorted(folder.glob("*.safetensors"))[len(shards) :]:
            path.unlink()


def read_features(folder):
    """What `write_features` has written, file by file: tensors (n, D)."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield file.get_tensor("features")


def _shard_path(folder, number):
    return Path(folder) / f"{number:06}.safetensors"


def _read_digest(path):
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("sha256")
    except Exception:  # safetensors raises what its Rust side raises; a damaged file is computed again
        return None


class _AsItIs(torch.nn.Module):
    """Stands in for the network where features are there already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def frechet_distance(real, generated):
    """Fréchet distance of two sets of features, taken for normal distributions (Heusel et al. 2017, eq. 6).

    Args:
        real, generated: iterables of tensors (n, D), two rows at least in all.

    Returns:
        The distance as a float, computed in float64 by torchmetrics.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"FID needs torchmetrics: {INSTALL}") from error
    metric = None
    for features, is_real in ((real, True), (generated, False)):
        for part in features:
            if metric is None:
                # one process holds all features: it must not wait for the others
                metric = FrechetInceptionDistance(_AsItIs(part.shape[1]), sync_on_compute=False)
            metric.update(part.double(), real=is_real)
    return float(metric.compute())
