"""Where the samples of a WebDataset shard lie within its tar file."""

import os
import tarfile
from dataclasses import dataclass, field

from .sample import BadSample


@dataclass
class TarSample:
    """Members of one sample: extension ("json", "target.jpg") -> (offset, size) of its bytes."""

    key: str
    members: dict = field(default_factory=dict)
    problem: str | None = None


def index_tar(path):
    """The samples of a tar file: a list of `TarSample`, in the file's order, found by reading the headers alone.

    As WebDataset has it, a sample is a run of members whose names are alike up to the first dot of the last part.
    Names are only ever compared, never used as paths; links, devices and sparse files are passed over. Where the file
    is cut off or damaged, the samples up to there are given, the last of them with its `problem` set.

    Raises:
        BadSample: cause "shard"; the file is no plain tar file.
        OSError: it is not there.
    """
    samples, damage = [], None
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps every header otherwise
                if member.isreg() and not member.issparse():
                    _add_member(samples, member, size)
            # tarfile takes a damaged header, or the end of a file that is cut off, for the end of the archive
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
            if end.count(b"\0") != tarfile.BLOCKSIZE:
                damage = f"a damaged header at byte {tar.offset:,}" if end else "cut off"
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        damage = error
    if damage and not samples:
        raise BadSample("shard", f"{path} cannot be read as an uncompressed tar file ({damage})")
    if damage and samples[-1].problem is None:  # members of the last sample may be missing
        samples[-1].problem = f"is the last before the damage of its shard ({damage})"
    return samples


def _add_member(samples, member, size):
    key, extension = split_name(member.name)
    if not extension:
        return
    if not samples or samples[-1].key != key:
        samples.append(TarSample(key))
    sample = samples[-1]
    if extension in sample.members:
        sample.problem = f"has two members with the ending .{extension}"
    if member.offset_data + member.size > size:
        sample.problem = "is cut off: the shard ends before it does"
    sample.members[extension] = (member.offset_data, member.size)


def split_name(name):
    """ "a/b.c/0007.target.jpg" -> ("a/b.c/0007", "target.jpg")."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()
