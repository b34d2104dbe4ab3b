"""Mixture of experts: the references against loops over tokens, tile plans, and on a GPU determinism and replay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupyinfer.errors import ConfigError, ContractError
from cupyinfer.ops.moe import _check_sizes, moe_mlp, moe_plan, route
from cupyinfer.runtime.arena import Arena
from cupyinfer.types import BFLOAT16


def routed(logits, k, renormalise):
    weights, experts = np.full((len(logits), k), np.nan, np.float32), np.full((len(logits), k), -1, np.int32)
    route(logits, k, renormalise, weights=weights, experts=experts)
    return weights, experts


def silu(v):
    return v / (1 + math.exp(-v))


def gelu_tanh(v):
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def slow_moe(x, weights, experts, gate_up, down, act):
    """One token, one choice, one output at a time, in float64."""
    x, gate_up, down = (a.astype(np.float64) for a in (x, gate_up, down))
    out, F = np.zeros(x.shape), down.shape[2]
    for t in range(len(x)):
        for weight, e in zip(weights[t], experts[t], strict=True):
            if 0 <= e < len(down):
                both = gate_up[e] @ x[t]
                hidden = np.array([act(both[f]) * both[F + f] for f in range(F)])
                out[t] += float(weight) * (down[e] @ hidden)
    return out


def problem(T, X, k, E, F, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    weights, experts = routed(draw(T, X), k, True)
    arrays = draw(T, E), draw(X, 2 * F, E) / E**0.5, draw(X, E, F) / F**0.5
    x, gate_up, down = (a.astype(dtype) for a in arrays)
    return x, weights, experts, gate_up, down


def test_route_is_softmax_then_top_k():
    logits = np.array([[1.0, 3.0, 2.0, 0.0]], np.float32)
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    weights, experts = routed(logits, 2, False)
    assert experts.tolist() == [[1, 2]]
    np.testing.assert_allclose(weights[0], p[[1, 2]], rtol=1e-6)
    weights, experts = routed(logits, 2, True)
    np.testing.assert_allclose(weights[0], p[[1, 2]] / (p[1] + p[2]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_equal_logits_go_to_the_lower_index(dtype):
    logits = np.array([[0.5, 2.0, 0.5, 2.0, 2.0, -1.0], [0.0, -0.0, 0.0, -0.0, 0.0, -0.0]], dtype)
    _, experts = routed(logits, 4, True)
    assert experts.tolist() == [[1, 3, 4, 0], [0, 1, 2, 3]]


def test_large_logits_do_not_overflow():
    weights, experts = routed(np.array([[1e30, -1e30, 9e29]], np.float32), 3, True)
    assert experts.tolist() == [[0, 2, 1]] and weights.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind, act", [("silu", silu), ("gelu_tanh", gelu_tanh)])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_moe_mlp_is_a_loop_over_tokens(T, kind, act):
    args = problem(T, 6, 3, 16, 24)
    out = np.full((T, 16), np.nan, np.float32)
    assert moe_mlp(*args, kind, out=out) is out
    np.testing.assert_allclose(out, slow_moe(*args, act), rtol=1e-4, atol=1e-5)


def test_an_expert_outside_the_range_adds_nothing():
    x, weights, experts, gate_up, down = problem(4, 6, 3, 16, 24)
    experts[0], experts[1, 2], experts[2, 0] = -1, 6, -7
    out = np.full((4, 16), np.nan, np.float32)
    moe_mlp(x, weights, experts, gate_up, down, out=out)
    assert not out[0].any() and out[1].any()
    np.testing.assert_allclose(out, slow_moe(x, weights, experts, gate_up, down, silu), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("E, F", [(12, 24), (16, 20), (3, 5)])
def test_the_reference_takes_any_width(E, F):
    args = problem(3, 4, 2, E, F)
    out = np.full((3, E), np.nan, np.float32)
    moe_mlp(*args, out=out)
    np.testing.assert_allclose(out, slow_moe(*args, silu), rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_refused():
    x, weights, experts, gate_up, down = problem(2, 4, 2, 16, 24)
    out = np.zeros((2, 16), np.float32)
    with pytest.raises(ConfigError, match=r"kind='relu' is not allowed; allowed: silu, gelu_tanh"):
        moe_mlp(x, weights, experts, gate_up, down, "relu", out=out)
    with pytest.raises(ContractError, match="F multiples of 8"):
        _check_sizes(4, 16, 20)
    with pytest.raises(ContractError, match="gate_up"):
        moe_mlp(x, weights, experts, gate_up[:, :40], down, out=out)
    with pytest.raises(ContractError, match="experts has dtype int64"):
        moe_mlp(x, weights, experts.astype(np.int64), gate_up, down, out=out)
    logits = np.zeros((2, 4), np.float32)
    for k in (0, 3, 5):
        with pytest.raises(ContractError, match=f"top_k={k} is not allowed; allowed: 1 to 4"):
            route(logits, k, True, weights=weights, experts=experts)
    with pytest.raises(ContractError, match="300 experts; allowed: at most 256"):
        route(np.zeros((2, 300), np.float32), 2, True, weights=weights, experts=experts)


def tiles_needed(experts, X, rows):
    return sum(-(-int(n) // rows) for n in np.bincount(experts.ravel(), minlength=X))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("X, k", [(8, 2), (128, 8), (4, 4), (1, 1)])
def test_the_grid_holds_every_routing(X, k, itemsize):
    rng = np.random.default_rng(0)
    for T in (1, 2, 3, 7, 8, 9, 31, 64, 200, 1000):
        plan = moe_plan(T, k, X, 4096, 1536, itemsize)
        spread = np.argsort(rng.standard_normal((T, X)), axis=1)[:, :k]
        piled = np.tile(np.arange(k), (T, 1))
        uneven = np.minimum(spread, rng.integers(0, X, (T, 1)))
        for experts in (spread, piled, uneven):
            assert tiles_needed(experts, X, plan.rows) <= plan.max_tiles
        assert plan.max_tiles <= min(T * k, T * k // plan.rows + X)


def test_few_rows_stream_and_many_rows_tile():
    assert moe_plan(1, 8, 128, 2048, 768, 2) == moe_plan(1, 8, 128, 2048, 768, 2)
    assert [moe_plan(t, 2, 8, 4096, 14336, 2).entry for t in (1, 32, 33)] == ["experts_few"] * 2 + ["experts_tiled"]
    assert [moe_plan(t, 2, 8, 4096, 14336, 2).rows for t in (8, 9, 33, 384, 385)] == [8, 16, 64, 64, 128]
    assert moe_plan(4096, 2, 8, 4096, 14336, 4).entry == "experts_few"  # float32 has no tensor-core tiles


# --- on the GPU -----------------------------------------------------------------------------------------------------
def on_device(cupy, arrays):
    return [cupy.asarray(a) for a in arrays]


def poisoned(cupy, shape, dtype):
    return cupy.asarray(np.full(shape, np.nan, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [3, 12, 100, 500])
def test_two_runs_give_the_same_bits(cupy, T):
    args, arena = on_device(cupy, problem(T, 8, 2, 256, 512, BFLOAT16)), Arena(cupy)
    first, second = (poisoned(cupy, (T, 256), BFLOAT16) for _ in range(2))
    moe_mlp(*args, out=first, arena=arena)
    moe_mlp(*args, out=second, arena=arena)
    assert cupy.array_equal(first.view(np.uint8), second.view(np.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("T, dtype", [(4, np.float32), (4, BFLOAT16), (60, np.float32), (60, BFLOAT16)])
def test_experts_outside_the_range_on_the_gpu(cupy, T, dtype):
    x, weights, experts, gate_up, down = problem(T, 6, 3, 64, 96, dtype)
    experts[::3], experts[1, 1], experts[2, 0] = -1, 6, 1 << 30
    out = poisoned(cupy, (T, 64), dtype)
    moe_mlp(*on_device(cupy, (x, weights, experts, gate_up, down)), out=out, arena=Arena(cupy))
    want = slow_moe(x, weights, experts, gate_up, down, silu)
    error = np.linalg.norm(out.get().astype(np.float64) - want) / np.linalg.norm(want)
    assert error <= (5e-6 if dtype == np.float32 else 1e-2)
    assert not out[0].get().astype(np.float32).any()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [2, 40])
def test_a_captured_graph_follows_the_routing(cupy, T):
    """One graph, replayed with other experts: the launch shape must not depend on where the tokens go."""
    from cupyinfer.runtime.graph import capture

    x, weights, experts, gate_up, down = problem(T, 8, 2, 64, 96, BFLOAT16)
    args, arena = on_device(cupy, (x, weights, experts, gate_up, down)), Arena(cupy)
    out, stream = poisoned(cupy, (T, 64), BFLOAT16), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        moe_mlp(*args, out=out, arena=arena)
    stream.synchronize()
    with capture(stream) as graph:
        moe_mlp(*args, out=out, arena=arena)
    for shift in (0, 1, 3):
        moved = ((experts + shift) % 8).astype(np.int32)
        args[2].set(moved)
        out.view(np.uint8).fill(255)
        cupy.cuda.Device().synchronize()
        graph.launch()
        stream.synchronize()
        want = slow_moe(x, weights, moved, gate_up, down, silu)
        assert np.linalg.norm(out.get().astype(np.float64) - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.gpu
def test_an_arena_is_asked_for(cupy):
    args = on_device(cupy, problem(2, 4, 2, 16, 24))
    with pytest.raises(ContractError, match="arena is missing"):
        moe_mlp(*args, out=poisoned(cupy, (2, 16), np.float32))
