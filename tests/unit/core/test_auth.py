"""Tokens: whose they are, how long they hold, and clocks that are wrong."""

from __future__ import annotations

import time

import pytest

from alveary_core import auth
from alveary_core.auth import LEEWAY_SECONDS, Principal, issue, verify
from alveary_core.errors import Unauthenticated

SECRET, OWNER = "0123456789abcdef" * 3, Principal("owner", "default", "owner")


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(time, "time", lambda: seconds)


@pytest.mark.parametrize("back", [60.0, 600.0, 10 * 365 * 86400.0])
def test_a_token_stays_good_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch, back: float) -> None:
    now = time.time()
    lasting, limited = issue(SECRET, OWNER), issue(SECRET, OWNER, 3600)
    at(monkeypatch, now - back)
    assert verify(SECRET, lasting) == OWNER
    assert verify(SECRET, limited) == OWNER


def test_a_token_ends_with_leeway_and_the_sentence_names_both_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    at(monkeypatch, now)
    token = issue(SECRET, OWNER, 60)
    at(monkeypatch, now + 60 + LEEWAY_SECONDS - 2)
    assert verify(SECRET, token) == OWNER
    at(monkeypatch, now + 60 + LEEWAY_SECONDS + 2)
    with pytest.raises(Unauthenticated, match=r"expired at 2027-01-15T08:01:00\+00:00, and this platform's clock says 2027-01-15T08:06:02"):
        verify(SECRET, token)


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "é.é.é", issue("another secret of some length....", OWNER)])
def test_what_others_signed_is_refused_as_such(token: str) -> None:
    with pytest.raises(Unauthenticated, match="not one that this platform issued"):
        verify(SECRET, token)


def test_a_token_without_a_workspace_is_malformed_not_an_error_of_the_service() -> None:
    from joserfc import jwt
    from joserfc.jwk import OctKey

    bare = jwt.encode({"alg": "HS256"}, {"sub": "x"}, OctKey.import_key(SECRET))
    with pytest.raises(Unauthenticated, match="not usable"):
        verify(SECRET, bare)
    odd = jwt.encode({"alg": "HS256"}, {"sub": "x", "ws": "w", "role": "owner", "exp": "soon"}, OctKey.import_key(SECRET))
    with pytest.raises(Unauthenticated, match="not usable"):
        verify(SECRET, odd)
    unknown = jwt.encode({"alg": "HS256"}, {"sub": "x", "ws": "w", "role": "king"}, OctKey.import_key(SECRET))
    with pytest.raises(Unauthenticated, match="not usable"):
        verify(SECRET, unknown)
    assert auth.ROLES.index("owner") == 3
