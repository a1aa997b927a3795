"""Errors as a page may show them: each belongs to a field, and nothing of the server is in it."""

import contextlib
import logging
import re
import secrets
from collections.abc import Iterator

logger = logging.getLogger(__name__)

# /home/me/model, C:\models\x, file:///a/b: a separator and at least two names, so that a Hub id (one slash) stays
PATH: re.Pattern[str] = re.compile(r"(?:\w+:(?=/))?(?:[A-Za-z]:)?(?:[\\/]+[^\s'\"\\/:,;()<>\[\]]+){2,}[\\/]*")
FLAG = re.compile(r"--([a-z][a-z-]*)")


class FieldError(Exception):
    """Something that the user can fix, and the field where."""

    field: str
    message: str

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field, self.message = field, message

    def __reduce__(self):  # an exception is made of its arguments again, which are two here
        return FieldError, (self.field, self.message)


def clean(text: object) -> str:
    """One line of text without paths of the server, and with the command line's flags as words."""
    text = PATH.sub("(a file of the server)", str(text))
    text = FLAG.sub(lambda match: match[1].replace("-", " "), text)
    return " ".join(text.split())[:600]


@contextlib.contextmanager
def at(field: str) -> Iterator[None]:
    """Whatever goes wrong inside belongs to `field`.

    What the library says of a mistake is shown as it is, without paths; anything else is a bug or a full disk: its text
    goes to the server's log, and the page gets the number under which it is found there.
    """
    try:
        yield
    except FieldError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        logger.info("refused", exc_info=error)
        raise FieldError(field, clean(error)) from error
    except Exception as error:
        raise FieldError(field, unexpected(error)) from error


def unexpected(error: BaseException) -> str:
    """Log an error that no one foresaw, and return what may be said of it."""
    number = secrets.token_hex(4)
    logger.error("error %s", number, exc_info=error)
    if "out of memory" in str(error).lower():
        return "The server has too little memory for this. Make the image smaller, or use fewer controls."
    return f"Something went wrong on the server. Its log has the reason, under the number {number}."
