"""Files that a client sends: written as they come, looked at before anyone is told their names, gone when they break off."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers

from .access import Message, Receive, Refused
from .bodies import int_or_zero
from .errors import FieldError
from .images import MAX_BYTES, MAX_FILES, check_image_file
from .store import WORDS_SUFFIX, Store, StoreFull, on_disk

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", WORDS_SUFFIX)
MAX_UPLOAD = MAX_FILES * (MAX_BYTES + 2**16)
SILENCE = 60.0  # seconds without a byte after which an upload counts as broken off
MAX_HEADER = 8192  # bytes of the header of one file
MAX_NAME = 100  # characters


class BrokenOff(Exception):
    """The client has gone in the middle."""


async def receive_files(scope: Message, receive: Receive, store: Store) -> list[Path]:
    """Take the files of a multipart request -> their paths in the store.

    Raises:
        Refused: too many, too large, of a wrong kind, or no room; then none of them is kept.
        BrokenOff: the same, and there is nobody to tell.
    """
    headers = Headers(scope=scope)
    if int_or_zero(headers.get("content-length")) > MAX_UPLOAD:
        raise _too_large(MAX_UPLOAD)
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refused(400, "Files come as multipart/form-data.")
    files = _Files(store)
    try:
        parser = MultipartParser(options[b"boundary"], files.callbacks())
        async for chunk in _chunks(receive):
            try:
                await asyncio.to_thread(parser.write, chunk)  # it may look for room on the disk
            except FormParserError:
                raise Refused(400, "This upload is not multipart/form-data.") from None
        files.check_end()
        await asyncio.to_thread(_check, files.paths)
        return files.paths
    except StoreFull as full:
        files.delete()
        raise Refused(507, str(full)) from None
    except BaseException:
        files.delete()
        raise
    finally:
        files.close()


async def _chunks(receive: Callable[[], Awaitable[Message]]):
    seen = 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), SILENCE)
        except TimeoutError:
            raise Refused(408, f"Nothing of this upload came for {SILENCE:.0f} seconds.") from None
        if message["type"] == "http.disconnect":
            raise BrokenOff
        seen += len(message.get("body", b""))
        if seen > MAX_UPLOAD:
            raise _too_large(MAX_UPLOAD)
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


class _Files:
    """Callbacks of the parser, which write each file where it belongs."""

    paths: list[Path]

    def __init__(self, store):
        self._store, self.paths = store, []
        self._begun, self._file, self._ended = [], None, False
        self._header_name, self._header, self._headers, self._size = b"", b"", {}, 0

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        names = "part_begin part_data part_end header_field header_value header_end headers_finished end"
        return {f"on_{name}": getattr(self, f"on_{name}") for name in names.split()}

    def on_part_begin(self) -> None:
        self._headers, self._size = {}, 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name = self._grown(self._header_name, data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = self._grown(self._header, data[start:end])

    def on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header
        self._header_name = self._header = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"filename" not in options:
            return  # a field, which nobody asked for
        if len(self.paths) == MAX_FILES:
            raise Refused(413, f"{MAX_FILES} files are possible at once, and more were sent.")
        name = _clean(options[b"filename"].decode("utf-8", "replace"))
        if Path(name).suffix.lower() not in SUFFIXES:
            raise Refused(415, "This is not an image: " + ", ".join(SUFFIXES) + " are taken.")
        self._store.make_room(0)
        path = self._store.new_upload_path(name)
        self._begun.append(self._store.using([path]))
        self._begun[-1].__enter__()
        self.paths.append(path)
        self._file: BinaryIO | None = open(path, "xb")  # noqa: SIM115  closed with the part

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._file is None:
            if self._size > MAX_HEADER:
                raise Refused(400, "Only files are taken here.")
            return
        if self._size > MAX_BYTES:
            raise _too_large(MAX_BYTES, "A file")
        if grown := on_disk(self._size) - on_disk(self._size - (end - start)):
            self._store.make_room(grown)
        self._file.write(data[start:end])

    def on_part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def on_end(self) -> None:
        self._ended = True

    def check_end(self) -> None:
        if not self._ended:
            raise Refused(400, "This upload ends too early.")
        if not self.paths:
            raise Refused(400, "No file was sent.")

    def close(self) -> None:
        self.on_part_end()
        while self._begun:
            self._begun.pop().__exit__(None, None, None)

    def delete(self) -> None:
        self.close()
        for path in self.paths:
            self._store.delete_upload(path)

    def _grown(self, text, more):
        if len(text) + len(more) > MAX_HEADER:
            raise Refused(400, "The headers of this upload are too long.")
        return text + more


def _too_large(limit, what="This"):
    return Refused(413, f"{what} is too large: {limit // 2**20} MB are possible.")


def _clean(name):
    """The last part of a file's name, as letters, digits and a few signs: users see it, and it becomes part of a path."""
    name = re.split(r"[/\\]", name)[-1]
    name = re.sub(r"[^\w.() -]+", "_", name)
    stem, dot, suffix = name.rpartition(".")
    return f"{stem.lstrip('. ')[:MAX_NAME] or 'image'}{dot}{suffix[:12]}"


def _check(paths: Sequence[Path]):
    for path in paths:
        if path.suffix.lower() != WORDS_SUFFIX:
            try:
                check_image_file(path)
            except FieldError as error:
                raise Refused(413, error.message) from error
