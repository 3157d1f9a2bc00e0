"""NVIDIA GPUs through NVML; a machine without its driver has none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pynvml


@cache
def gpu_models() -> list[str]:
    """Models of the machine's GPUs by index."""
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
    except pynvml.NVMLError:
        return []  # no driver: a CPU node


def gpu_utilisation(indexes: Sequence[int]) -> list[float]:
    """Percent, of some of the machine's GPUs; empty where there are none."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in indexes if i < len(gpu_models())]
    return [float(pynvml.nvmlDeviceGetUtilizationRates(h).gpu) for h in handles]
