"""Penalties, biases and log-probabilities against slow loops and torch-free formulas; edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops.logits import apply_bias, apply_penalties, logprobs
from cupyinfer.runtime.arena import Arena


def i32(*values):
    return np.array(values, np.int32)


def f32(*values):
    return np.array(values, np.float32)


# --- penalties ------------------------------------------------------------------------------------------------------
def slow_penalties(logits, rows, counts, repetition, presence, frequency):
    out = logits.astype(np.float64)
    for n, row in enumerate(rows):
        for v in range(logits.shape[1]):
            if row < 0:
                continue
            in_prompt, times = counts[row, v] % 2 == 1, counts[row, v] // 2
            if in_prompt or times:
                out[n, v] = out[n, v] / repetition[n] if out[n, v] > 0 else out[n, v] * repetition[n]
            out[n, v] -= frequency[n] * times
            if times:
                out[n, v] -= presence[n]
    return out


def test_penalties_against_a_slow_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (5, 40)).astype(np.int32)
    logits = rng.standard_normal((6, 40)).astype(np.float32)
    arguments = (i32(3, -1, 0, 4, 1, 2), counts, f32(1.3, 2, 1, 0.5, 1, 1.1), f32(0, 1, 0.5, -1, 0, 0.2))
    arguments = (*arguments, f32(0, 1, -0.5, 0.25, 0, 0.1))
    want = slow_penalties(logits, *arguments)
    got = apply_penalties(logits.copy(), *arguments)
    assert np.allclose(got, want, rtol=1e-6, atol=1e-6)
    assert np.array_equal(got[1], logits[1]) and np.array_equal(got[4], logits[4])  # row -1; nothing switched on


def test_prompt_tokens_know_repetition_only():
    logits = f32([2.0, -2.0, 2.0, -2.0])
    counts = i32([1, 1, 2, 0])  # in the prompt, in the prompt, generated once, never seen
    got = apply_penalties(logits, i32(0), counts, f32(2.0), f32(0.5), f32(0.25))
    assert got.tolist() == [[1.0, -4.0, 1.0 - 0.75, -2.0]]


def test_a_forbidden_token_stays_forbidden():
    logits = f32([-np.inf, 1.0])
    apply_penalties(logits, i32(0), i32([5, 5]), f32(1.5), f32(-2), f32(-2))
    assert logits[0, 0] == -np.inf and np.isfinite(logits[0, 1])


# --- bias -----------------------------------------------------------------------------------------------------------
def test_bias_adds_masks_and_skips():
    logits = np.zeros((2, 5), np.float32)
    apply_bias(logits, i32(0, 1, -1, 1, 0, 0), i32(1, 4, 2, 0, 1, 3), f32(2.5, -np.inf, 9, -1, 0.5, 7))
    assert logits[0].tolist() == [0, 3.0, 0, 7, 0]
    assert logits[1].tolist() == [-1, 0, 0, 0, -np.inf]


def test_a_mask_wins_over_a_bias_on_the_same_token():
    logits = np.ones((1, 2), np.float32)
    apply_bias(logits, i32(0, 0), i32(1, 1), f32(100, -np.inf))
    assert logits.tolist() == [[1, -np.inf]]


# --- log-probabilities ----------------------------------------------------------------------------------------------
def run_logprobs(logits, tokens, top_n, module=np):
    N = len(logits)
    out = {
        "chosen": module.full(N, np.nan, np.float32),
        "ranks": module.full(N, -1, np.int32),
        "top_ids": module.full((N, top_n), -1, np.int32),
        "top_logprobs": module.full((N, top_n), np.nan, np.float32),
    }
    logprobs(module.asarray(logits), module.asarray(tokens), top_n, **out, arena=Arena(module))
    return out


def slow_logprobs(row, token, top_n):
    row = [-math.inf if math.isnan(v) else float(v) for v in row]
    total = max(row) + math.log(math.fsum(math.exp(v - max(row)) for v in row))
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))[:top_n]
    rank = 1 + sum(v > row[token] for v in row)
    return row[token] - total, rank, order, [row[v] - total for v in order]


@pytest.mark.parametrize("V, top_n", [(1, 1), (2, 0), (20, 20), (50, 5), (1000, 20)])
@pytest.mark.parametrize("coarse", [False, True])
def test_logprobs_against_a_slow_loop(V, top_n, coarse):
    rng = np.random.default_rng(V)
    logits = (3 * rng.standard_normal((4, V))).astype(np.float32)
    if coarse:
        logits = np.round(logits)
    logits[3, V // 2 :] = [-np.inf, np.nan][V % 2] if V > 1 else 0
    tokens = rng.integers(0, max(1, V // 2), 4).astype(np.int32)
    got = run_logprobs(logits, tokens, top_n)
    for n in range(4):
        chosen, rank, ids, values = slow_logprobs(logits[n], tokens[n], top_n)
        assert got["chosen"][n] == pytest.approx(chosen, rel=2e-6, abs=2e-6)
        assert got["ranks"][n] == rank
        assert got["top_ids"][n].tolist() == ids
        assert np.allclose(got["top_logprobs"][n], values, rtol=2e-6, atol=2e-6)


def test_far_apart_logits_do_not_overflow():
    got = run_logprobs(f32([1e30, 0, -1e30]), i32(0), 3)
    assert got["chosen"].tolist() == [0.0] and got["top_ids"].tolist() == [[0, 1, 2]]
    assert got["top_logprobs"][0].tolist() == [0.0, -np.float32(1e30), -np.float32(2e30)]


def test_an_id_outside_the_vocabulary_has_no_logprob():
    got = run_logprobs(np.zeros((3, 4), np.float32), i32(-1, 4, 2), 1)
    assert np.isnan(got["chosen"]).tolist() == [True, True, False]
    assert got["ranks"].tolist() == [0, 0, 1]


def test_log_softmax_is_that_of_the_raw_logits_and_sums_to_one():
    logits = np.random.default_rng(1).standard_normal((2, 20)).astype(np.float32)
    got = run_logprobs(logits, i32(0, 1), 20)
    assert np.allclose(np.exp(got["top_logprobs"].astype(np.float64)).sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("top_n, message", [(21, "allowed: 0 to 20"), (-1, "allowed: 0 to 20"), (5, "allowed: 0 to 4")])
def test_wrong_top_n_is_refused(top_n, message):
    logits = np.zeros((1, 4 if top_n == 5 else 64), np.float32)
    with pytest.raises(ContractError, match=message):
        logprobs(
            logits,
            i32(0),
            top_n,
            chosen=f32(0),
            ranks=i32(0),
            top_ids=np.zeros((1, max(0, top_n)), np.int32),
            top_logprobs=np.zeros((1, max(0, top_n)), np.float32),
        )


def hard_logits(V):
    """Rows whose largest logits are many, tied, clustered or masked."""
    rng = np.random.default_rng(V)
    draw = rng.standard_normal(V)
    rows = [draw, np.zeros(V), np.round(draw), np.where(np.arange(V) % 97 == 5, draw, -np.inf), np.sort(draw)]
    rows += [np.where(np.arange(V) < 300, 9 + draw, draw), np.where(np.arange(V) % 50 == 1, np.nan, 4 * draw)]
    return np.stack(rows).astype(np.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [20, 33, 700, 4096, 4097, 50257, 151936, 262144])
def test_kernel_on_hard_rows(V, cupy):
    logits = hard_logits(V)
    tokens = np.array([0, V - 1, V // 2, 5, -1, 3, V], np.int32)
    want, got = run_logprobs(logits, tokens, 20), run_logprobs(logits, tokens, 20, cupy)
    for name in ("ranks", "top_ids"):
        assert np.array_equal(got[name].get(), want[name]), name
    for name in ("chosen", "top_logprobs"):
        assert np.allclose(got[name].get(), want[name], rtol=3e-6, atol=3e-6, equal_nan=True), name
