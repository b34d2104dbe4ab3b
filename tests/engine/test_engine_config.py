"""Settings: what is refused, and what "choose for me" becomes."""

from __future__ import annotations

import dataclasses

import pytest

from cupyinfer.config import (
    EngineConfig,
    cpu_blocks,
    decode_buckets,
    gpu_blocks,
    make_plan,
    step_limits,
)
from cupyinfer.errors import ConfigError, OutOfMemoryError


def config(**settings) -> EngineConfig:
    return EngineConfig.make(model="m", **settings)


@pytest.mark.parametrize(
    "field, value",
    [
        ("dtype", "int8"),
        ("load_format", "gguf"),
        ("block_size", 12),
        ("block_size", 16.0),
        ("max_num_seqs", 0),
        ("max_num_seqs", True),
        ("max_num_seqs", 2.0),
        ("max_model_len", 1),
        ("max_num_batched_tokens", 0),
        ("num_gpu_blocks_override", 0),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", "0.9"),
        ("gpu_memory_utilization", float("nan")),
        ("enable_prefix_caching", 1),
        ("enforce_eager", None),
        ("seed", -1),
        ("seed", 1 << 64),
        ("model", ""),
    ],
)
def test_a_bad_value_names_the_field(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.* is not allowed; allowed: "):
        EngineConfig.make(**{"model": "m", field: value})


def test_unknown_and_missing_settings():
    with pytest.raises(ConfigError, match="max_seqs=3 is not a setting of the engine; known: model, device"):
        config(max_seqs=3)
    with pytest.raises(ConfigError, match="model is missing"):
        EngineConfig.make(seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().seed = 2


def test_defaults_of_a_step():
    assert step_limits(config(), True, 4096).max_num_batched_tokens == 8192
    assert step_limits(config(), False, 4096).max_num_batched_tokens == 2048
    assert step_limits(config(max_num_seqs=3000), False, 4096).max_num_batched_tokens == 3000
    assert step_limits(config(), False, 4096).max_num_seqs == 256
    assert step_limits(config(max_num_batched_tokens=16), True, 4096).max_num_seqs == 16
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=16 is not allowed; .* max_num_seqs \(17\)"):
        config(max_num_batched_tokens=16, max_num_seqs=17)
    limits = step_limits(config(max_model_len=100), True, 4096)
    assert (limits.max_model_len, limits.blocks_per_sequence, limits.logits_rows) == (100, 7, 256)
    with pytest.raises(ConfigError, match="max_model_len=5000 is not allowed; allowed: at most 4096"):
        step_limits(config(max_model_len=5000), True, 4096)


def test_pages_on_a_cpu():
    def blocks(page_bytes: int, **settings) -> int:
        return cpu_blocks(config(**settings), step_limits(config(**settings), False, 1024), page_bytes)

    assert blocks(1 << 10) == 8 * 64
    assert blocks(1 << 22) == 256  # 1 GiB
    assert blocks(1 << 31) == 1
    assert blocks(1 << 31, max_model_len=512) == 32  # a length that was asked for fits
    assert blocks(1 << 10, max_num_seqs=2) == 2 * 64


def test_pages_on_a_gpu():
    assert gpu_blocks(10_000, 3_000) == 3
    with pytest.raises(OutOfMemoryError, match=r"needs at least 1.0 MiB, but -2.0 MiB .* raise gpu_memory_utilization"):
        gpu_blocks(-(2 << 20), 1 << 20)


def test_the_plan_leaves_nothing_open(monkeypatch):
    limits = step_limits(config(), True, 1024)
    plan = make_plan(config(), limits, True, 100)
    assert (plan.max_model_len, plan.num_blocks, plan.depth, plan.use_graphs) == (1024, 100, 2, True)
    assert plan.decode_buckets[-1] == 256 and None not in dataclasses.astuple(plan)
    assert make_plan(config(), limits, True, 10).max_model_len == 160, "lowered to what fits"
    with pytest.raises(OutOfMemoryError, match="max_model_len=1024 needs 64 KV pages, but 10 fit"):
        make_plan(config(max_model_len=1024), limits, True, 10)
    on_cpu = make_plan(config(), limits, False, 100)
    assert (on_cpu.depth, on_cpu.use_graphs, on_cpu.decode_buckets) == (1, False, ())
    assert not make_plan(config(enforce_eager=True), limits, True, 100).use_graphs
    monkeypatch.setenv("CUPYINFER_NO_GRAPHS", "1")
    assert not make_plan(config(), limits, True, 100).use_graphs


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100, 256, 257, 300, 1000])
def test_buckets_rise_to_the_most(most):
    buckets = decode_buckets(most)
    assert buckets[-1] == most and list(buckets) == sorted(set(buckets)) and buckets[0] == 1
    assert all(b - a <= max(4, a // 4, 8) or b - a <= 32 for a, b in zip(buckets, buckets[1:], strict=False))
