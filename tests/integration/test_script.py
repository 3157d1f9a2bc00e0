"""What a script says to its trainer: nothing that it logs ends it, and everything that can be logged arrives."""

from __future__ import annotations

import asyncio
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from alveary import context
from alveary.context import ContextError, TrainerConnection
from alveary.script_run import ContextRun, file_name
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_trainer.context_server import ContextServer
from alveary_trainer.outputs import OutputStore
from alveary_trainer.shipper import LARGEST, Shipper, metric_batch


class Store:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def put_file(self, bucket: str, key: str, path: Path, progress: Any = None, *, sha256: str = "") -> Any:
        from alveary_contracts.common.v1 import common_pb2 as c

        self.files[key.removeprefix("r/1/")] = path.read_bytes()
        return c.FileEntry(size=1, sha256="0" * 64)


class Trainer:
    """The trainer's side, on a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.sock"
        self.points: list[pb.MetricPoint] = []
        self.notes: list[str] = []
        self.tags: dict[str, str] = {}
        self.store = Store()
        self.go, self.waits = threading.Event(), threading.Event()
        self._folder = folder
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    async def publish(self, subject: str, payload: bytes = b"", timeout: float | None = None, *, headers: Any = None) -> None:
        self.points += pb.MetricBatch.FromString(payload).points

    async def _main(self, ready: threading.Event) -> None:
        metrics = Shipper(self, "s", metric_batch(1))
        outputs = OutputStore(self.store, "r", 1, 0, self._folder, self.notes.append)  # type: ignore[arg-type]
        outputs.below = Path("/")

        async def upload(message: dict[str, Any]) -> Any:
            return {"path": (await outputs.upload(Path(message["path"]), message["name"], unique=bool(message.get("unique")))).path}

        async def tag(message: dict[str, Any]) -> Any:
            if "refused" in message.get("set", {}):
                raise ValueError("no such tag")
            self.tags |= message.get("set", {})
            return True

        async def register(message: dict[str, Any]) -> Any:
            self.waits.set()
            await asyncio.to_thread(self.go.wait, 60)
            return {"name": message["name"], "version": 1}

        async def refused(message: dict[str, Any]) -> Any:
            self.notes.append(message["text"])

        asks: Any = {"upload": upload, "tag": tag, "register": register, "refused": refused}
        server = ContextServer(self.path, "r", metrics, asks, self.notes.append)
        await server.start()
        ready.set()
        while not self._stop.is_set():
            await asyncio.sleep(0.01)
        await server.finish(0.1)
        await metrics.close()
        self.path.unlink()

    def start(self) -> None:
        ready = threading.Event()
        self._stop.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)))
        self._thread.start()
        assert ready.wait(30)

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30)

    def values(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for point in self.points:
            kind = str(point.WhichOneof("value"))
            value = getattr(point, kind)
            found.setdefault(point.name, []).append(list(value.values) if kind == "list" else value)
        return found


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    made = Trainer(tmp_path)
    made.start()
    yield made
    made.go.set()
    made.stop()


@pytest.fixture
def run(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ContextRun]:
    monkeypatch.setenv("ALVEARY_RUN_ID", "r")
    connection = TrainerConnection(str(trainer.path))
    yield ContextRun(connection)
    connection._drop()


def circular() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["self"] = made
    return made


class Hostile:
    """An object whose every conversion fails."""

    def item(self) -> float:
        raise RuntimeError("no")

    tolist = __str__ = __repr__ = item  # type: ignore[assignment]


BAD: list[Callable[[Any], None]] = [
    lambda r: r.log("", 1), lambda r: r.log("x" * 257, 1), lambda r: r.log(None, 1), lambda r: r.log("x", None), lambda r: r.log("x", [1]),
    lambda r: r.log("x", {}), lambda r: r.log("x", torch.ones(3)), lambda r: r.log("x", numpy.ones(3)), lambda r: r.log("x", 10**400),
    lambda r: r.log("x", 1j), lambda r: r.log("x", b"bytes"), lambda r: r.log("x", object()), lambda r: r.log("x", Hostile()),
    lambda r: r.log("x", 1, step="three"), lambda r: r.log("x", 1, step=1.5), lambda r: r.log("x", 1, step=2**63),
    lambda r: r.log("x", 1, step=math.nan), lambda r: r.log("caf\udce9", 1), lambda r: r.log_list("x", ["a"]), lambda r: r.log_list("x", 3),
    lambda r: r.log_row("x", a=circular()), lambda r: r.log_table("x", 3), lambda r: r.log_table("x", {(1, 2): 3}),
    lambda r: r.log_image("x"), lambda r: r.log_image("x", path="/nowhere.png"), lambda r: r.log_image("x", plot=3),
    lambda r: r.log_image("x", plot=Hostile()), lambda r: r.tag("refused", "x"), lambda r: r.log("report", "x" * 10_000_000),
    lambda r: r.log_row("x", a=Hostile()),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_nothing_that_is_logged_raises(run: ContextRun, trainer: Trainer, capsys: pytest.CaptureFixture[str], number: int) -> None:
    BAD[number](run)
    run.log("after", 1)
    run.flush(60)
    assert trainer.values() == {"after": [1.0]}
    assert "is left out" in (err := capsys.readouterr().err) or "is refused" in err
    assert trainer.notes, "the system log has it too"


def test_every_number_is_taken(run: ContextRun, trainer: Trainer) -> None:
    numbers: list[Any] = [1, 1.5, True, numpy.float32(0.25), numpy.float64(2), numpy.int64(7), numpy.bool_(True), torch.tensor(3), torch.tensor([0.5]), Fraction(1, 4),
               Decimal("0.125"), 2**60, math.inf]  # fmt: skip
    for value in numbers:
        run.log("train/loss [a]=b.c é", value, step=numpy.int32(4))
    run.log("nan", float("nan"))
    run.log("text", "caf\udce9")
    run.flush(60)
    assert trainer.values()["train/loss [a]=b.c é"] == [float(v) for v in numbers] and math.isnan(trainer.values()["nan"][0])
    assert all(p.step == 4 for p in trainer.points[: len(numbers)]) and trainer.values()["text"] == ["caf\\udce9"]


def test_a_report_beyond_the_limit_is_named_at_once_and_long_lists_arrive(
    run: ContextRun, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert context.LARGEST_POINT == LARGEST
    run.log("report", "x" * (LARGEST + 1))
    assert "metric 'report' is refused" in (err := capsys.readouterr().err) and f"{LARGEST:,}" in err  # without a flush
    run.log_list("long", range(100_001))  # type: ignore[arg-type]
    run.log_list("array", torch.arange(5))  # type: ignore[arg-type]
    run.log_list("empty", [])
    run.flush(60)
    assert [v for part in trainer.values()["long"] for v in part] == list(range(100_001)) and trainer.values()["array"] == [[0, 1, 2, 3, 4]]
    assert "report" in trainer.notes[0]


class Figure:
    def savefig(self, path: str) -> None:
        Path(path).write_bytes(b"a plot")


def test_pictures_have_any_name_and_each_is_kept(run: ContextRun, trainer: Trainer, tmp_path: Path) -> None:
    picture = tmp_path / "p.jpg"
    picture.write_bytes(b"a picture")
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("*.png"))
    run.log_image("val/confusion", plot=Figure())
    for step in (1, 2, 2):
        run.log_image("val/confusion", plot=Figure(), step=step)
    run.log_image("val/confusion", path=str(picture))
    run.log_image("val/confusion", path=str(picture))
    run.log_image("../../etc/passwd", path=str(picture))
    run.flush(60)
    stored = [
        "outputs/images/val/confusion.png", "outputs/images/val/confusion-step1.png", "outputs/images/val/confusion-step2.png",
        "outputs/images/val/confusion-step2_2.png", "outputs/images/val/confusion.jpg", "outputs/images/val/confusion_2.jpg",
    ]  # fmt: skip
    assert trainer.values() == {"val/confusion": stored, "../../etc/passwd": ["outputs/images/__/__/etc/passwd.jpg"]}
    assert set(trainer.store.files) == {*stored, "outputs/images/__/__/etc/passwd.jpg"} and trainer.store.files[stored[0]] == b"a plot"
    assert [p.step for p in trainer.points if p.HasField("step")] == [1, 2, 2]
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("*.png")) <= before


@pytest.mark.parametrize(("name", "path"), [("a", "a"), ("a//b/", "a/b"), ("/", "_"), ("a\\b\n%", "a%5Cb%0A%25"), ("..", "__"), ("é", "é")])
def test_file_names_of_pictures(name: str, path: str) -> None:
    assert file_name(name) == path


def test_a_stream_is_uploaded(run: ContextRun, trainer: Trainer) -> None:
    run.upload_file("outputs/s", io.BytesIO(b"streamed"))
    run.upload_file("outputs/t", io.StringIO("é"))
    assert trainer.store.files == {"outputs/s": b"streamed", "outputs/t": "é".encode()}
    with pytest.raises(ContextError):
        run.upload_file("outputs/none", "/nowhere")


def test_a_trainer_that_was_away_is_found_again(
    run: ContextRun, trainer: Trainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.log("a", 1)
    run.flush(60)
    trainer.stop()
    deadline = time.monotonic() + 60
    while not run._trainer._lost:  # what is written into a socket that nobody reads is not missed at once
        run.log("lost", 1)
        assert time.monotonic() < deadline
    run.tag("k", "v")
    with pytest.raises(ContextError):
        run.register_model("m", "outputs")
    trainer.start()
    monkeypatch.setattr(context, "_AGAIN_SECONDS", 0.0)
    run.log("b", 2)
    run.flush(60)
    assert trainer.values()["b"] == [2.0]
    err = capsys.readouterr().err
    assert err.count("cannot be reached (") == 1 and "can be reached again" in err and "tag('k') is left out" in err


def test_others_log_while_one_waits(run: ContextRun, trainer: Trainer) -> None:
    registering = threading.Thread(target=run.register_model, args=("m", "outputs"))
    registering.start()
    assert trainer.waits.wait(60)
    run.log("meanwhile", 1)
    run.flush(60)
    assert registering.is_alive() and trainer.values() == {"meanwhile": [1.0]}
    trainer.go.set()
    registering.join(60)


def test_a_child_logs_although_a_thread_held_the_lock_when_it_was_forked(run: ContextRun, trainer: Trainer) -> None:
    run.log("parent", 1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with run._trainer._lock:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        run.log("child", 1)
        run.flush(20)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    holder.join()
    run.flush(60)
    assert trainer.values() == {"parent": [1.0], "child": [1.0]}


def test_a_signal_handler_may_log(run: ContextRun, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainerConnection._put

    def interrupted(self: TrainerConnection, data: bytes) -> None:
        if b"outer" in data:
            os.kill(os.getpid(), signal.SIGUSR1)  # the handler runs here, in the middle of sending
        original(self, data)

    monkeypatch.setattr(TrainerConnection, "_put", interrupted)
    before = signal.signal(signal.SIGUSR1, lambda *_: run.log("inner", 1))
    try:
        run.log("outer", 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    run.flush(60)
    assert trainer.values() == {"outer": [1.0], "inner": [1.0]}
