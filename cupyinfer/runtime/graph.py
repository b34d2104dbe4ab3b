"""CUDA graphs: record a sequence of launches once, replay it with one call.

Launching a kernel from Python costs 5-20 us of host time, a decode step has hundreds of them, and each runs for a few
microseconds. A captured graph replays all of them for about 3 us of host time. What a graph holds is addresses: every
array it touches must stay where it was (see :mod:`cupyinfer.runtime.arena`), and new inputs are copied into place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cupyinfer.errors import DeviceError
from cupyinfer.runtime.kernels import overlapping


class CapturedGraph:
    """What :func:`capture` recorded. ``launch()`` replays it on the stream of the capture."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.graph: Any = None
        self.nbytes = 0  # device memory the instantiated graph took, as the driver reports it

    def launch(self) -> None:
        if self.graph is None:
            raise DeviceError("this graph is still being captured, or its capture failed")
        self.graph.launch(self.stream)


@contextmanager
def capture(stream: Any) -> Iterator[CapturedGraph]:
    """Record everything launched on ``stream`` inside the block, without running it::

        with capture(stream) as graph:
            step()
        graph.launch()

    ``stream`` must not be the default stream. Allocating device memory inside raises DeviceError: the address would be
    handed out again after the capture. Everything launched must have been compiled and run once before.
    """
    import cupy

    result = CapturedGraph(stream)
    free_before = cupy.cuda.runtime.memGetInfo()[0]
    with stream, overlapping(), cupy.cuda.using_allocator(_refuse_allocation):
        stream.begin_capture()
        try:
            yield result
        except BaseException:
            _abandon(stream)
            raise
        graph = stream.end_capture()
    graph.upload(stream)
    stream.synchronize()
    result.graph = graph
    result.nbytes = max(0, free_before - cupy.cuda.runtime.memGetInfo()[0])


def _refuse_allocation(size: int) -> Any:
    raise DeviceError(f"{size} bytes were asked for while a CUDA graph is captured; use an Arena buffer")


def _abandon(stream: Any) -> None:
    """End a failed capture so that the stream can be used again; its graph is dropped."""
    with suppress(Exception):  # the capture may already be invalid: the first error is the one to show
        stream.end_capture()


class GraphCache:
    """Captured graphs by key, the least recently used dropped when they hold more than ``max_bytes``."""

    def __init__(self, stream: Any, max_bytes: int = 4 << 30) -> None:
        self.stream = stream
        self.max_bytes = max_bytes
        self.replays = 0
        self._graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Device memory that the cached graphs hold, in bytes."""
        return sum(g.nbytes for g in self._graphs.values())

    def capture(self, key: Hashable, step: Callable[[], None]) -> CapturedGraph:
        """Run ``step`` once (compiles kernels, creates library handles), then record it under ``key``."""
        with self.stream:
            step()
        self.stream.synchronize()
        with capture(self.stream) as graph:
            step()
        self._graphs[key] = graph
        while len(self._graphs) > 1 and self.nbytes > self.max_bytes:
            self._graphs.popitem(last=False)
        return graph

    def replay(self, key: Hashable) -> bool:
        """Replay the graph of ``key`` on the stream; False when there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        self._graphs.move_to_end(key)
        graph.launch()
        self.replays += 1
        return True

    def clear(self) -> None:
        """Destroy all graphs (before communicators and before the process ends)."""
        self.stream.synchronize()
        self._graphs.clear()
