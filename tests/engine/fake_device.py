"""The GPU's side of the runner, acted out with NumPy: pinned rings, packed uploads, graphs and events.

"Device" arrays are NumPy arrays that only the copies write, so a step that read something else than the fixed buffers
of its graph would give wrong tokens.
"""

from __future__ import annotations

import types
from contextlib import nullcontext

import numpy as np
from fake_model import EOS, FakeModel, model_config

from cupyinfer.config import EngineConfig
from cupyinfer.engine import loading, runner, runner_io
from cupyinfer.engine.engine import LLMEngine
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.kv_pool import CpuBlockPool

FREE, TOTAL = 10 << 20, 12 << 20  # bytes of the device


class FakeStream(nullcontext):
    ptr = 0

    def __init__(self, non_blocking=False):
        super().__init__()

    def synchronize(self):
        pass


class FakeEvent:
    def __init__(self, disable_timing=False):
        self.recorded = False

    def record(self, stream):
        self.recorded = True

    def synchronize(self):
        assert self.recorded, "waited for an event that nobody recorded"


class FakeCudaDevice(nullcontext):
    def __init__(self, index):
        super().__init__()

    def synchronize(self):
        pass


class FakeXp(types.ModuleType):
    """numpy under cupy's name, with the little of cupy.cuda that the engine calls."""

    cuda = types.SimpleNamespace(
        Stream=FakeStream,
        Event=FakeEvent,
        Device=FakeCudaDevice,
        runtime=types.SimpleNamespace(memGetInfo=lambda: (FREE, TOTAL)),
    )

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def get_default_memory_pool():
        return types.SimpleNamespace(free_all_blocks=lambda: None)


class FakeGraphs:
    """Replays the recorded step on whatever its arrays hold by then."""

    def __init__(self, stream):
        self.steps = {}
        self.replays = 0

    def capture(self, key, step):
        step()  # recording itself runs nothing
        self.steps[key] = step

    def replay(self, key):
        if key not in self.steps:
            return False
        self.steps[key]()
        self.replays += 1
        return True

    def clear(self):
        self.steps.clear()


def copy(target, source, stream):
    assert target.nbytes == source.nbytes and target.flags.c_contiguous and source.flags.c_contiguous
    target[...] = source


def fake_gpu_engine(monkeypatch, context: int = 640, progress=None, **settings) -> LLMEngine:
    """An engine that believes it runs on a GPU."""
    poison = lambda shape, dtype: np.full(shape, 99, dtype)
    monkeypatch.setattr(runner_io, "pinned_empty", poison)
    monkeypatch.setattr(runner_io, "upload", copy)
    monkeypatch.setattr(runner_io, "download", copy)
    monkeypatch.setattr(runner_io, "upload_columns", lambda d, h, r, c, s: d[:r, :c].__setitem__(..., h[:r, :c]))
    monkeypatch.setattr(runner, "GraphCache", FakeGraphs)
    monkeypatch.setattr(loading, "make_pool", lambda device, pages, layout: CpuBlockPool(pages, layout))
    settings = {"block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 64, **settings}
    config = EngineConfig.make(model="fake", **settings)
    device = Device("cuda", 0, "acted", FakeXp("fake"))
    model = FakeModel(config.block_size)
    engine = loading.make_engine(config, model_config(context), model, "float32", device, progress)
    assert engine.eos_token_ids == {EOS}
    return engine
