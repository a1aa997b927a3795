"""The files of a set of shards: found, counted, fetched from afar, read; and where in each its samples lie."""

import glob
import json
import logging
import os
import re
import shutil
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm.auto import tqdm

from ..files import (
    MOST_JSON_BYTES,
    cache_path,
    default_cache_dir,
    keep_below,
    read_json,
    remove_partial_files,
    write_text,
    written_atomically,
)
from ..quiet import SHORT
from .sample import MOST_IMAGE_BYTES, BadSample

logger = logging.getLogger(__name__)

INDEX_NAME = "shards.json"
HTTP_SECONDS = 10  # for the answer whether a shard has changed
URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # two letters at least: "C:" is a disk


class ShardFiles:
    """A list of shards that are local, or fetched whole and kept in a cache folder.

    A copy is kept with what the server and shards.json said of it. Once a run both are asked again, and a shard that has changed is
    fetched anew; a server that does not answer is believed to have the same.

    Args:
        where: a .tar file, a pattern (/data/*.tar), a range (/data/part-{000..099}.tar), a folder, a shards.json; or any
            URL that webdataset opens, with a range or of a shards.json.
        cache_dir, cache_bytes: see `ShardSource`.

    `shards.json` lists shards with their numbers of samples, as WebDataset's `wids` does: {"shardlist": [{"url": name,
    "nsamples": n}, ...]}. It is looked for next to the shards. Without it, they are counted once, which takes a reading
    of all headers, and for remote shards the fetching of everything.

    Raises:
        ValueError: no data found, or shards that shards.json names are missing (all are named).
    """

    where: str
    cache_dir: Path
    cache_bytes: int | None
    remote: bool
    urls: list[str]
    names: list[str]

    def __init__(
        self, where: str | Path, *, cache_dir: str | Path | None = None, cache_bytes: int | None = None
    ):
        self.where, self.cache_bytes = str(where), cache_bytes
        self.cache_dir = Path(default_cache_dir() if cache_dir is None else cache_dir)
        self.remote = URL.match(self.where) is not None
        self._samples = {}  # url -> number of samples, as far as shards.json tells
        self._sizes = {}  # url -> bytes, likewise
        self._checked, self._opened = set(), time.time()
        self.urls = self._find_remote() if self.remote else self._find_local()
        if not self.urls:
            raise ValueError(
                f"No data found at {where}: there is no .tar file of that name or pattern, and no folder with .tar files "
                f"or a {INDEX_NAME}. A range is written part-{{000..099}}.tar."
            )
        self.names = [_short(url) for url in self.urls]

    def __len__(self) -> int:
        return len(self.urls)

    def count(self) -> list[int]:
        """Number of samples of each shard. One that cannot be read and is not in shards.json counts as one sample."""
        missing = [number for number, url in enumerate(self.urls) if url not in self._samples]
        for number in tqdm(missing, f"{self.where}: counting", disable=len(missing) < 2, delay=SHORT):
            self._samples[self.urls[number]] = self._count(number)
        return [self._samples[url] for url in self.urls]

    def identify(self, number: int) -> tuple[Any, ...] | None:
        """What tells a shard from what it was before: of local ones place, size and time, else what is listed of it. None if it is gone."""
        url = self.urls[number]
        if self.remote:
            return (url, *sorted(self._listed(url).items()))
        try:
            stat = os.stat(url)
        except OSError:
            return None
        return (os.path.abspath(url), stat.st_size, stat.st_mtime_ns, self._samples.get(url))

    def index(self, number: int) -> "list[TarSample]":
        """The samples of a shard, see `index_tar`. Raises BadSample ("shard")."""

        def index(path):
            try:
                return self._read_or_make_index(path)
            except BadSample as error:
                message = error.message.replace(str(path), _plain(self.urls[number]))
                raise BadSample(error.cause, message) from error

        return self._use(number, index)

    def _read_or_make_index(self, path):
        """The samples of a tar file; once found they are kept, for all processes that read of it."""
        cached = _members_path(path) if self.remote else self._kept_members(path)
        if (samples := _load_samples(cached)) is not None:
            return samples
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(
                f"{cached}.lock"
            ):  # of many processes one reads all headers, the others wait for it
                if (samples := _load_samples(cached)) is None:
                    samples = index_tar(path)
                    kept = [[sample.key, sample.members, sample.problem] for sample in samples]
                    write_text(cached, json.dumps(kept, ensure_ascii=True, separators=(",", ":")))
                return samples
        except OSError:
            if not os.path.exists(path):
                raise
            return index_tar(path)  # a cache that cannot be written costs time only

    def _kept_members(self, path):
        stat = os.stat(path)
        return cache_path(
            self.cache_dir, "members", os.path.abspath(path), stat.st_size, stat.st_mtime_ns, suffix=".json"
        )

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises BadSample ("shard"; "image" when they are too many)."""
        name = self.names[number]
        if size > MOST_IMAGE_BYTES:
            raise BadSample("image", f"{name} has a member of {size:,} bytes, over {MOST_IMAGE_BYTES:,}")

        def read_part(path):
            # opened for each part: nothing is shared between processes, and nothing is left open
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)

        data = self._use(number, read_part)
        if len(data) != size:
            raise BadSample("shard", f"{name} is cut off at byte {offset + len(data):,}")
        return data

    def _use(self, number, function):
        """`function` of the path of a shard, which is fetched if need be."""
        for attempt in range(2):
            path = self._local_path(self.urls[number])
            try:
                return function(path)
            except OSError as error:
                # another process may just have deleted a fetched shard to make room: fetch it again
                if not self.remote or attempt:
                    raise BadSample("shard", f"{self.names[number]} cannot be read ({error})") from error

    # Finding and counting ------------------------------------------------------------------------------------------

    def _find_local(self):
        path = Path(self.where).expanduser()
        if path.is_dir():
            listed = self._read_index(path / INDEX_NAME) if (path / INDEX_NAME).is_file() else []
            return listed + sorted(str(file) for file in path.glob("*.tar") if str(file) not in listed)
        if path.is_file() and path.suffix == ".json":
            return self._read_index(path)
        urls = []
        for url in _expand_braces(self.where):
            url = str(Path(url).expanduser())
            urls += sorted(glob.glob(url, recursive=True)) if glob.has_magic(url) else [url]
        missing = [url for url in urls if not os.path.isfile(url)]
        if missing and len(urls) > 1:
            raise ValueError(
                f"{len(missing)} of the {len(urls)} shards of {self.where} are missing: {', '.join(missing)}."
            )
        if missing:
            return []
        for folder in {Path(url).parent for url in urls}:
            if (folder / INDEX_NAME).is_file():
                self._note_samples(read_json(folder / INDEX_NAME), folder / INDEX_NAME, str(folder))
        return urls

    def _find_remote(self):
        base = self.where.rpartition("/")[0]
        if self.where.endswith(".json"):
            return self._note_samples(self._fetch_json(self.where), self.where, base)
        index = f"{base}/{INDEX_NAME}"
        if URL.match(self.where).group().lower() != "pipe:":
            try:
                self._note_samples(self._fetch_json(index), index, base)
            except OSError as error:
                logger.warning("No %s (%s): shards are fetched to count them.", index, _hide(index, error))
        return _expand_braces(self.where)

    def _read_index(self, path):
        """The shards that a local shards.json lists."""
        urls = self._note_samples(read_json(path), path, str(path.parent))
        missing = [url for url in urls if not os.path.isfile(url)]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(urls)} shards that {path} names are missing: {', '.join(missing)}. Put them "
                "there, or take them out of the list."
            )
        return urls

    def _note_samples(self, index, path, base):
        """Remember the counts of a shards.json and return its shards. Raises ValueError if it is not one."""
        shards = index.get("shardlist") if isinstance(index, dict) else None
        if not isinstance(shards, list) or not all(
            isinstance(shard, dict)
            and isinstance(shard.get("url"), str)
            and isinstance(shard.get("nsamples"), int)
            and shard["nsamples"] >= 0
            for shard in shards
        ):
            raise ValueError(
                f'{path} is not a list of shards. Expected {{"shardlist": [{{"url": "000.tar", "nsamples": 1000}}, ...]}}.'
            )
        # shards lie next to their list: of what it calls them, only the last part counts
        urls = [os.path.join(base, os.path.basename(shard["url"])) for shard in shards]
        self._samples.update(zip(urls, (shard["nsamples"] for shard in shards), strict=True))
        sizes = zip(urls, (shard.get("filesize") for shard in shards), strict=True)
        self._sizes.update({url: size for url, size in sizes if isinstance(size, int)})
        return urls

    def _count(self, number):
        try:
            stat = self._use(number, os.stat)
            identity = (os.path.abspath(self.urls[number]), stat.st_size, stat.st_mtime_ns)
            cached = cache_path(self.cache_dir, "counts", *identity, suffix=".json")
            with suppress(OSError, ValueError):
                return int(cached.read_text())
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{cached}.lock"):  # of many processes one counts, the others wait for it
                    with suppress(OSError, ValueError):
                        return int(cached.read_text())
                    samples = len(self.index(number))
                    write_text(cached, str(samples))
            except OSError as error:  # costs time only
                logger.warning("Counts of samples are not kept in %s (%s).", self.cache_dir, error)
                samples = len(self.index(number))
        except BadSample as error:
            logger.warning("%s", error.message)
            return 1
        return samples

    # Fetching ------------------------------------------------------------------------------------------------------

    def _local_path(self, url):
        if not self.remote:
            return url
        path = cache_path(self.cache_dir, "shards", url, suffix=".tar")
        if self._is_current(url, path):
            with suppress(FileNotFoundError):
                os.utime(path)  # used now: the last to be deleted
                return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of many workers one fetches, the others wait for it
            if not self._is_current(url, path):
                remove_partial_files(path.parent, path.name)  # of a process that was killed while it fetched
                self._fetch(url, path)
                self._make_room(path)
        return path

    def _is_current(self, url, path):
        """Whether a copy is there, and as the server and shards.json have it."""
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if url in self._checked:
            return True
        record, facts = _read_facts(path), None
        if record.get("checked", 0) < self._opened:  # else another process of this run has looked
            listed = self._listed(url)
            before = record.get("listed", {})
            differs = any(before.get(name, value) != value for name, value in listed.items())
            # where the same list contradicted it before, another copy would be the same
            if differs or (listed.get("bytes", size) != size and listed != before):
                return False
            facts = _ask(url)
            known = {"length": size, **record}
            if any(known.get(name, value) != value for name, value in facts.items()):
                return False
            _write_facts(path, {**record, **facts, "listed": listed})
        self._checked.add(url)
        return True

    def _listed(self, url):
        """What shards.json says of a shard."""
        listed = {"samples": self._samples.get(url), "bytes": self._sizes.get(url)}
        return {name: value for name, value in listed.items() if value is not None}

    def _fetch(self, url, path):
        facts = _ask(url)
        _members_path(path).unlink(missing_ok=True)  # those of the copy before
        try:
            # the stream is closed first, and that raises when the command behind it failed
            with written_atomically(path) as file, _webdataset().gopen(url, "rb") as stream:
                start = stream.read(tarfile.BLOCKSIZE)
                file.write(start)
                shutil.copyfileobj(stream, file, 1024**2)
                if not _begins_tar(start):
                    raise BadSample(
                        "shard",
                        f"{_plain(url)} is not an uncompressed tar file: it begins with {start[:20]!r}. It was not kept",
                    )
                length = file.tell()
                if facts.get("length", length) != length:
                    raise BadSample(
                        "shard",
                        f"{_plain(url)} came with {length:,} of {facts['length']:,} bytes. It was not kept",
                    )
        except OSError as error:
            raise BadSample("shard", f"{_plain(url)} cannot be fetched ({_hide(url, error)})") from error
        _write_facts(path, {**facts, "length": length, "listed": self._listed(url)})
        self._checked.add(url)

    def _make_room(self, keep):
        if self.cache_bytes is None:
            return
        for removed in keep_below(keep, self.cache_bytes):
            _facts_path(removed).unlink(missing_ok=True)
            _members_path(removed).unlink(missing_ok=True)

    def _fetch_json(self, url):
        with _webdataset().gopen(url, "rb") as stream:
            data = stream.read(MOST_JSON_BYTES)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{url} is not JSON ({error}). Expected a list of shards.") from error


def _ask(url):
    """What a server says of a shard without sending it: a dict of length, etag and modified, as far as it tells."""
    if not url.lower().startswith(("http://", "https://")):
        return {}
    try:
        headers = {"Accept-Encoding": "identity"}
        answer = requests.head(url, headers=headers, timeout=HTTP_SECONDS, allow_redirects=True)
    except requests.RequestException:
        return {}
    if answer.status_code != 200:  # such as where a signature is for GET alone
        return {}
    names = {"etag": "ETag", "modified": "Last-Modified"}
    facts = {name: answer.headers[header] for name, header in names.items() if header in answer.headers}
    length = answer.headers.get("Content-Length", "")
    return facts | (
        {"length": int(length)} if length.isdecimal() and "Content-Encoding" not in answer.headers else {}
    )


def _facts_path(path):
    return path.with_suffix(".json")


def _members_path(path):
    """Where the members of a copy are kept: next to it, since the time of a copy is that of its last use."""
    return path.with_suffix(".members")


def _read_facts(path):
    """What is known of a copy; when it was looked at last is `checked`."""
    try:
        facts = json.loads(_facts_path(path).read_text(encoding="utf-8"))
        return {**facts, "checked": _facts_path(path).stat().st_mtime}
    except (OSError, ValueError, TypeError):  # of an earlier version, or damaged
        return {}


def _write_facts(path, facts):
    with suppress(OSError):  # costs another look
        write_text(
            _facts_path(path), json.dumps({name: value for name, value in facts.items() if name != "checked"})
        )


def _begins_tar(block):
    if len(block) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # of an empty archive
        return True
    except tarfile.HeaderError:
        return False
    return True


def _plain(url):
    """A URL without user, password and query; of a command the part that `_short` shows. A path as it is."""
    if URL.match(url) is None:
        return url
    parts = urlsplit(url)
    if parts.scheme == "pipe" or not parts.path:
        return _short(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _short(url):
    """Folder and name: enough to find a shard again, without the secrets that a signed URL ends in."""
    folder, _, name = url.partition("?")[0].rpartition("/")
    return f"{folder.rpartition('/')[2]}/{name}" if folder else name


def _hide(url, error):
    return str(error).replace(url, _short(url))


def _webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "Shards with a range or a URL need the package webdataset: pip install 'kosmos-g-diffusers[train]'"
        ) from error
    return webdataset


def _expand_braces(where):
    return _webdataset().shardlists.expand_urls(where) if "{" in where else [where]


@dataclass
class TarSample:
    """Members of one sample: extension ("json", "target.jpg") -> (offset, size) of its bytes."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str | None = None


def index_tar(path: str | Path) -> list[TarSample]:
    """The samples of a tar file: a list of `TarSample`, in the file's order, found by reading the headers alone.

    As WebDataset has it, a sample is a run of members whose names are alike up to the first dot of the last part.
    Names are only ever compared, never used as paths; links, devices and sparse files are ignored. Where the file
    is cut off or damaged, the samples up to there are given, the last of them with its `problem` set.

    Raises:
        BadSample: cause "shard"; the file is not a plain tar file.
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


def _load_samples(cached):
    """The samples that are kept of a tar file, None if they are not there or damaged."""
    try:
        kept = json.loads(cached.read_bytes())
        return [
            TarSample(key, {name: (offset, size) for name, (offset, size) in members.items()}, problem)
            for key, members, problem in kept
        ]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


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


def split_name(name: str) -> tuple[str, str]:
    """ "a/b.c/0007.target.jpg" -> ("a/b.c/0007", "target.jpg")."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()
