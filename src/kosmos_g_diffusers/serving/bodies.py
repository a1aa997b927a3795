"""What a request says, as JSON: bounded, of text that is text, and without anything that would be opened or fetched.

Images come as uploads or as data: URLs. Whatever else looks like a place, in chat content too, is refused with a sentence
before anyone could take it for one.
"""

import json
from collections.abc import Callable
from typing import Any

from .access import Message, Receive, Refused

MAX_VALUES = 20_000  # in one body: a few characters each would fill hundreds of megabytes as objects
NOT_HERE = "A file was named that was not uploaded here: handle_file uploads it."
NOT_FETCHED = "Addresses are not opened here. Send the image itself: as an upload, or as a data: URL."


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
    is_own_file: Callable[[str], bool] = lambda path: False,
    is_own_url: Callable[[str], bool] = lambda url: False,
) -> dict[str, Any]:
    """A JSON object whose texts are text, and in which no file and no address is named.

    Args:
        is_own_file: whether a `path` is of a file that was uploaded.
        is_own_url: whether a `url` is of one.

    Raises:
        Refused: anything else.
    """
    try:
        content = json.loads(body or b"null")
    except (ValueError, RecursionError):
        raise Refused(400, "This call is not JSON.") from None
    if not isinstance(content, dict):
        raise Refused(400, "This call is not a JSON object.")
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise Refused(413, f"This call has too many values: {MAX_VALUES:,} are possible.")
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


def _check_text(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(
            400, "A text of this call is not Unicode text: it has half of a surrogate pair in it."
        ) from None


def _check_places(value, is_own_file, is_own_url):
    if "path" in value and not (isinstance(value["path"], str) and is_own_file(value["path"])):
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
