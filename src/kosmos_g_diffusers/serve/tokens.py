"""Bearer tokens: read from a file or the environment, kept as hashes, compared in constant time."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "KOSMOS_G_TOKENS"
SHORTEST = 16  # characters; what is shorter can be guessed
MAKE = "Make one with: openssl rand -hex 32"


class Tokens:
    """Who may ask.

    Args:
        tokens: any number of them; without one everybody may ask.

    Raises:
        ValueError: one is short, or has characters that no header has.
    """

    def __init__(self, tokens: Iterable[str] = ()):
        self._hashes = []
        for number, token in enumerate(tokens, 1):
            if len(token) < SHORTEST or not (token.isascii() and token.isprintable()) or " " in token:
                raise ValueError(
                    f"Token {number} is not one of {SHORTEST} or more letters, digits and signs. {MAKE}"
                )
            self._hashes.append(_hash(token))

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def name_of(self, header: str | None) -> str | None:
        """What tells a client from others by its `Authorization` header, "" where nobody needs one; None if it may not ask."""
        if not self._hashes:
            return ""
        kind, _, token = (header or "").partition(" ")
        given, found = _hash(token.strip()), None
        for known in self._hashes:  # all of them, so that the time tells nothing
            if hmac.compare_digest(given, known):
                found = known.hex()[:16]
        return found if kind.lower() == "bearer" else None


def read_tokens(file: str | Path | None = None) -> Tokens:
    """The tokens of a file, one a line (empty lines and those that begin with # are left out), or of KOSMOS_G_TOKENS.

    The variable, tokens between commas or white space, is forgotten: what the server starts would have it too.

    Raises:
        ValueError: the file cannot be read or has none, or a token is short.
    """
    variable = os.environ.pop(VARIABLE, None)
    if file is None:
        return Tokens((variable or "").replace(",", " ").split())
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file {str(file)!r} cannot be read ({error}). Pass a text file.") from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise ValueError(f"--token-file {str(file)!r} has no token: one a line. {MAKE}")
    return Tokens(found)


def _hash(token):
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
