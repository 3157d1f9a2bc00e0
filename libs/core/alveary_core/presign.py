"""Signed requests of the S3 API as links: AWS Signature Version 4 in the query, with headers that a user of the link must send.

The minio SDK signs a link's host alone. A link that binds the content's digest, its length and If-None-Match cannot be used
for anything but the upload it was made for.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote

_ALGORITHM = "AWS4-HMAC-SHA256"
# What is sent is covered by a checksum of its own.
_UNSIGNED = "UNSIGNED-PAYLOAD"
REGION = "us-east-1"


def checksum(sha256: str) -> str:
    """The value of x-amz-checksum-sha256 of a hex digest."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()


class Signer:
    """Links to one server."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, *, secure: bool = False) -> None:
        """`endpoint`: host and port."""
        # As clients write the Host header.
        self._host = endpoint.removesuffix(":443" if secure else ":80")
        self._scheme = "https" if secure else "http"
        self._access, self._secret = access_key, secret_key
        self._day, self._key = "", b""

    def _signing_key(self, day: str) -> bytes:
        if day != self._day:
            key = f"AWS4{self._secret}".encode()
            for part in (day, REGION, "s3", "aws4_request"):
                key = hmac.new(key, part.encode(), hashlib.sha256).digest()
            self._key, self._day = key, day
        return self._key

    def url(
        self, method: str, bucket: str, key: str, *, seconds: int, headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> str:  # fmt: skip
        """A link for `method`, valid for `seconds` (at most seven days); its user must send `headers` (names in lower case)."""
        stamp = _stamp()
        signed = {**(headers or {}), "host": self._host}
        parameters = {
            **(query or {}), "X-Amz-Algorithm": _ALGORITHM, "X-Amz-Credential": f"{self._access}/{_scope(stamp)}", "X-Amz-Date": stamp,
            "X-Amz-Expires": str(seconds), "X-Amz-SignedHeaders": ";".join(sorted(signed)),
        }  # fmt: skip
        path, text = _path(bucket, key), _query(parameters)
        return f"{self._scheme}://{self._host}{path}?{text}&X-Amz-Signature={self._signature(method, path, text, signed, stamp)}"

    def request(
        self, method: str, bucket: str, key: str, headers: Mapping[str, str], query: Mapping[str, str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """URL and headers of a request that is made at once: shorter than a link, which costs its user time to parse."""
        stamp = _stamp()
        sent = {**headers, "x-amz-date": stamp, "x-amz-content-sha256": _UNSIGNED}
        signed = {**sent, "host": self._host}
        path, text = _path(bucket, key), _query(query or {})
        signature = self._signature(method, path, text, signed, stamp)
        names = ";".join(sorted(signed))
        sent["authorization"] = f"{_ALGORITHM} Credential={self._access}/{_scope(stamp)}, SignedHeaders={names}, Signature={signature}"
        return f"{self._scheme}://{self._host}{path}" + (f"?{text}" if text else ""), sent

    def _signature(self, method: str, path: str, query: str, signed: Mapping[str, str], stamp: str) -> str:
        names = sorted(signed)
        lines = [method, path, query, *(f"{n}:{signed[n]}" for n in names), "", ";".join(names), _UNSIGNED]
        hashed = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        to_sign = "\n".join([_ALGORITHM, stamp, _scope(stamp), hashed]).encode()
        return hmac.new(self._signing_key(stamp[:8]), to_sign, hashlib.sha256).hexdigest()


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _scope(stamp: str) -> str:
    return f"{stamp[:8]}/{REGION}/s3/aws4_request"


def _path(bucket: str, key: str) -> str:
    return quote(f"/{bucket}/{key}", safe="/~")


def _query(parameters: Mapping[str, str]) -> str:
    return "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in sorted(parameters.items()))
