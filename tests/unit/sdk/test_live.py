"""Lines on a screen: unfinished ones change in place on a terminal, and come now and then elsewhere."""

from __future__ import annotations

import io
import time
from typing import Any

from alveary.live import LivePrinter
from alveary_contracts.logs.v1 import logs_pb2


class Terminal(io.StringIO):
    """What a terminal of 80 columns shows."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        rows, row = [], ""
        for part in self.getvalue().replace("\r\x1b[K", "\r").replace("\n", "\n\n").split("\n\n"):
            row = part.rpartition("\r")[2]
            rows.append(row)
        return rows


def line(text: str, stream: str = "stdout", **more: Any) -> logs_pb2.LogLine:
    return logs_pb2.LogLine(stream=stream, data=text.encode(), **more)


def test_on_a_terminal_a_bar_stays_below_what_is_printed() -> None:
    out = Terminal()
    screen = LivePrinter(out, out)
    screen.add(line("10%", "stderr", provisional=True))
    screen.add(line("epoch 1"))
    assert out.rows() == ["epoch 1", "10%"]
    screen.add(line("20%\x1b[31m!", "stderr", provisional=True))
    screen.say("[Running]")
    assert out.rows() == ["epoch 1", "[Running]", "20%!"]
    screen.add(line("x" * 500, "stderr", provisional=True))
    assert len(out.rows()[-1]) < 80, "it must not wrap, or it could not be written over"
    screen.add(line("100%", "stderr"))
    assert out.rows() == ["epoch 1", "[Running]", "100%", ""]
    screen.add(line("prompt> ", provisional=True))
    screen.close()
    assert out.rows()[-1] == ""


def test_elsewhere_a_bar_is_a_line_now_and_then() -> None:
    out, now = io.StringIO(), [0.0]
    screen = LivePrinter(out, out, clock=lambda: now[0])
    for second in range(3600):
        now[0] = float(second)
        screen.add(line(f"{second}/3600", provisional=True))
    screen.add(line("3600/3600"))
    printed = out.getvalue().splitlines()
    assert printed[:4] == ["0/3600", "2/3600", "6/3600", "14/3600"] and printed[-1] == "3600/3600" and 100 < len(printed) < 150
    screen.add(line("prompt> ", provisional=True))
    screen.add(line("prompt> "))  # nothing came after it
    screen.close()
    assert out.getvalue().splitlines()[-2:] == ["3600/3600", "prompt> "]


def test_without_following_what_is_unfinished_is_shown_once() -> None:
    out = io.StringIO()
    screen = LivePrinter(out, out, follow=False)
    for text in ("10%", "20%"):
        screen.add(line(text, provisional=True))
    screen.add(line("done"), mark="[x] ")
    screen.add(line("30%", provisional=True))
    screen.add(line("half", "stderr", partial=True))
    screen.add(line("other"))
    screen.add(line(" a line", "stderr"))
    screen.add(line("7/9", "stderr", rank=1, provisional=True))
    screen.close()
    assert out.getvalue().splitlines() == ["[x] done", "other", "half a line", "7/9"]


def test_a_giant_line_in_many_parts_is_joined_once() -> None:
    out = io.StringIO()
    screen = LivePrinter(out, out)
    part = "x" * 2_000
    began = time.process_time()
    for _ in range(20_000):  # 40 MB: joined with each part again, 400 GB would be copied
        screen.add(line(part, partial=True))
    screen.add(line("end"))
    assert time.process_time() - began < 10
    printed = out.getvalue()
    assert len(printed) == 20_000 * 2_000 + 4 and printed.endswith("xend\n")
