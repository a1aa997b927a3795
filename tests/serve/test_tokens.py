"""Tokens: where they come from, what is none, and that all are compared."""

import hashlib

import pytest

from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.serve.tokens import VARIABLE, Tokens, read_tokens

FIRST, SECOND = "a-token-that-is-long-enough", "another-token-that-is-long"


def test_tokens_of_a_file_and_of_the_variable(tmp_path, monkeypatch):
    file = tmp_path / "tokens"
    file.write_text(f"# of Anna\n{FIRST}\n\n  {SECOND}  \n")
    monkeypatch.setenv(VARIABLE, "third-token-that-is-long")
    from_file = read_tokens(file)
    assert VARIABLE not in __import__("os").environ  # nothing that is started has it
    monkeypatch.setenv(VARIABLE, f"{FIRST}, {SECOND}")
    from_variable = read_tokens()
    file.write_bytes(f"\ufeff{FIRST}\r\n{SECOND}\r\n".encode())  # as editors of Windows save it
    for tokens in (from_file, from_variable, read_tokens(file)):
        names = {tokens.name_of(f"Bearer {token}") for token in (FIRST, SECOND)}
        assert len(names) == 2 and None not in names
        for header in (
            None,
            "",
            "Bearer",
            f"Basic {FIRST}",
            FIRST,
            f"Bearer {FIRST}x",
            f"Bearer {FIRST[:-1]}",
            "Bearer \udcff",
        ):
            assert tokens.name_of(header) is None
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not read_tokens() and read_tokens().name_of(None) == ""


@pytest.mark.parametrize("text", ["short", "a token with white space", "ü" * 20, ""])
def test_what_is_no_token_is_refused(tmp_path, text):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ValueError, match="openssl rand"):
        read_tokens(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_tokens(tmp_path / "nothing")


def test_every_token_is_compared_whichever_is_right(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda one, other: (compared.append(other), one == other)[1])
    tokens = Tokens([FIRST, SECOND])
    assert tokens.name_of(f"Bearer {FIRST}")
    assert compared == [hashlib.sha256(token.encode()).digest() for token in (FIRST, SECOND)]


def test_other_machines_are_let_in_with_tokens_alone(capsys, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "Pass --token-file FILE" in capsys.readouterr().err
    assert main(["serve", "--batch", "0"]) == 2
    assert main(["serve", "--timeout", "nan"]) == 2
    assert main(["app", "--mcp", "--auth", "anna:a-long-password"]) == 2
    assert "--mcp cannot log in" in capsys.readouterr().err
