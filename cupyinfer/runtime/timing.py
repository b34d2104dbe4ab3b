"""Measuring: device events on a GPU, the monotonic clock on a CPU; medians and percentiles of many samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Samples:
    """Durations in seconds and their usual summary."""

    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))

    @property
    def median(self) -> float:
        return self.percentile(50)

    def summary(self, unit: float = 1e-3) -> dict[str, float]:
        """median, p10, p90 and p99 in ``unit`` seconds (1e-3: milliseconds)."""
        names = {"median": 50, "p10": 10, "p90": 90, "p99": 99}
        return {name: self.percentile(q) / unit for name, q in names.items()}


def time_calls(function: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> Samples:
    """Wall-clock seconds of each call (CPU work, or GPU work that ``function`` itself waits for)."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return Samples(tuple(seconds))


def time_gpu(
    functions: Callable[[], Any] | Sequence[Callable[[], Any]], repeats: int = 20, warmup: int = 3, cold: bool = True
) -> Samples:
    """Device seconds of each call on CuPy's current stream, from events.

    Several functions are called in turn (give each its own inputs). ``cold`` overwrites a buffer larger than the L2
    cache before each call, so that no input is served from it. Kernels shorter than their launch (5-20 us from Python)
    must be timed inside a graph: pass ``graph.launch``.
    """
    import cupy

    calls = [functions] if callable(functions) else list(functions)
    stream = cupy.cuda.get_current_stream()
    l2_bytes = cupy.cuda.Device().attributes["L2CacheSize"]
    flush = cupy.empty(4 * l2_bytes if cold else 0, dtype=cupy.uint8)
    for i in range(warmup):
        calls[i % len(calls)]()
    pairs = []
    for i in range(repeats):
        if cold:
            flush.fill(i & 1)
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        calls[i % len(calls)]()
        end.record(stream)
        pairs.append((begin, end))
    stream.synchronize()
    return Samples(tuple(cupy.cuda.get_elapsed_time(b, e) * 1e-3 for b, e in pairs))
