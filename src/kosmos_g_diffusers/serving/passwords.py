"""Names and passwords: read from a file or the environment, kept as hashes, and guessed at only slowly."""

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

from .access import Refused

logger = logging.getLogger(__name__)

VARIABLE = "KOSMOS_G_AUTH"
BCRYPT = re.compile(r"\$2[abxy]\$(\d\d)\$[./A-Za-z0-9]{53}")
ARGON2 = re.compile(r"\$argon2(id|i|d)\$v=\d+\$m=(\d+),t=(\d+),p=(\d+)\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+")
# what htpasswd and others write, by how it begins; none of it is slow enough to guess at
OTHERS = {
    "$apr1$": "htpasswd's MD5",
    "$1$": "MD5 crypt",
    "$5$": "SHA-256 crypt",
    "$6$": "SHA-512 crypt",
    "$y$": "yescrypt",
    "{SHA}": "htpasswd's SHA-1",
    "{SSHA}": "salted SHA-1",
    "$pbkdf2": "PBKDF2",
    "$scrypt$": "scrypt",
    "pbkdf2:": "PBKDF2",
    "scrypt:": "scrypt",
}
MAX_PASSWORD = 1000  # characters; more is not a password
BCRYPT_BYTES = 72  # which bcrypt reads, of any password
MOST_COST = {"bcrypt": 15, "argon2": 2**20}  # rounds as a power of 2; KiB of memory
PER_ADDRESS = "10 per 5 minutes"  # wrong guesses of one address
PER_ACCOUNT = "30 per 15 minutes"  # at one account, from wherever they come
WAITS = (
    0.0,
    0.25,
    0.5,
    1.0,
    2.0,
)  # seconds before the answer to the first wrong guesses; then the last of them
INSTALL = "pip install 'kosmos-g-diffusers[app]'"


class Accounts:
    """Who may log in.

    Args:
        secrets: name -> password, or its hash by bcrypt or argon2.

    Raises:
        ValueError: a hash of another format.
    """

    def __init__(self, passwords: Mapping[str, str]):
        self._hashes = dict(passwords)
        # as slow as the others, so that no one learns which names there are
        self._nobody = next((known for known in self._hashes.values() if is_hash(known)), "")

    def check(self, user: str, password: str) -> bool:
        """Whether they may; takes as long for a name that there is not."""
        known = self._hashes.get(user)
        if len(password) > MAX_PASSWORD:
            return False
        matches = _matches(password, self._nobody or "x" if known is None else known)
        return matches and known is not None


def read_line(line: str, where: str) -> tuple[str, str]:
    """ "user:hash" -> (user, hash). ValueError names a format that is refused; `where` begins it."""
    user, colon, known = map(str.strip, line.partition(":"))
    if not (user and colon and known):
        raise ValueError(
            f"{where} is not of the form USER:HASH. Write one with: kosmos-g app --hash-password"
        )
    if not is_hash(known):
        name = next(
            (name for start, name in OTHERS.items() if known.startswith(start)), "no hash that is known"
        )
        raise ValueError(
            f"{where} has {name} as its hash; bcrypt (htpasswd -B) and argon2 are taken. Write one with: kosmos-g app "
            "--hash-password"
        )
    _check_cost(known, where)
    return user, known


def read_file(path: str | Path) -> dict[str, str]:
    """A file with a line `user:hash` for each user -> {user: hash}. Empty lines and those that begin with # are left out.

    Raises:
        ValueError: it cannot be read, has no line, names a user twice, or has a hash of another format.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--auth-file {str(path)!r} cannot be read ({error}). Pass a text file.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            user, known = read_line(line, f"Line {number} of {str(path)!r}")
            if user in found:
                raise ValueError(f"Line {number} of {str(path)!r} names {user!r} a second time.")
            found[user] = known
    if not found:
        raise ValueError(
            f"--auth-file {str(path)!r} names no user. Write one with: kosmos-g app --hash-password"
        )
    return found


def is_hash(text: str) -> bool:
    """Whether a text is a hash by bcrypt or argon2."""
    return bool(BCRYPT.fullmatch(text) or ARGON2.fullmatch(text))


def hash_password(password: str) -> str:
    """A password's hash by argon2id, as `--auth-file` takes it. Raises ImportError where argon2-cffi is not installed."""
    return _argon2().PasswordHasher().hash(password)


