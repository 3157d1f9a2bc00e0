"""Bytes that a program prints, as lines: what is unfinished is shown, what was overwritten is not kept."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveary_trainer.lines import LINE, Lines, readable


class Sink:
    """A shipper that keeps what it is given, and a clock that stands still."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.now = 0.0

    def add(self, message: Any) -> None:
        self.messages.append(message)

    def lines(self, tail: deque[str] | None = None) -> Lines:
        return Lines(self, "stdout", 0, 1, tail, lambda: self.now)  # type: ignore[arg-type]

    def final(self) -> list[bytes]:
        whole, rest = [], b""
        for one in self.messages:
            if not one.provisional:
                rest += one.data
                if not one.partial:
                    whole.append(rest)
                    rest = b""
        assert not rest
        return whole

    def shown(self) -> list[bytes]:
        return [one.data for one in self.messages if one.provisional]


def test_a_bar_is_one_line_that_changes() -> None:
    sink, tail = Sink(), deque[str]()
    lines = sink.lines(tail)
    for percent in range(0, 101, 10):
        lines.feed(b"\r%3d%%|bar| caf\xc3\xa9" % percent)
        sink.now += 0.2
        if lines.due == 0:
            lines.show()
    lines.feed(b"\n")
    lines.feed(b"after\n")
    assert sink.final() == ["100%|bar| café".encode(), b"after"] and list(tail) == ["100%|bar| café", "after"]
    assert 3 <= len(sink.shown()) <= 5 and sink.shown()[0].lstrip().endswith("|bar| café".encode())
    assert sink.shown() == sorted(sink.shown()) and all(b"\r" not in data for data in sink.shown())


@pytest.mark.parametrize("text", [b"10%\r", b"prompt> ", b"....", b"\r 7/9"])
def test_what_has_no_line_end_is_shown_within_a_second(text: bytes) -> None:
    sink = Sink()
    lines = sink.lines()
    lines.feed(b"before\n" + text)
    assert lines.due is not None and lines.due <= 1.0 and sink.shown() == []
    sink.now += lines.due
    lines.show()
    assert sink.shown() == [text.strip(b"\r")]
    assert lines.due is None  # nothing more to do until more comes
    lines.feed(b"!")
    sink.now += 0.5
    lines.show()
    lines.end()
    assert sink.final()[-1] == (b"!" if b"\r" in text[1:] else text.strip(b"\r") + b"!")


def test_whole_lines_are_never_shown_unfinished() -> None:
    sink = Sink()
    lines = sink.lines()
    for number in range(1000):  # blocks that end anywhere
        lines.feed(b"%d\n%d" % (number, number))
        sink.now += 0.1
    assert not sink.shown()


def test_bars_below_each_other_are_few_lines() -> None:
    """What tqdm writes for an outer and an inner bar, whatever it writes to."""
    sink = Sink()
    lines = sink.lines()
    lines.feed(b"begin\n")
    for epoch in range(3):
        lines.feed(b"\repoch %d/3" % epoch)
        for step in range(50):
            lines.feed(b"\n\r  step %d/50\x1b[A" % step)
            sink.now += 0.1
            lines.show()
        lines.feed(b"\n\r" + b" " * 12 + b"\r\x1b[A")
    lines.feed(b"\repoch 3/3\n")
    lines.feed(b"the end\n")
    lines.end()
    final = sink.final()
    assert final[0] == b"begin" and final[-1] == b"the end" and b"epoch 3/3" in final and len(final) <= 6, final
    assert any(data.startswith(b"epoch 1/3 | step") for data in sink.shown())


def test_lines_after_such_bars_come_at_once() -> None:
    sink = Sink()
    lines = sink.lines()
    lines.feed(b"\router\n\rinner\x1b[A\n\n")
    lines.feed(b"last words\n")
    sink.now += 3.0
    assert lines.due == 0
    lines.show()
    assert sink.final()[-1] == b"last words"


def test_data_with_carriage_returns_stays_what_it_is() -> None:
    sink = Sink()
    lines = sink.lines()
    everything = bytes(b for b in range(256) if b != 10)
    lines.feed(b"windows\r\n" + everything + b"\n" + b"\x00\r" + b"\n")
    assert sink.final() == [b"windows", everything, b"\x00\r"]


@given(st.lists(st.binary(max_size=60).map(lambda data: data.replace(b"\r", b"").replace(b"\x1b", b"")), max_size=20))
def test_bytes_without_carriage_returns_come_as_they_are(pieces: list[bytes]) -> None:
    sink = Sink()
    lines = sink.lines()
    for piece in pieces:
        lines.feed(piece)
        sink.now += 0.3
        lines.show()
    lines.end()
    whole = b"".join(pieces)
    assert b"\n".join(sink.final()) == (whole[:-1] if whole.endswith(b"\n") else whole)


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\x1b[A", b"\x1b[3A", b"\x1b[B", b"text", b" ", b"\x1b[K", b"\x00"]), max_size=60))
def test_no_order_of_movements_breaks_it(pieces: list[bytes]) -> None:
    sink = Sink()
    lines = sink.lines()
    for piece in pieces:
        lines.feed(piece)
        sink.now += 0.4
        lines.show()
    lines.end()
    assert len(sink.final()) <= pieces.count(b"\n") + 2


def test_long_lines_travel_in_parts_and_a_long_bar_does_not_grow() -> None:
    sink = Sink()
    lines = sink.lines()
    lines.feed(b"x" * (2 * LINE + 5) + b"\n")
    for _ in range(100):
        lines.feed(b"\r" + b"y" * 10_000)
    assert len(lines._rest) <= 10_001
    lines.feed(b"\n")
    lines.feed(b"\x1b[A" + b"z" * (2 * LINE))
    lines.end()
    assert sink.final()[0] == b"x" * (2 * LINE + 5) and sink.final()[1] == b"y" * 10_000
    assert sum(len(line) for line in sink.final()[2:]) == 2 * LINE
    assert all(len(one.data) <= LINE for one in sink.messages) and all(len(data) <= 2000 for data in sink.shown())


def test_last_lines_are_readable() -> None:
    assert (
        readable(b"\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07 caf\xc3\xa9 \xff\x00\x08tab\t.") == "red link café \ufffdtab\t."
    )
