"""The output folder of the app: drawn images, and the images and image words that they were made from.

    images/20270131-235959-1f2e3d4c5b6a.png   what was made; the name cannot be guessed
    inputs/<sha256>.png                       what it was made from, named by its contents
    uploads/<16 random bytes>/cat.png         what users have sent, and what was made for them alone; a day later it goes

Settings name inputs by their path from an image, so that `kosmos-g generate --from` finds them too. A client names
files by their contents alone, or uploads by names that nobody else was told: no other string of a client is ever taken as a
path. Nothing is copied: an input and the upload that it came from are one file with two names.
"""

import contextlib
import io
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

from ..files import hash_bytes, hash_file, remove_partial_files, written_atomically
from ..generation.png import read_settings
from ..generation.settings import GenerationSettings, InputImage
from .errors import FieldError
from .images import FORMATS, MAX_BYTES, MAX_FILES, MAX_PIXELS, check_image_file, data_uri, open_image_file

__all__ = ["FORMATS", "MAX_BYTES", "MAX_FILES", "MAX_PIXELS", "Store", "StoreFull"]
__all__ += ["check_image_file", "data_uri", "open_image_file"]

WORDS_SUFFIX = ".safetensors"
UPLOADS_KEPT = 86_400  # seconds; what a run used is among the inputs by then
TIDYING = 600  # seconds between two looks for what is older
IMAGES, INPUTS, UPLOADS = "images", "inputs", "uploads"
EXAMPLES = "examples"  # among the uploads; they stay
DISK_LIMIT = 2 * 2**30  # bytes of uploads and inputs
BLOCK = 4096  # a file takes as many whole ones of a disk
PATIENCE = 5  # seconds before a folder is looked through again in which nothing more may go
MANY = 2000  # files


class StoreFull(ValueError):
    """There is no room for another file. Its text is a sentence for whoever sent it."""


class _File(NamedTuple):
    path: Path
    size: int  # on the disk
    time: float  # of the last change or use
    inode: int


