"""Tokens: who calls, in which workspace, in which role."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime

from joserfc import jwt
from joserfc.errors import ExpiredTokenError, JoseError
from joserfc.jwk import OctKey

from alveary_core.errors import PermissionDenied, Unauthenticated

# A joiner may become a node, and do nothing else.
ROLES = ("joiner", "reader", "writer", "owner")
# By how much the clocks of who issued a token and who verifies it may differ.
LEEWAY_SECONDS = 300


@dataclass(frozen=True)
class Principal:
    """The caller."""

    subject: str
    workspace: str
    role: str


caller: ContextVar[Principal] = ContextVar("caller")


def issue(secret: str, principal: Principal, seconds: float | None = None) -> str:
    """A signed token (JWT, HS256) for `principal`, valid for `seconds`; None: until the secret changes."""
    if principal.role not in ROLES:
        raise ValueError(f"role {principal.role!r}: one of {', '.join(ROLES)}")
    claims: dict[str, object] = {
        "sub": principal.subject,
        "ws": principal.workspace,
        "role": principal.role,
        "iat": int(time.time()),
    }
    if seconds is not None:
        claims["exp"] = int(time.time() + seconds)
    return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(secret))


def verify(secret: str, token: str) -> Principal:
    """The principal of a token.

    When it was issued ("iat") is not held against it: the platform's own tokens stay good when its clock is set back, by
    however much. Its end ("exp") is, give or take LEEWAY_SECONDS.

    Raises:
        Unauthenticated: not signed by this platform, expired, or malformed.
    """
    try:
        claims = jwt.decode(token, OctKey.import_key(secret), algorithms=["HS256"]).claims
    except (JoseError, ValueError) as error:
        raise Unauthenticated(
            "the token of this call is not one that this platform issued: use the config that `alveary up` wrote"
        ) from error
    try:
        jwt.JWTClaimsRegistry(leeway=LEEWAY_SECONDS).validate({name: claims[name] for name in ("exp", "nbf") if name in claims})
        principal = Principal(str(claims["sub"]), str(claims["ws"]), str(claims["role"]))
        if principal.role not in ROLES:
            raise ValueError(f"role {principal.role!r}: one of {', '.join(ROLES)}")
        return principal
    except ExpiredTokenError as error:
        raise Unauthenticated(
            f"the token of this call expired at {_utc(claims['exp'])}, and this platform's clock says {_utc(time.time())}: "
            "ask for a new token, or set the clock if it is wrong"
        ) from error
    except (JoseError, ValueError, KeyError) as error:
        raise Unauthenticated(
            f"the token of this call is signed by this platform, but not usable ({error}); its clock says {_utc(time.time())}"
        ) from error


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def require(role: str) -> Principal:
    """The caller, if its role is at least `role`.

    Raises:
        PermissionDenied: it is less.
    """
    principal = caller.get()
    if ROLES.index(principal.role) < ROLES.index(role):
        raise PermissionDenied(f"{principal.subject} is a {principal.role} of {principal.workspace}: this needs a {role}")
    return principal
