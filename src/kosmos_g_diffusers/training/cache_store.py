"""Tensors that are kept on disk under the hash of what they were computed from.

FOLDER/*.safetensors      a shard: keys (n, 16) uint8, checksums (n,) int64, values (n, ...)

A shard is written once, under a name that no other process takes, and never changed. So any number of processes read and
write one folder without locks, and there is no index to get out of step: each process lists the shards for itself.
"""

import hashlib
import logging
import secrets
import shutil
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import remove_partial_files, written_atomically

KEY_BYTES = 16
KEEP_FREE = 10 * 2**30
# seconds after which a shard that is still being written belongs to a process that was killed
ABANDONED = 3600

logger = logging.getLogger(__name__)


def content_key(*tensors: torch.Tensor | None) -> bytes:
    """16 bytes that follow from the dtype, shape and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.digest()[:KEY_BYTES]


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor as a flat array of bytes, also for dtypes that numpy does not know."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def keys_as_tensor(keys: Iterable[bytes]) -> torch.Tensor:
    """A list of n keys as a tensor (n, 16) uint8."""
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES)


class TensorStore:
    """Tensors of one shape and dtype, by keys of 16 bytes.

    What is added is readable at once in this process, and in others when its shard is written. A shard that does not
    agree with its checksums is set aside with a warning: its entries are missing, as if they had never been kept.

    Args:
        folder: of the shards; made when the first is written.
        dtype: of the values.
        shard_bytes, shard_entries: a shard is written when it holds so much. A process that is killed loses that.
        keep_free: bytes of the disk to leave for others, such as checkpoints; with less, nothing more is kept.
    """

    folder: Path
    dtype: torch.dtype
    shard_bytes: int
    shard_entries: int
    keep_free: int

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype,
        *,
        shard_bytes: int = 64 * 2**20,
        shard_entries: int = 1024,
        keep_free: int = KEEP_FREE,
    ):
        self.folder, self.dtype = Path(folder), dtype
        self.shard_bytes, self.shard_entries, self.keep_free = shard_bytes, shard_entries, keep_free
        self._places = {}  # key -> (name of its shard, row)
        self._shards = set()  # names of those whose keys are in _places, or that are not to be read again
        self._pending = {}  # key -> value, of the shard to be written
        self._writes = True

    def __getstate__(self) -> dict[str, Any]:
        # the readers in other processes find it on disk
        return {**self.__dict__, "_pending": {}}

    def __len__(self) -> int:
        """Entries that this process knows of."""
        return len(self._places) + len(self._pending)

    def read(self, keys: Sequence[bytes]) -> tuple[torch.Tensor | None, list[int]]:
        """Values of keys, and what is missing.

        Args:
            keys: list of 16 bytes each.

        Returns:
            (values, missing): (len(keys), ...) tensor on the CPU, None if nothing was found; and the positions in `keys`
            whose rows of it mean nothing.
        """
        if not all(key in self._places or key in self._pending for key in keys):
            self._find_shards()
        values, missing = None, []
        for position, key in enumerate(keys):
            value = self._read_one(key)
            if value is None:
                missing.append(position)
                continue
            if values is None:
                values = value.new_empty(len(keys), *value.shape)
            values[position] = value
        return values, missing

    def add(self, keys: Sequence[bytes], values: torch.Tensor) -> None:
        """Keep values, (len(keys), ...) of any device. Those that are not finite in the store's dtype are left out."""
        if not self._writes:
            return
        values = values.detach().to("cpu", self.dtype)
        for key, value in zip(keys, values, strict=True):
            if value.isfinite().all():
                self._pending[key] = value.clone()  # else one value would keep the memory of all
        n_bytes = sum(value.nbytes for value in self._pending.values())
        if n_bytes >= self.shard_bytes or len(self._pending) >= self.shard_entries:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet on disk. A full disk stops the keeping, not the training."""
        if not self._pending:
            return
        keys, values = list(self._pending), torch.stack(list(self._pending.values()))
        checksums = torch.tensor([_checksum(key, value) for key, value in self._pending.items()])
        shard = {"keys": keys_as_tensor(keys), "checksums": checksums, "values": values}
        name = f"{secrets.token_hex(8)}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.folder, older_than=ABANDONED)
            free = shutil.disk_usage(self.folder).free
            if free - values.nbytes < self.keep_free:
                raise OSError(f"{free / 2**30:.1f} GiB are free, {self.keep_free / 2**30:.1f} are to be left")
            with written_atomically(self.folder / name) as file:
                file.write(save(shard))
        except OSError as error:
            self._writes = False
            logger.warning(
                "Frozen work is no longer kept in %s (%s). Training continues and computes it; make room before the next "
                "run, or give it another cache folder.", self.folder, error,
            )  # fmt: skip
        else:
            self._add_shard(name, keys)
        self._pending = {}

    def _find_shards(self):
        """Read the keys of shards that were not here when we last looked."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._shards:
                shard = self._open(path.name, lambda shard: shard.get_tensor("keys"))
                if shard is not None:
                    self._add_shard(path.name, [key.tobytes() for key in shard.numpy()])

    def _add_shard(self, name, keys):
        self._shards.add(name)
        for row, key in enumerate(keys):
            self._places.setdefault(key, (name, row))  # two processes may have computed the same

    def _read_one(self, key):
        if key in self._pending:
            return self._pending[key]
        if key not in self._places:
            return None
        name, row = self._places[key]
        found = self._open(
            name, lambda shard: (shard.get_slice("values")[row], shard.get_slice("checksums")[row : row + 1])
        )
        if found is None:
            return None
        value, checksum = found
        if _checksum(key, value) == checksum.item():
            return value
        self._set_aside(name, "an entry does not have its checksum")
        return None

    def _open(self, name, read):
        """What `read` gets from a shard; None if it is gone or damaged."""
        try:
            with safe_open(self.folder / name, framework="pt") as shard:
                return read(shard)
        except FileNotFoundError:
            self._forget(name)
        except SafetensorError as error:
            self._set_aside(name, error)
        except OSError as error:  # a network or a disk that may be well again tomorrow
            path = self.folder / name
            logger.warning("%s cannot be read (%s). It stays; what it holds is computed.", path, error)
            self._forget(name)
        return None

    def _set_aside(self, name, reason):
        path, entries = self.folder / name, self._forget(name)
        logger.warning(
            "%s is damaged (%s). It is now called .damaged, and its entries (%d known) are computed again.",
            path, reason, entries,
        )  # fmt: skip
        with suppress(OSError):  # another process was quicker, or the folder is for reading only
            path.rename(path.with_suffix(".damaged"))

    def _forget(self, name):
        before = len(self._places)
        self._places = {key: place for key, place in self._places.items() if place[0] != name}
        self._shards.add(name)
        return before - len(self._places)


def _checksum(key, value):
    return zlib.crc32(as_bytes(value), zlib.crc32(key))
