"""Importing over a cluster with Ray Data: every node reads its share of the samples and writes shards to an address that all reach."""

import json
import logging
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ...files import first_line, is_local_path, write_bytes
from ..sample import BadSample
from ..settings import ImportSettings
from ..shard_files import INDEX_NAME
from ..shard_writer import pack_index, pack_shard_bytes
from .importing import Rows, resolve
from .output_folder import MANIFEST_NAME, SKIPPED_SUFFIX, begin_manifest, skipped_line

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
        """Write a file, which is there whole or not at all."""
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
