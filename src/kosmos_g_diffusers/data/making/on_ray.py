"""Importing and composing over a cluster with Ray Data: the same samples, in the same shards, as one machine makes."""

import json
import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...files import cache_path, default_cache_dir, first_line, is_local_path, write_bytes
from ..sample import BadSample
from ..settings import ComposeSettings, ImportSettings
from ..shard_files import INDEX_NAME
from ..shard_writer import pack_index, pack_shard_bytes
from .compose import Composer, SquareImages, compose_batch, recorded_settings, write_compositions
from .importing import Rows, resolve
from .inputs import Input, find_images
from .output_folder import MANIFEST_NAME, SKIPPED_SUFFIX, OutputFolder, begin_manifest, skipped_line

logger = logging.getLogger(__name__)

LOCAL = "local"  # the address of a Ray that is started here, and ends here


class Place:
    """A folder at an fsspec address, or on the disk.

    Args:
        address: such as s3://bucket/folder, or a path.
    """

    address: str

    def __init__(self, address: str):
        import fsspec

        self.address = str(address)
        self.system, self.path = fsspec.core.url_to_fs(self.address)
        self.is_local = is_local_path(self.address)

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None if it is not there."""
        try:
            return self.system.cat_file(posixpath.join(self.path, name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which appears atomically."""
        path = posixpath.join(self.path, name)
        if self.is_local:
            return write_bytes(path, data)
        self.system.pipe_file(path, data)  # stores keep an object when it is complete
        return None

    def names(self) -> dict[str, int]:
        """Name -> bytes of the files that are there."""
        self.system.invalidate_cache()
        try:
            listed = self.system.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            posixpath.basename(entry["name"]): int(entry["size"] or 0)
            for entry in listed
            if entry["type"] == "file"
        }


class ShardMaker:
    """What an actor of Ray does: it opens the source once, and makes one shard after the other.

    Args:
        line, settings, note: see `Rows`.
        output: address of the folder of shards.
    """

    def __init__(self, line: str, settings: ImportSettings, note: Mapping[str, str], output: str):
        self.rows, self.place = Rows(line, settings, note), Place(output)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Make the shards whose numbers are in `batch["shard"]`."""
        for shard in batch["shard"]:
            self.make(int(shard))
        return {"shard": [int(shard) for shard in batch["shard"]]}

    def make(self, shard: int) -> None:
        samples = [self.rows[number] for number in self.rows.of_shard(shard)]
        kept = [(key, made) for key, made in samples if not isinstance(made, BadSample)]
        left_out = [skipped_line(key, key, made) for key, made in samples if isinstance(made, BadSample)]
        if kept:
            self.place.write(f"part-{shard:06d}.tar", pack_shard_bytes(kept))
        self.place.write(f"part-{shard:06d}{SKIPPED_SUFFIX}", b"".join(left_out))


def import_on_ray(
    output: str, settings: ImportSettings, address: str, data: str | None = None
) -> dict[str, Any]:
    """As `import_data`, over a cluster. The shards are those of one machine: same names, same bytes.

    A node that dies costs the shards that it was making: others make them. Nothing is written twice, since a shard has its name from the
    samples that it holds.

    Args:
        output: an fsspec address that all nodes write to, or a path that all of them have.
        settings: an `ImportSettings`. Every node has to reach what its line names.
        address: of the cluster, as `ray.init` takes it ("auto", "ray://host:10001"); "local" starts a Ray here.
        data: as in `import_data`, on every node.

    Returns:
        dict: the manifest.

    Raises:
        ImportError: ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: as `import_data`.
    """
    place = Place(output)
    line, note = resolve(settings, None, data)
    manifest = begin_manifest(
        place.read(MANIFEST_NAME), place.address, "import", {**asdict(settings), **note}
    )
    place.write(MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
    rows = Rows(line, settings, note)
    there = place.names()
    todo = [shard for shard in range(rows.shards) if f"part-{shard:06d}{SKIPPED_SUFFIX}" not in there]
    if todo:
        with connected(address) as ray:
            logger.info("%d shards are to be made, %d are there", len(todo), rows.shards - len(todo))
            items = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
            arguments = {"fn_constructor_args": (line, settings, note, place.address), "batch_size": 1}
            # an actor for each processor of the cluster at most: each holds the package and reads one shard at a time
            most = max(1, min(len(todo), int(ray.cluster_resources().get("CPU", 1))))
            pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
            made = items.map_batches(ShardMaker, compute=pool, **arguments)
            for _ in made.iter_rows():
                pass
    return _finish(place, manifest, rows)


class ComposeActor:
    """What an actor of Ray does for `compose`: it holds the models, and composes the images of one batch after the other.

    Args:
        images: folder of the images, which every node has.
        inputs: all that are to be done.
        settings, batch_size, options: of the `Composer`.
    """

    def __init__(
        self,
        images: str,
        inputs: Sequence[Input],
        settings: ComposeSettings,
        batch_size: int,
        options: Mapping[str, Any],
    ):
        self.images, self.batch_size = SquareImages(images, inputs, settings.min_side), batch_size
        self.composer = Composer(settings, batch_size=batch_size, **options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers of batches -> what comes of their images, a list each."""
        made = np.empty(len(batch["batch"]), dtype=object)
        for place, number in enumerate(batch["batch"]):
            first = int(number) * self.batch_size
            items = range(first, min(first + self.batch_size, len(self.images)))
            made[place] = compose_batch(self.composer, [self.images[index] for index in items])
        return {"made": made}