def _argon2():
    try:
        import argon2
    except ImportError as error:
        raise ImportError(f"Hashes of passwords need argon2-cffi ({error}). Run: {INSTALL}") from error
    return argon2


def _bcrypt():
    try:
        import bcrypt
    except ImportError as error:
        raise ImportError(f"Hashes by bcrypt need the package bcrypt ({error}). Run: {INSTALL}") from error
    return bcrypt


def _check_cost(known, where):
    """Refuse hashes that would hold the server for seconds; import what checks the others, so that it is missed early."""
    if match := BCRYPT.fullmatch(known):
        _bcrypt()
        cost, most, what = int(match[1]), MOST_COST["bcrypt"], "bcrypt with a cost"
    else:
        _argon2()
        cost, most, what = int(ARGON2.fullmatch(known)[2]), MOST_COST["argon2"], "argon2 with a memory cost"
    if cost > most:
        raise ValueError(f"{where} has {what} of {cost}; at most {most} is taken.")


def _matches(password, known):
    if BCRYPT.fullmatch(known):
        # htpasswd writes $2y$, which is what others call $2b$; a null byte would end what bcrypt reads
        stored = re.sub(r"^\$2[axy]\$", "$2b$", known).encode()
        given = password.encode("utf-8", "replace")
        return b"\0" not in given and _bcrypt().checkpw(given[:BCRYPT_BYTES], stored)
    if ARGON2.fullmatch(known):
        argon2 = _argon2()
        try:
            return argon2.PasswordHasher().verify(known, password.encode("utf-8", "replace"))
        except (argon2.exceptions.Argon2Error, argon2.exceptions.InvalidHashError):
            return False
    return hmac.compare_digest(password.encode("utf-8", "replace"), known.encode("utf-8", "replace"))


class Logins:
    """Log-ins of a server: each wrong guess waits longer for its answer, and after some there is none for minutes.

    Guesses count by the address that they come from and by the account that they are for. An address from which somebody has
    logged in to an account may go on to do so while strangers guess at it.

    Args:
        accounts: Accounts.
    """

    def __init__(self, accounts: Accounts):
        try:
            import limits
        except ImportError as error:
            raise ImportError(f"Passwords need the package limits ({error}). Run: {INSTALL}") from error
        self._accounts = accounts
        self._limiter = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())
        self._per_address, self._per_account = map(limits.parse, (PER_ADDRESS, PER_ACCOUNT))
        self._known = set()  # (address, user) of those who have logged in
        self._turn = asyncio.Lock()  # guesses that come at the same time are looked at one after the other

    async def check(self, address: str, user: str, password: str) -> None:
        """Return if they may log in. Raises Refused: 429 after too many guesses, 400 for a wrong one."""
        named = user[:100]
        limits = [(self._per_address, ("address", address))]
        if (address, user) not in self._known:
            limits.append((self._per_account, ("account", named)))
        async with self._turn:
            for limit, key in limits:
                if not self._limiter.test(limit, *key):
                    logger.warning("log-in of %r from %s refused: too many wrong passwords", named, address)
                    wait = self._limiter.get_window_stats(limit, *key).reset_time - time.time()
                    headers = {"retry-after": str(max(1, round(wait)))}
                    raise Refused(429, "Too many wrong passwords. Wait some minutes.", headers)
            if await asyncio.to_thread(self._accounts.check, user, password):
                self._known.add((address, user))
                return
            for limit, key in limits:
                self._limiter.hit(limit, *key)
            (limit, key), *_ = limits
            tried = limit.amount - self._limiter.get_window_stats(limit, *key).remaining
        logger.warning("log-in of %r from %s: wrong password (%d)", named, address, tried)
        await asyncio.sleep(WAITS[min(tried, len(WAITS)) - 1])
        raise Refused(400, "Incorrect credentials.")
