"""Names and passwords: which files and hashes are taken, and how slowly one may guess."""

import asyncio
import itertools
import shutil
import subprocess
import time

import pytest

argon2 = pytest.importorskip("argon2", reason="the app's passwords need argon2-cffi")
bcrypt = pytest.importorskip("bcrypt", reason="the app's passwords need bcrypt")
pytest.importorskip("limits", reason="the app's passwords need limits")

from kosmos_g_diffusers.serving import passwords  # noqa: E402
from kosmos_g_diffusers.serving.access import Refused  # noqa: E402
from kosmos_g_diffusers.serving.passwords import (  # noqa: E402
    Accounts,
    Logins,
    hash_password,
    read_file,
    read_line,
)

BCRYPT = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
ARGON2 = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("secret")


# named by number: salts are drawn anew in each process
@pytest.mark.parametrize(
    "known",
    ["secret", BCRYPT, BCRYPT.replace("$2b$", "$2y$"), ARGON2],
    ids=["plain", "bcrypt", "htpasswd", "argon2"],
)
def test_right_password_is_taken_and_any_other_is_not(known):
    accounts = Accounts({"anna": known})
    assert accounts.check("anna", "secret")
    for user, password in (
        ("anna", "Secret"),
        ("anna", "secret\0"),
        ("anna", ""),
        ("anna", known if known != "secret" else "x"),
        ("bob", "secret"),
        ("", ""),
        ("anna", "s" * 10_000),
        ("anna", "\ud800"),
    ):
        assert not accounts.check(user, password)


def test_long_passwords_are_those_of_htpasswd():
    long = "x" * 100
    known = bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode()
    assert Accounts({"anna": known}).check("anna", long)


def test_file_has_a_line_for_each_user(tmp_path):
    file = tmp_path / "users"
    file.write_text(f"# people\n\nanna:{BCRYPT}\nbob:{ARGON2}\n")
    assert read_file(file) == {"anna": BCRYPT, "bob": ARGON2}
    # as editors of Windows save it, and with spaces, which nobody who logs in has around their name
    file.write_bytes(f"\ufeffanna: {BCRYPT} \r\n\r\n # people\r\n bob :{ARGON2}\r\n".encode())
    assert read_file(file) == {"anna": BCRYPT, "bob": ARGON2}
    assert Accounts(read_file(file)).check("bob", "secret")


def test_what_htpasswd_writes_is_read(tmp_path):
    if shutil.which("htpasswd") is None:
        pytest.skip("htpasswd is not installed: apt-get install apache2-utils")
    file = tmp_path / "users"
    subprocess.run(["htpasswd", "-cbB", "-C", "4", file, "anna", "secret"], check=True, capture_output=True)
    assert Accounts(read_file(file)).check("anna", "secret")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anna:$apr1$abc$def", "Line 1 .* has htpasswd's MD5"),
        ("anna:{SHA}abc", "htpasswd's SHA-1"),
        ("anna:$6$abc$def", "SHA-512 crypt"),
        ("anna:$5$abc$def", "SHA-256 crypt"),
        ("anna:$y$abc$def", "yescrypt"),
        ("anna:secret", "no hash that is known"),
        ("anna:$2y$05$short", "no hash that is known"),
        ("anna", "form USER:HASH"),
        (f":{BCRYPT}", "form USER:HASH"),
        (f"anna:{BCRYPT}\nanna:{ARGON2}", "Line 2 .* names 'anna' a second time"),
        ("", "names no user"),
        ("# nobody", "names no user"),
        (f"anna:{BCRYPT.replace('$04$', '$31$')}", "bcrypt with a cost of 31"),
        (f"anna:{ARGON2.replace('m=8', 'm=99999999')}", "argon2 with a memory cost of 99999999"),
    ],
    ids=itertools.count(),
)
def test_other_formats_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "users").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / "users")
    with pytest.raises(ValueError, match="--auth-file"):
        read_file(tmp_path / "missing")


def test_hash_that_is_written_is_argon2_and_is_taken():
    user, known = read_line(f"anna:{hash_password('a b:c')}", "it")
    assert known.startswith("$argon2id$") and Accounts({user: known}).check("anna", "a b:c")


LOOP = asyncio.Runner()  # as long as the server of an application


def guess(logins, *guesses):
    """Statuses of log-ins that come at the same time: (address, user, password)."""

    async def one(address, user, password):
        try:
            await logins.check(address, user, password)
        except Refused as refused:
            return refused.status
        return 200

    async def all_of_them():
        return await asyncio.gather(*(one(*entry) for entry in guesses))

    return LOOP.run(all_of_them())


@pytest.fixture
def logins(monkeypatch):
    monkeypatch.setattr(passwords, "WAITS", (0.0,))
    return Logins(Accounts({"anna": "secret", "eve": "mine"}))


def test_guesses_of_one_address_end_in_429_however_many_come_at_once(logins, caplog):
    statuses = guess(logins, *(("1.1.1.1", "anna", f"guess {number}") for number in range(200)))
    assert statuses.count(400) == 10 and statuses.count(429) == 190
    assert "from 1.1.1.1: wrong password (10)" in caplog.text and "guess 1" not in caplog.text
    assert guess(logins, ("1.1.1.1", "anna", "secret")) == [429]  # right or not
    assert guess(logins, ("2.2.2.2", "anna", "secret")) == [200]


def test_guesses_at_one_account_are_counted_over_all_addresses(logins):
    assert guess(logins, ("9.9.9.9", "anna", "secret")) == [200]
    statuses = guess(logins, *((f"1.1.1.{number}", "anna", "x") for number in range(60)))
    assert statuses.count(400) == 30 and statuses.count(429) == 30
    assert guess(logins, ("2.2.2.2", "anna", "secret")) == [429]
    # whoever uses the account goes on, and other accounts do
    assert guess(logins, ("9.9.9.9", "anna", "secret"), ("2.2.2.2", "eve", "mine")) == [200, 200]


def test_own_account_does_not_buy_more_guesses(logins):
    statuses = []
    for number in range(20):
        statuses += guess(logins, ("1.1.1.1", "anna", f"{number}"), ("1.1.1.1", "eve", "mine"))
    assert statuses.count(400) == 10


def test_who_logs_in_often_is_not_slowed_down(logins):
    assert guess(logins, *([("1.1.1.1", "anna", "secret")] * 50)) == [200] * 50


def test_wrong_guess_waits_longer_each_time(monkeypatch):
    monkeypatch.setattr(passwords, "WAITS", (0.0, 0.2, 0.4))
    logins, took = Logins(Accounts({"anna": "secret"})), []
    for _ in range(4):
        started = time.monotonic()
        assert guess(logins, ("1.1.1.1", "anna", "x")) == [400]
        took.append(time.monotonic() - started)
    assert took[1] >= 0.2 and took[2] >= 0.4 and took[3] >= 0.4
