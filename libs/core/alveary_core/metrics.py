"""How much a run may log, and the sentences that say so, in its script and outside."""

from __future__ import annotations

from alveary_core.settings import MetricLimits


class TooManyMetrics(ValueError):
    """A run has logged as much as it may."""


def check(limits: MetricLimits, names: int, points: int) -> None:
    """Return where a run may have so many names and points.

    Raises:
        TooManyMetrics: it may not; says which setting decides.
    """
    if names > limits.metric_names:
        raise TooManyMetrics(f"a run may log {limits.metric_names:,} metrics (ALVEARY_METRIC_NAMES): use fewer names")
    if points > limits.metric_points:
        raise TooManyMetrics(f"a run may log {limits.metric_points:,} points (ALVEARY_METRIC_POINTS): log less often")


class MetricBudget:
    """What one attempt may log on one node: a bound on what a trainer passes on. The run's own count is the service's."""

    def __init__(self, limits: MetricLimits | None = None) -> None:
        self._limits = limits or MetricLimits()
        self._names: set[str] = set()
        self._points = 0

    def take(self, name: str) -> None:
        """Count one point.

        Raises:
            TooManyMetrics: it is one too many, and not counted.
        """
        check(self._limits, len(self._names) + (name not in self._names), self._points + 1)
        self._names.add(name)
        self._points += 1
