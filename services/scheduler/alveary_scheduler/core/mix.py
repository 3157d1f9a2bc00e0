"""How often each shape is asked for, learnt from arrivals. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from alveary_scheduler.core.resources import Shape

Mix = list[tuple[Shape, float]]
# How many arrivals the mix is learnt from, and after how many it is learnt again.
WINDOW = 4096
_INTERVAL = 512
# By how much a mix must differ from the one in use (total variation distance) to replace it: then all is scored again.
_MIN_DISTANCE = 0.1


class RequestMix:
    """The mix of the newest arrivals."""

    def __init__(self) -> None:
        self.current: Mix = []
        self.arrivals = 0
        self.window: deque[Shape] = deque(maxlen=WINDOW)
        # How many of the newest arrivals are not in a snapshot.
        self.unsaved = 0

    def observe(self, shape: Shape) -> bool:
        """Count one arrival; True: `current` is another mix from now on."""
        self.window.append(shape)
        self.arrivals += 1
        self.unsaved += 1
        if self.arrivals % _INTERVAL != 1:
            return False
        mix = typical(self.window)
        if _distance(mix, self.current) <= _MIN_DISTANCE:
            return False
        self.current = mix
        return True

    def restore(self, window: Iterable[Shape], arrivals: int, current: Mix) -> None:
        """Set all as it was."""
        self.window = deque(window, maxlen=WINDOW)
        self.arrivals = arrivals
        self.current = current
        self.unsaved = 0


def _distance(one: Mix, other: Mix) -> float:
    """Total variation distance of two mixes, 0 to 1; 1 where one is empty."""
    if not one or not other:
        return 1.0
    sums = [sum(w for _, w in mix) for mix in (one, other)]
    first, second = ({s: w / total for s, w in mix} for mix, total in zip((one, other), sums, strict=True))
    return sum(abs(first.get(s, 0.0) - second.get(s, 0.0)) for s in sorted(first.keys() | second.keys(), key=str)) / 2


def typical(shapes: Iterable[Shape], share: float = 0.95) -> list[tuple[Shape, float]]:
    """The most frequent shapes that make up `share` of all (ATC'23: 95 %), memory left aside, with their counts."""
    counts: dict[Shape, int] = {}
    for shape in shapes:
        plain = Shape(shape.cpu_milli, 0, shape.gpus, shape.gpu_milli, shape.models)
        counts[plain] = counts.get(plain, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    wanted, found = share * sum(counts.values()), list[tuple[Shape, float]]()
    for shape, count in ordered:
        if wanted <= 0:
            break
        found.append((shape, float(count)))
        wanted -= count
    return found
