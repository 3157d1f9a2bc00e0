"""A process that is forked from one that uses the platform."""

from __future__ import annotations

import subprocess
import sys
import textwrap

FORKS = """
import os
from alveary.config import Config
from alveary.errors import AlvearyError
from alveary.workspace import Workspace

def use(make):
    try:
        make().get_details()
        return "it worked"
    except AlvearyError as error:
        return str(error)

if __name__ == "__main__":
    config = Config("127.0.0.1:1", "token", "default")
    workspace = Workspace(config)
    for name, make in (("inherited", lambda: workspace), ("its own", lambda: Workspace(config))):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, use(make).encode())
            os._exit(0)
        os.waitpid(child, 0)
        print(name, os.read(reader, 10000).decode())
"""


def test_a_fork_says_what_to_do_instead_of_hanging() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FORKS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" this process was forked")[0] for line in lines] == ["inherited", "its own"], done.stdout
    assert all("gRPC does not survive a fork" in line and "spawn" in line for line in lines)


UNUSED = """
import os
from alveary.config import Config
from alveary.workspace import Workspace

reader, writer = os.pipe()
if os.fork() == 0:
    workspace = Workspace(Config("127.0.0.1:1", "token", "default"))
    os.write(writer, b"made in the child")
    os._exit(0)
os.wait()
print(os.read(reader, 100).decode())
"""


def test_a_fork_of_a_process_that_did_not_use_the_platform_may() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(UNUSED)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "made in the child", done.stderr


ASYNCHRONOUS = """
import asyncio, os
from alveary.aio import Client
from alveary.config import Config
from alveary.errors import AlvearyError

async def use(make, work):
    try:
        await work(make())
        return "it worked"
    except AlvearyError as error:
        return str(error)

async def tail(client):
    async for line in client.logs.tail("r"):
        pass

async def download(client):
    await client.transfers.download_all(None, None)

async def close(client):
    await client.close()

async def main():
    config = Config("127.0.0.1:1", "token", "default")
    client = Client(config)
    for name, make, work in (
        ("call", lambda: client, lambda one: one.runs.get("r")),
        ("stream", lambda: client, tail),
        ("its own", lambda: Client(config), tail),
        ("transfer", lambda: client, download),
        ("close", lambda: client, close),
    ):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                use(make, work).send(None)
            except StopIteration as done:
                os.write(writer, done.value.encode())
            os._exit(0)
        os.waitpid(child, 0)
        print(name + ":", os.read(reader, 10000).decode())

asyncio.run(main())
"""


def test_an_asynchronous_client_says_it_as_well_and_can_be_closed() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(ASYNCHRONOUS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert told.pop("close") == "it worked"
    assert set(told) == {"call", "stream", "transfer", "its own"} and all(
        "gRPC does not survive a fork" in text for text in told.values()
    ), told
