"""Tokens: who calls, in which workspace, in which role."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

from alveary_core.errors import PermissionDenied, Unauthenticated

# A joiner may become a node, and do nothing else.
ROLES = ("joiner", "reader", "writer", "owner")


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

    Raises:
        Unauthenticated: not signed by this platform, expired, or malformed.
    """
    try:
        claims = jwt.decode(token, OctKey.import_key(secret), algorithms=["HS256"]).claims
        jwt.JWTClaimsRegistry().validate(claims)
        return Principal(str(claims["sub"]), str(claims["ws"]), str(claims["role"]))
    except (JoseError, ValueError, KeyError) as error:
        raise Unauthenticated(
            "the token of this call is not one that this platform issued, or it has expired: use the config that `alveary up` wrote"
        ) from error


def require(role: str) -> Principal:
    """The caller, if its role is at least `role`.

    Raises:
        PermissionDenied: it is less.
    """
    principal = caller.get()
    if ROLES.index(principal.role) < ROLES.index(role):
        raise PermissionDenied(f"{principal.subject} is a {principal.role} of {principal.workspace}: this needs a {role}")
    return principal
