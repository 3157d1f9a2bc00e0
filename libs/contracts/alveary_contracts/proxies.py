"""Proxy variables (http_proxy and its like): never for the platform's own addresses, always for what runs fetch.

gRPC, requests and others read them by themselves, and a proxy reaches neither 127.0.0.1 nor a machine beside this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

# Options of every gRPC channel to the platform: https://grpc.github.io/grpc/core/group__grpc__arg__keys.html
DIRECT = (("grpc.enable_http_proxy", 0),)
_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy")
_LOCAL = ("localhost", "127.0.0.1", "::1")


def host_of(address: str) -> str:
    """The host of a URL, or of HOST:PORT; empty where there is none."""
    from urllib.parse import urlsplit  # most commands of the CLI never need it

    return urlsplit(address if "//" in address else f"//{address}").hostname or ""


def exempt(environ: MutableMapping[str, str], addresses: Iterable[str]) -> None:
    """Let nothing that reads `environ` use a proxy for this machine or for `addresses` (URLs or HOST:PORT).

    For libraries that have no setting of their own, and for what this process starts.
    """
    if any(environ.get(name) or environ.get(name.upper()) for name in _PROXIES):
        kept = _no_proxy(environ, (host_of(address) for address in addresses))
        environ["no_proxy"] = environ["NO_PROXY"] = kept


def for_runs(environ: Mapping[str, str]) -> dict[str, str]:
    """The proxy variables among `environ`, both in small and in capital letters, as programs read one or the other."""
    found = {}
    for name in (*_PROXIES, "no_proxy"):
        if value := environ.get(name) or environ.get(name.upper()):
            # With a capital name this one is also a header of CGI programs, and some read the small one alone: both are set.
            found[name] = found[name.upper()] = value
    return found


def _no_proxy(environ: Mapping[str, str], hosts: Iterable[str]) -> str:
    given = ",".join(filter(None, (environ.get("no_proxy"), environ.get("NO_PROXY"))))
    words = [word.strip() for word in given.split(",")]
    return ",".join(dict.fromkeys(filter(None, (*words, *_LOCAL, *hosts))))
