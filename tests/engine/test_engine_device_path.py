"""The GPU's code path with an acted device: padding, packed uploads, graphs, one step ahead, memory plan."""

from __future__ import annotations

import numpy as np
import pytest
from fake_device import fake_gpu_engine
from fake_model import VOCAB, alone, run
from test_engine_pressure import Outcome, check_outcome, drive, random_requests

from cupyinfer.errors import OutOfMemoryError
from cupyinfer.sampling_params import SamplingParams


@pytest.mark.parametrize("eager", [False, True])
def test_tokens_through_padded_graphs(monkeypatch, eager):
    engine = fake_gpu_engine(monkeypatch, num_gpu_blocks_override=40, enforce_eager=eager)
    requests = random_requests(np.random.default_rng(5))
    drive(engine, requests, np.random.default_rng(6))
    for outcome in requests:
        check_outcome(outcome)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert (stats.graph_replays == 0) if eager else (stats.graph_replays > 50)


def test_plain_and_special_rows_side_by_side(monkeypatch):
    """Rows that need more than a draw use the forward graph; their neighbours' tokens do not change."""
    engine = fake_gpu_engine(monkeypatch)
    plain = [
        Outcome([i, i + 1, 7], SamplingParams(temperature=0.8, seed=i, max_tokens=40), [[]], [None]) for i in range(9)
    ]
    for i, outcome in enumerate(plain):
        engine.add_request(str(i), outcome.prompt, outcome.params)
    biased = SamplingParams(temperature=0, max_tokens=30, logit_bias={5: 100.0}, logprobs=2, ignore_eos=True)
    engine.add_request("biased", [1, 2, 3], biased)
    engine.add_request("top", [4], SamplingParams(temperature=1.0, top_k=1, max_tokens=40, seed=0))
    out = run(engine)
    assert out["biased", 0][0] == [5] * 30
    assert out["top", 0] == alone([4], SamplingParams(temperature=0, max_tokens=40))
    for i, outcome in enumerate(plain):
        assert out[str(i), 0] == alone(outcome.prompt, outcome.params, i)
    assert any(kind == "forward" for kind, _ in engine.runner.graphs.steps)


def test_memory_plan_fills_what_is_left(monkeypatch):
    stages = []
    engine = fake_gpu_engine(
        monkeypatch, progress=lambda *args: stages.append(args), gpu_memory_utilization=0.9, max_num_seqs=5
    )
    plan, page = engine.plan, engine.pool.layout.page_bytes
    assert page == 2 * 16 * 4
    graphs = 4 * 1 * 12 * (16 << 10)
    assert plan.decode_buckets == (1, 2, 4, 5) and plan.depth == 2
    assert plan.num_blocks == int((10 << 20) - 0.1 * (12 << 20) - graphs) // page
    assert stages == [("graphs", i, 4) for i in range(1, 5)]  # the stand-in has no kernels to compile
    assert len(engine.runner.graphs.steps) == 4
    longest = max(step.num_tokens for step in engine.runner.model.steps)
    assert longest == plan.max_num_batched_tokens


def test_too_little_memory_names_what_to_lower(monkeypatch):
    with pytest.raises(OutOfMemoryError, match="raise gpu_memory_utilization or lower max_num_batched_tokens"):
        fake_gpu_engine(monkeypatch, gpu_memory_utilization=0.1)
    with pytest.raises(OutOfMemoryError, match="max_model_len=640 needs 40 KV pages, but 39 fit"):
        fake_gpu_engine(monkeypatch, num_gpu_blocks_override=39, max_model_len=640)
    assert fake_gpu_engine(monkeypatch, num_gpu_blocks_override=39).plan.max_model_len == 39 * 16


def test_graphs_are_captured_again_after_the_pool_shrank(monkeypatch):
    engine = fake_gpu_engine(monkeypatch, num_gpu_blocks_override=60)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 50).tolist()
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    engine.add_request("a", prompt, params)
    tokens = [t for _ in range(20) for u in engine.step() for t in u.token_ids]
    assert engine.compact(num_pages=20) == 40 * engine.pool.layout.page_bytes
    assert not engine.runner.graphs.steps and engine.pool.num_pages == 20
    tokens += run(engine)["a", 0][0]
    assert tokens == alone(prompt, params)[0]
    assert ("simple", 1) in engine.runner.graphs.steps
