"""Proxy variables: never for the platform's own addresses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from alveary_contracts.proxies import exempt, for_runs, host_of

ROOT = Path(__file__).parents[3]
CORPORATE = "http://proxy.example:3128"


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Calls of a function or method in the product."""
    found = []
    for folder in ("libs", "services"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == name:
                    found.append((file, node))
    return found


@pytest.mark.parametrize("kind", ["insecure_channel", "secure_channel"])
def test_no_channel_of_the_platform_looks_for_a_proxy(kind: str) -> None:
    found = calls(kind)
    assert found
    for file, call in found:
        given = [ast.unparse(k.value) for k in call.keywords if k.arg == "options"]
        # Either there, or in the list that is given.
        assert given and ("DIRECT" in given[0] or "*DIRECT" in file.read_text()), f"{file}:{call.lineno}: options=DIRECT is missing"


def test_no_library_that_reads_proxy_variables_by_itself_comes_in_unseen() -> None:
    for file in (f for folder in ("libs", "services") for f in (ROOT / folder).rglob("*.py")):
        names = {
            alias.name if isinstance(node, ast.Import) else f"{node.module}"
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        readers = {name.partition(".")[0] for name in names} & {"requests", "httpx", "aiohttp"} | names & {"urllib.request"}
        # The docker SDK uses requests; Service.open exempts what DOCKER_HOST names.
        assert not readers or file.name == "containers.py", f"{file} reads proxy variables through {readers}: see alveary_contracts.proxies"


def test_own_addresses_are_exempt_where_a_proxy_is_set() -> None:
    env = {"HTTPS_PROXY": CORPORATE, "NO_PROXY": "*.corp, 10.0.0.1"}
    exempt(env, ("nats://10.1.2.3:4222", "store.example:9000", "[fe80::1]:7600", "", "unix:///var/run/docker.sock"))
    assert env["no_proxy"] == env["NO_PROXY"] == "*.corp,10.0.0.1,localhost,127.0.0.1,::1,10.1.2.3,store.example,fe80::1"
    before = dict(env)
    exempt(env, ("nats://10.1.2.3:4222",))
    assert env == before
    without: dict[str, str] = {"NO_PROXY": "x"}
    exempt(without, ("a:1",))
    assert without == {"NO_PROXY": "x"}


def test_runs_get_both_spellings() -> None:
    assert for_runs({"http_proxy": CORPORATE, "NO_PROXY": "x", "HTTPS_PROXY": "", "OTHER": "y"}) == {
        "http_proxy": CORPORATE, "HTTP_PROXY": CORPORATE, "no_proxy": "x", "NO_PROXY": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("address", "host"),
    [("https://u:p@h.example:1/x", "h.example"), ("h:1", "h"), ("h", "h"), ("[::1]:2", "::1"), ("unix:///x", ""), ("", "")],
)
def test_hosts(address: str, host: str) -> None:
    assert host_of(address) == host
