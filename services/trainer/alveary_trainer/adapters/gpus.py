"""NVIDIA GPUs through NVML; a machine without its driver has none."""

from __future__ import annotations

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


def gpu_utilisation(offset: int, count: int) -> list[float]:
    """Percent, of `count` GPUs from `offset` on; empty where there are none."""
    if not gpu_models():
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(offset, offset + count)]
    return [float(pynvml.nvmlDeviceGetUtilizationRates(h).gpu) for h in handles]