class Store:
    """Files of the app in `folder`, which is made when it is not there.

    Args:
        folder: the output folder.
        limit: bytes that uploads and inputs may take; the oldest go first, but never one that is being used, that an image
            needs to be made again, or an example.
        prunes_images: count what was drawn too, and delete the oldest where nothing else is left.
    """

    folder: Path
    limit: int
    prunes_images: bool
    removed: set[str]

    def __init__(self, folder: str | Path, limit: int = DISK_LIMIT, prunes_images: bool = False):
        self.folder, self.limit, self.prunes_images = Path(folder), limit, prunes_images
        self.removed = set()  # names of images that were deleted for the limit
        self._lock = threading.RLock()
        self._held = weakref.WeakKeyDictionary()  # who uses them -> SHA-256 of inputs, names of images
        self._reading = Counter()  # paths of uploads that are being read or written
        self._needed = {}  # name of an image -> SHA-256 of its inputs
        self._pruned = self._tidied = float("-inf")
        for name in (IMAGES, INPUTS, UPLOADS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.folder / name, older_than=UPLOADS_KEPT)
        self._used = 0
        self.tidy()

    # What is put in ----------------------------------------------------------------------------------------------

    def put_example(self, name: str, image: str | Path | PIL.Image.Image) -> Path:
        """Write an image, a path or a PIL image, among the uploads, under a name that users see; returns its path."""
        path = self.folder / UPLOADS / EXAMPLES / name
        with written_atomically(path) as file:
            if isinstance(image, PIL.Image.Image):
                image.save(file, format="PNG")
            else:
                file.write(Path(image).read_bytes())
        return path

    def new_image_path(self) -> Path:
        """Path for an image that is about to be written."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(6)}.png"
        return self.folder / IMAGES / name

    def new_upload_path(self, name: str) -> Path:
        """Path among the uploads, in a folder of its own whose name cannot be guessed; `name` is the last part."""
        folder = self.folder / UPLOADS / secrets.token_hex(16)
        folder.mkdir()
        return folder / name

    def lend(self, path: Path, name: str | None = None) -> Path:
        """An input under a new name among the uploads, to be given to one user: without a copy."""
        lent = self.new_upload_path(name or path.name)
        _link(path, lent)
        return lent

    def keep_upload(self, path: str | Path, field: str) -> InputImage:
        """Keep an uploaded image; returns it as settings name it. Raises FieldError as `check_image_file` does."""
        suffix = f".{check_image_file(path, field).lower()}"
        try:
            digest = hash_file(path)
            kept = self.folder / INPUTS / f"{digest}{suffix}"
            if kept.exists():
                os.utime(kept)
            else:
                _link(path, kept)
        except FileNotFoundError:
            raise FieldError(field, "An image is no longer on the server. Drop it again.") from None
        return InputImage(f"../{INPUTS}/{kept.name}", digest)

    def keep_drawn(self, image: PIL.Image.Image) -> InputImage:
        """The same for a PIL image that was made here."""
        file = io.BytesIO()
        image.save(file, format="PNG")
        return self._keep(file.getvalue(), ".png")

    def keep_word(self, pipe: Any, word: str) -> InputImage:
        """The same for an image word that a pipeline knows."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"word{WORDS_SUFFIX}"
            pipe.save_image_words(file, [word])
            return self._keep(file.read_bytes(), WORDS_SUFFIX)

    def _keep(self, content, suffix):
        digest = hash_bytes(content)
        kept = self.folder / INPUTS / f"{digest}{suffix}"
        if kept.exists():
            os.utime(kept)
        else:
            self.make_room(on_disk(len(content)))
            with written_atomically(kept) as file:
                file.write(content)
        return InputImage(f"../{INPUTS}/{kept.name}", digest)

    def find(self, file: InputImage) -> Path | None:
        """Path of an InputImage by its SHA-256, checked when it was made, and not by its path; None if it is not here."""
        return next((self.folder / INPUTS).glob(f"{file.sha256}.*"), None)

    def find_all(self, files: Iterable[InputImage], field: str) -> list[Path]:
        """The same for several. Raises FieldError if one is not here."""
        found = [self.find(file) for file in files]
        if None in found:
            raise FieldError(field, "An image of this run is no longer on the server. Drop it again.")
        return found

    # What is used, and what may go -----------------------------------------------------------------------------------

    def hold(self, owner: object, files: Iterable[InputImage | Path]) -> None:
        """Keep inputs and drawn images as long as `owner` lives, a run or a session."""
        with self._lock:
            names = {file.name if isinstance(file, Path) else file.sha256 for file in files}
            self._held.setdefault(owner, set()).update(names)

    def release(self, owner: object, file: InputImage) -> None:
        """The owner needs this one no longer."""
        with self._lock:
            self._held.get(owner, set()).discard(file.sha256)

    @contextlib.contextmanager
    def using(self, paths: Iterable[str | Path]) -> Iterator[None]:
        """Keep uploads as long as the block lasts."""
        names = [_upload_of(path) for path in paths]
        with self._lock:
            self._reading.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._reading.subtract(names)
                self._reading += Counter()  # drops what is zero

    def make_room(self, size: int) -> None:
        """Count `size` more bytes of the disk, and delete what may go where they do not fit.

        Raises:
            StoreFull: that is too little.
        """
        with self._lock:
            self.tidy()
            if self._used + size > self.limit and time.monotonic() - self._pruned > PATIENCE:
                self._prune(size)
            if self._used + size > self.limit:
                raise StoreFull(
                    "The disk space of this server is used up, so no file can be taken now. Try again later; whoever runs "
                    "the server can start it with a larger --disk-limit."
                )
            self._used += size

    def count_image(self, path: Path, settings: GenerationSettings) -> None:
        """An image was drawn and written; it counts where images do."""
        with self._lock:
            self._needed[path.name] = _inputs_of(settings)
            if self.prunes_images:
                self._used += on_disk(path.stat().st_size)
                if self._used > self.limit:
                    self._prune(0)

    def delete_upload(self, path: Path) -> None:
        """Delete an upload with its folder; nothing happens if it is not there."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            self._used -= on_disk(path.stat().st_size)
            shutil.rmtree(path.parent)
        with contextlib.suppress(OSError):  # the file was never begun
            path.parent.rmdir()

    def tidy(self) -> None:
        """Delete uploads that are a day old. Returns at once if that was done a short time ago."""
        with self._lock:
            if time.monotonic() - self._tidied < TIDYING:
                return
            self._tidied = time.monotonic()
            for path in (self.folder / UPLOADS).iterdir():
                with contextlib.suppress(FileNotFoundError):  # broken off meanwhile
                    is_old = time.time() - path.stat().st_mtime > UPLOADS_KEPT
                    if path.name != EXAMPLES and is_old and path.name not in self._reading:
                        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                        self._pruned = float("-inf")
            self._used = _measure(self._files())

    def _prune(self, size):
        """Delete the oldest files that may go until `size` bytes fit, if that is possible."""
        files = self._files()
        self._used = _measure(files)
        links = Counter(file.inode for file in files)
        # with many files each look takes long: then there is room for some more afterwards
        wanted = self.limit - size - (self.limit // 20 if len(files) > MANY else 0)
        for file in self._candidates(files):
            if self._used <= wanted:
                return
            with contextlib.suppress(OSError):
                file.path.unlink()
                links[file.inode] -= 1
                if not links[file.inode]:
                    self._used -= file.size
                if file.path.parent.name == IMAGES:
                    self.removed.add(file.path.name)
                elif file.path.parent.name != INPUTS:
                    file.path.parent.rmdir()
        if self._used + size > self.limit:
            self._pruned = time.monotonic()  # in vain

    def _candidates(self, files):
        """What may be deleted, in the order in which it is: the oldest first, images last, each with what it needed."""
        held = set().union(*self._held.values())
        images = [file for file in files if file.path.parent.name == IMAGES]
        self._learn_needs()
        needed = Counter(digest for digests in self._needed.values() for digest in digests)
        inputs = {file.path.name.partition(".")[0]: file for file in files if file.path.parent.name == INPUTS}
        free = [file for digest, file in inputs.items() if digest not in held and not needed[digest]]
        for file in files:
            if file.path.parent.name not in (IMAGES, INPUTS, EXAMPLES):
                if _upload_of(file.path) not in self._reading:
                    free.append(file)
        yield from sorted(free, key=lambda file: file.time)
        for image in sorted(images, key=lambda file: file.time) if self.prunes_images else ():
            if image.path.name in held:
                continue
            yield image
            for digest in self._needed.pop(image.path.name, ()):
                needed[digest] -= 1
                if not needed[digest] and digest in inputs and digest not in held:
                    yield inputs[digest]

    def _learn_needs(self):
        """Which inputs the images need that are there: each image is read once."""
        there = {path.name: path for path in (self.folder / IMAGES).glob("*.png")}
        self._needed = {name: needs for name, needs in self._needed.items() if name in there}
        for name, path in there.items():
            if name not in self._needed:
                try:
                    self._needed[name] = _inputs_of(read_settings(path))
                except (ValueError, FileNotFoundError):  # not drawn here, or taken away by hand
                    self._needed[name] = frozenset()

    def _files(self):
        found = []
        for name in (IMAGES, INPUTS, UPLOADS) if self.prunes_images else (INPUTS, UPLOADS):
            for folder, _, names in os.walk(self.folder / name):
                for entry in filter(lambda name: not name.startswith("."), names):
                    path = Path(folder) / entry
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        found.append(_File(path, on_disk(stat.st_size), stat.st_mtime, stat.st_ino))
        return found


def _measure(files):
    return sum({file.inode: file.size for file in files}.values())


def _inputs_of(settings):
    return frozenset(file.sha256 for file in settings.files)


def _upload_of(path):
    """What an upload is counted by: the name of its folder."""
    return Path(path).parent.name


def on_disk(size: int) -> int:
    """Bytes that a file of `size` bytes takes."""
    return -(-size // BLOCK) * BLOCK


def _link(path, new):
    """Give a file a second name; where the file system has no links, a copy."""
    try:
        os.link(path, new)
    except FileNotFoundError:
        raise
    except FileExistsError:  # another run was quicker
        pass
    except OSError:
        with written_atomically(new) as file:
            file.write(Path(path).read_bytes())
