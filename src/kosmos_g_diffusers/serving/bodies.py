"""What a request says, as JSON: bounded, of text that is text, and without anything that would be opened or fetched.

Images come as uploads or as data: URLs. Whatever else looks like a place, in chat content too, is refused with a sentence
before anyone could take it for one.
"""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from .access import Message, Receive, Refused

MAX_VALUES = 20_000  # in one body: a few characters each would fill gigabytes as objects
# what there are at most three of for each value: texts and names, commas, and where a list or an object begins
PIECES = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)
LARGE = 2**20  # bytes; one larger body is parsed at a time, which takes several times its memory
MAX_BODY = 64 * 2**20  # bytes of a request that holds images
MAX_BODIES = 256 * 2**20  # of all such requests together
NOT_HERE = "A file was named that was not uploaded here: handle_file uploads it."
NOT_OPENED = "Paths are not opened here. Send the image itself: as an upload, or as a data: URL."
NOT_FETCHED = "Addresses are not opened here. Send the image itself: as an upload, or as a data: URL."


_parsing = threading.Lock()


class Bodies:
    """Bytes of bodies that are held at the same time, of the whole server."""

    def __init__(self, most: int = MAX_BODIES):
        self._most, self._used = most, 0

    @contextlib.contextmanager
    def holding(self, headers: Mapping[str, str]) -> Iterator[None]:
        """Count a body by the headers of its request, as the largest where they tell no length. Raises Refused where there is
        no room for it."""
        size = min(int_or_zero(headers.get("content-length")) or MAX_BODY, MAX_BODY)
        if self._used and self._used + size > self._most:
            raise Refused(
                503, "The server is reading too many requests. Try again soon.", {"retry-after": "2"}
            )
        self._used += size
        try:
            yield
        finally:
            self._used -= size


def int_or_zero(text: str | None) -> int:
    """A number of a header; 0 for none, and for what is not a number."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 20 else 0


async def read_body(receive: Receive, limit: int, length: int = 0) -> bytes:
    """The body of a request of at most `limit` bytes; `length` is what its header says. Raises Refused."""
    too_large = Refused(413, f"This is too large: {limit / 2**20:g} MB are possible at once.")
    if length > limit:
        raise too_large
    pieces, seen = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "This request ends too early.")
        pieces.append(message.get("body", b""))
        seen += len(pieces[-1])
        if seen > limit:
            raise too_large
        if not message.get("more_body"):
            return b"".join(pieces)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read once more, and then what follows it."""
    bodies = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return bodies.pop() if bodies else await receive()

    return receive_again


def read_json_body(
    body: bytes,
    is_own_file: Callable[[str], bool] | None = None,
    is_own_url: Callable[[str], bool] = lambda url: False,
) -> dict[str, Any]:
    """A JSON object whose texts are text, and in which no file and no address is named.

    Args:
        is_own_file: whether a `path` is of a file that was uploaded; None where files have none.
        is_own_url: whether a `url` is of one.

    Raises:
        Refused: anything else.
    """
    with _parsing if len(body) > LARGE else contextlib.nullcontext():
        try:
            content = parse_json(str(body or b"null", "utf-8-sig"))
        except (ValueError, RecursionError):
            raise Refused(400, "This call is not JSON.") from None
    if not isinstance(content, dict):
        raise Refused(400, "This call is not a JSON object.")
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise _too_many_values()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            for key in value:
                _check_text(key)
            _check_places(value, is_own_file, is_own_url)
            waiting.extend(value.values())
    return content


def parse_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError or RecursionError where it is none; Refused for one of too many values, before
    any of them is made."""
    if next(islice(PIECES.finditer(text), 3 * MAX_VALUES, None), None) is not None:
        raise _too_many_values()
    return json.loads(text)


def _too_many_values():
    return Refused(413, f"This call has too many values: {MAX_VALUES:,} are possible.")


def _check_text(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(
            400, "A text of this call is not Unicode text: it has half of a surrogate pair in it."
        ) from None


def _check_places(value, is_own_file, is_own_url):
    if "path" in value:
        if is_own_file is None:
            raise Refused(400, NOT_OPENED)
        if not (isinstance(value["path"], str) and is_own_file(value["path"])):
            raise Refused(400, NOT_HERE)
    url, image = value.get("url"), value.get("image_url")
    if isinstance(image, dict):
        image = image.get("url", image)
    if image is not None and not _is_data(image):
        raise Refused(400, NOT_FETCHED)
    if url is not None and not (_is_data(url) or isinstance(url, str) and is_own_url(url)):
        raise Refused(400, NOT_FETCHED)


def _is_data(url):
    return isinstance(url, str) and url[:5].lower() == "data:"
