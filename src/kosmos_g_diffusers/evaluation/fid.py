"""FID: the distance of images to photographs, by the network and the formula of the original.

Both kinds are reduced to 256 pixels and cropped there. Features are kept in the results folder, a file for each thousand
images, so that this pass, too, can be resumed and split over processes.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from ..files import hash_bytes, hash_file, written_atomically
from ..processing_kosmos_g import crop_to_square, open_image
from .images import image_path

if TYPE_CHECKING:
    from accelerate import PartialState

    from .manifest import Manifest

SIZE = 256  # pixels, both sides of what is compared
INSTALL = "pip install torchmetrics torch-fidelity torchvision"
SHARD, BATCH = 1000, 32  # images of a file of features, and that the network sees at once


class Fid:
    """The distance of a run's images to photographs, as `Manifest.distance`.

    Args:
        photographs: their paths.
        weights: file of the network's weights; None lets torch-fidelity download them.
    """

    photographs: Sequence[str | Path]
    weights: str | Path | None
    counts: dict[str, int]
    network: "Inception"
    identity: dict[str, Any]

    name = "fid"

    def __init__(self, photographs: Sequence[str | Path], weights: str | Path | None = None):
        self.photographs, self.weights = photographs, weights
        self.counts = {"photographs": len(photographs)}

    def load(self) -> None:
        """Load the weights, so that a mistake shows before hours of work."""
        self.network = load_inception(self.weights)
        self.identity = self.network.identity

    def measure(
        self, folder: str | Path, manifest: "Manifest", state: "PartialState", device: str
    ) -> float | None:
        """The distance as a float, for which all processes compute features; None in all but the first."""
        self.network.to(device if state.num_processes == 1 else state.device)
        images = [image_path(folder, task) for task in manifest.tasks]
        folders = folder / "features" / "photographs", folder / "features" / "images"
        for place, paths in zip(folders, (self.photographs, images), strict=True):
            write_features(place, paths, self.network, state)
        return frechet_distance(*map(read_features, folders)) if state.is_main_process else None


class Inception(torch.nn.Module):
    """torchmetrics' network of the FID: (N, 3, H, W) uint8 -> (N, 2048), resized to 299 pixels in between."""

    network: torch.nn.Module
    identity: dict[str, Any]

    def __init__(self, network: torch.nn.Module, identity: dict[str, Any]):
        super().__init__()
        self.network, self.identity = network, identity

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(pixels.to(next(self.network.parameters()).device))


def load_inception(weights: str | Path | None) -> Inception:
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
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        raise ImportError(f"FID needs torchmetrics and torch-fidelity ({error}): {INSTALL}") from error
    if weights is not None and not Path(weights).is_file():
        raise OSError(f"There are no weights of the Inception network at {str(weights)!r}.")
    try:
        if weights is not None:
            # torch-fidelity would run what a pickle holds: refuse that here
            torch.load(weights, weights_only=True)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights and str(weights))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(
            f"The weights of the Inception network cannot be loaded ({error}). Without a network, download "
            "pt_inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity elsewhere and pass --inception FILE."
        ) from error
    identity = {"scorer": "fid", "network": "inception-v3-compat of torch-fidelity"}
    if weights is not None:
        identity["sha256"] = hash_file(weights)
    return Inception(network, identity)


def crop(image: PIL.Image.Image, size: int = SIZE) -> torch.Tensor:
    """RGB PIL image -> (3, size, size) uint8: shorter side to `size` (Pillow averages over what it leaves out), then the middle."""
    pixels = np.array(crop_to_square(image, size, PIL.Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def write_features(
    folder: str | Path,
    paths: Sequence[str | Path],
    extractor: Callable[[torch.Tensor], torch.Tensor],
    state: "PartialState",
) -> None:
    """Compute the features of images that are not in `folder` yet, each file by one process.

    Args:
        paths: of the images.
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
            pixels = torch.stack(
                [crop(open_image(path, str(path), in_srgb=False)) for path in shard[start : start + BATCH]]
            )
            rows.append(extractor(pixels).float().cpu())
        with written_atomically(path) as file:
            file.write(save({"features": torch.cat(rows)}, {"sha256": digest}))
    state.wait_for_everyone()
    if state.is_main_process:  # of more images than there are now
        for path in sorted(folder.glob("*.safetensors"))[len(shards) :]:
            path.unlink()


def read_features(folder: str | Path) -> Iterator[torch.Tensor]:
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


def frechet_distance(real: Iterable[torch.Tensor], generated: Iterable[torch.Tensor]) -> float:
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
