"""A link with 200 ms of added latency, and one that is cut: submissions, logs and watching go through."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Embedded, finished, submit, tail, wait_for_state
from tcp_proxy import Proxy

from alveary import Workspace, config

DELAY = 0.2


@pytest.fixture
def proxy(stack: Embedded) -> Iterator[Proxy]:
    port = int(json.loads(stack.config.read_text())["endpoint"].rpartition(":")[2])
    opened = Proxy(port, DELAY)
    yield opened
    opened.close()


@pytest.fixture
def far(stack: Embedded, proxy: Proxy) -> Workspace:
    found = config.load(stack.config)
    return Workspace(config.Config(f"127.0.0.1:{proxy.port}", found.token))


def test_submissions_over_a_slow_link_all_go_through(far: Workspace, source: Path) -> None:
    runs = [submit(far, source, "print('far away')") for _ in range(5)]
    for run in runs:
        finished(run)
    assert [x.line.data for x in tail(runs[0], follow=True, streams=("stdout",))] == [b"far away"]


def test_a_follower_whose_connection_is_cut_misses_nothing_and_sees_nothing_twice(far: Workspace, proxy: Proxy, source: Path) -> None:
    run = submit(far, source, """
        import time
        for i in range(60):
            print(i, flush=True)
            time.sleep(0.05)
        """)  # fmt: skip
    wait_for_state(run, "Running", "Finalizing", "Completed")
    seen: list[int] = []

    async def follow() -> None:
        async for one in far._client.logs.tail(run.id, streams=("stdout",)):
            seen.append(int(one.line.data))
            if len(seen) in (5, 30):
                proxy.cut()

    far._call(follow())
    assert seen == list(range(60))
    finished(run)