def compose_on_ray(
    images: str | Path,
    output: str,
    settings: ComposeSettings,
    address: str,
    *,
    batch_size: int = 8,
    samples_per_shard: int = 1000,
    sheet_samples: int = 100,
    **options: Any,
) -> dict[str, Any]:
    """As `compose`, over a cluster: the models live in actors, one for each GPU or processor, and this process writes what they make.

    Args:
        images: folder that every node has under this path.
        output: an fsspec address, or a path here.
        address: as in `import_on_ray`.
        options: `device` and `dtype` of the models.
    """
    inputs = find_images(images, leave_out=output if is_local_path(output) else None)
    with staged(output) as place:
        recorded = recorded_settings(images, settings)
        with OutputFolder(place, "compose", recorded, samples_per_shard=samples_per_shard) as folder:
            todo = folder.todo(inputs)
            if todo:
                with connected(address) as ray, folder.progress(todo) as bar:
                    for results in _compose(ray, str(images), todo, settings, batch_size, options):
                        write_compositions(folder, results)
                        bar.update(len(results))
        return folder.finish(sheet_samples)


def _compose(ray, images, todo, settings, batch_size, options):
    """What comes of each batch, in order."""
    kind = "CPU" if str(options.get("device", "cpu")) == "cpu" else "GPU"
    most = max(1, int(ray.cluster_resources().get(kind, 1)))
    count = -(-len(todo) // batch_size)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    items = ray.data.from_items([{"batch": number} for number in range(count)], override_num_blocks=count)
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, count))
    arguments = (images, todo, settings, batch_size, options)
    resources = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    made = items.map_batches(
        ComposeActor, compute=pool, fn_constructor_args=arguments, batch_size=1, **resources
    )
    for row in made.iter_rows():
        yield row["made"]


@contextmanager
def staged(address: str) -> Iterator[Path]:
    """A folder on this disk for what lies, and in the end shall lie, at an address; a path is the folder itself."""
    if is_local_path(address):
        yield Path(address)
        return
    place = Place(address)
    folder = cache_path(default_cache_dir(), "staged", address, suffix="")
    folder.mkdir(parents=True, exist_ok=True)
    there = place.names()
    for name, size in there.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            write_bytes(path, place.read(name) or b"")
    try:
        yield folder
    finally:
        for path in sorted(folder.iterdir()):
            changes = path.suffix != ".tar" or there.get(path.name) != path.stat().st_size
            if path.is_file() and path.name[0] != "." and changes:
                place.write(path.name, path.read_bytes())


def _finish(place, manifest, rows):
    """Write shards.json and the counts of what is there."""
    there, shards, causes = place.names(), [], {}
    for shard in range(rows.shards):
        lines = (place.read(f"part-{shard:06d}{SKIPPED_SUFFIX}") or b"").splitlines()
        for line in lines:
            cause = json.loads(line)["cause"]
            causes[cause] = causes.get(cause, 0) + 1
        name = f"part-{shard:06d}.tar"
        if name in there:
            shards.append(
                {"url": name, "nsamples": len(rows.of_shard(shard)) - len(lines), "filesize": there[name]}
            )
    if not shards:
        raise ValueError(f"Nothing could be made of any sample of {rows.line}: {causes}.")
    place.write(INDEX_NAME, pack_index(shards))
    manifest |= {
        "shards": len(shards),
        "samples": sum(shard["nsamples"] for shard in shards),
        "skipped": causes,
    }
    manifest["summary"] = (
        f"{sum(causes.values()):,} samples were left out." if causes else "No sample was left out."
    )
    place.write(MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
    return manifest


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray at an address, quiet; a local one ends with the block."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("A cluster needs the package ray: pip install 'kosmos-g-diffusers[ray]'") from error
    begins = not ray.is_initialized()
    if begins:
        where = {"include_dashboard": False} if address == LOCAL else {"address": address}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"There is no Ray at {address} ({first_line(error)}). Start one with ray start, or pass local."
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if begins:
            ray.shutdown()
