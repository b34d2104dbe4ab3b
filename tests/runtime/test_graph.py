"""CUDA graphs: capture, replay, cache; and that a failed capture leaves the stream usable."""

from __future__ import annotations

import numpy as np
import pytest

from cupyinfer.errors import DeviceError
from cupyinfer.runtime.arena import Arena

pytestmark = pytest.mark.gpu


@pytest.fixture
def stream(cupy):
    return cupy.cuda.Stream(non_blocking=True)


def adder(cupy, target):
    one = cupy.ones_like(target)
    return lambda: cupy.add(target, one, out=target)


def test_replay_does_the_work_again(cupy, stream):
    from cupyinfer.runtime.graph import GraphCache

    target = cupy.zeros(1000, np.float32)
    step = adder(cupy, target)
    cupy.cuda.get_current_stream().synchronize()
    cache = GraphCache(stream)
    cache.capture("add", step)  # runs the step once, records it without running
    stream.synchronize()
    assert float(target[0]) == 1
    for _ in range(3):
        assert cache.replay("add")
    stream.synchronize()
    assert float(target[999]) == 4 and cache.replays == 3
    assert not cache.replay("other") and "add" in cache and len(cache) == 1
    cache.clear()
    assert len(cache) == 0


def test_allocating_while_capturing_is_refused_and_the_stream_survives(cupy, stream):
    from cupyinfer.runtime.graph import capture

    with pytest.raises(DeviceError, match="while a CUDA graph is captured"), capture(stream):
        cupy.zeros(1 << 20, np.float32)
    target = cupy.zeros(10, np.float32)
    step = adder(cupy, target)
    cupy.cuda.get_current_stream().synchronize()
    with capture(stream) as graph:
        step()
    graph.launch()
    stream.synchronize()
    assert float(target[0]) == 1


def test_the_cache_respects_its_budget(cupy, stream):
    from cupyinfer.runtime.graph import GraphCache

    target = cupy.zeros(10, np.float32)
    step = adder(cupy, target)
    cupy.cuda.get_current_stream().synchronize()
    cache = GraphCache(stream, max_bytes=100)
    for key in range(3):
        cache.capture(key, step).nbytes = 60
    cache.capture(3, step)
    assert 3 in cache and 0 not in cache and cache.nbytes <= 160


def test_frozen_arena_refuses_to_grow(cupy):
    arena = Arena(cupy)
    first = arena.take("x", (40, 8), np.float32)
    arena.freeze()
    assert arena.take("x", (2, 8), np.float32).data.ptr == first.data.ptr
    with pytest.raises(DeviceError, match="would have to grow"):
        arena.take("x", (41, 8), np.float32)


def test_kernels_are_collected_without_running_and_compiled_together(cupy):
    from cupyinfer.ops.activation import softcap
    from cupyinfer.ops.norm import rms_norm
    from cupyinfer.runtime.kernels import collecting, compile_all

    x, out = cupy.ones((2, 64), np.float32), cupy.full((2, 64), -1, np.float32)
    with collecting() as kernels:
        rms_norm(x, x[0], out=out)
        softcap(x, 3.0, out=out)
        softcap(x, 5.0, out=out)
    assert len(kernels) == 2 and float(out.max()) == -1
    steps = []
    compile_all(kernels, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    rms_norm(x, x[0], out=out)
    assert float(cupy.abs(out - 1).max()) < 1e-5
