"""rope_append: the reference against a slow loop, what it must leave alone, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops.rope import _check_shapes, _vector, rope_append
from cupyinfer.types import BFLOAT16


def make(T=5, H=4, K=2, D=16, Dr=16, S=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    angles = np.arange(64)[:, None] * 100.0 ** (-np.arange(0, Dr, 2) / Dr)
    return {
        "qkv": rng.standard_normal((T, H + 2 * K, D)).astype(dtype),
        "positions": rng.integers(0, 64, T).astype(np.int32),
        "slot_mapping": rng.permutation(4 * S)[:T].astype(np.int32),
        "rope_table": np.concatenate((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32),
        "kv_cache": rng.standard_normal((4, 2, K, S, D)).astype(dtype),
        "q_out": np.full((T, H, D), np.nan, dtype),
    }


def slow_head(x, table_row, weight, eps, offset):
    """One head of one token, value by value, in double precision."""
    x = [float(v) for v in x]
    if weight is not None:
        root = math.sqrt(sum(v * v for v in x) / len(x) + eps)
        x = [v / root * (float(w) + offset) for v, w in zip(x, weight, strict=True)]
    half = 0 if table_row is None else len(table_row) // 2
    out = list(x)
    for i in range(half):
        cos, sin = float(table_row[i]), float(table_row[half + i])
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


@pytest.mark.parametrize("Dr", [16, 4, 6, None])
@pytest.mark.parametrize("norm", [None, 0.0, 1.0])
def test_reference_is_the_formula_value_by_value(Dr, norm):
    inputs = make(Dr=Dr or 16)
    if Dr is None:
        inputs["rope_table"] = None
    rng = np.random.default_rng(5)
    q_norm, k_norm = (None, None) if norm is None else rng.standard_normal((2, 16)).astype(np.float32)
    cache = inputs["kv_cache"]
    rope_append(**inputs, q_norm=q_norm, k_norm=k_norm, norm_eps=1e-3, norm_offset=norm or 0.0)
    for t in range(5):
        page, offset = divmod(int(inputs["slot_mapping"][t]), 8)
        row = None if Dr is None else inputs["rope_table"][inputs["positions"][t]]
        for h in range(4):
            want = slow_head(inputs["qkv"][t, h], row, q_norm, 1e-3, norm or 0.0)
            np.testing.assert_allclose(inputs["q_out"][t, h], want, rtol=1e-5, atol=1e-6)
        for h in range(2):
            want = slow_head(inputs["qkv"][t, 4 + h], row, k_norm, 1e-3, norm or 0.0)
            np.testing.assert_allclose(cache[page, 0, h, offset], want, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(cache[page, 1, h, offset], inputs["qkv"][t, 6 + h])


def test_only_named_slots_are_written_and_padding_writes_nothing():
    inputs = make(T=6)
    inputs["slot_mapping"][[1, 4]] = -1
    before = inputs["kv_cache"].copy()
    rope_append(**inputs)
    changed = np.argwhere((before != inputs["kv_cache"]).any(axis=(1, 2, 4)))
    assert sorted(page * 8 + offset for page, offset in changed) == sorted(inputs["slot_mapping"][[0, 2, 3, 5]])
    assert np.isfinite(inputs["q_out"]).all()  # the queries of padding tokens are still defined


def test_scores_depend_on_the_distance_of_positions_only():
    inputs = make(T=2, H=1, K=1)
    inputs["qkv"][1] = inputs["qkv"][0]
    scores = []
    for shift in (0, 7, 40):
        inputs["positions"][:] = (3 + shift, 9 + shift)
        rope_append(**inputs)
        page, offset = divmod(int(inputs["slot_mapping"][1]), 8)
        scores.append(float(inputs["q_out"][0, 0] @ inputs["kv_cache"][page, 0, 0, offset]))
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)


def test_sixteen_bit_values_are_rounded_once():
    inputs = make(dtype=BFLOAT16)
    wide = {k: v.astype(np.float32) if v.dtype == BFLOAT16 else v for k, v in inputs.items()}
    rope_append(**inputs)
    rope_append(**wide)
    np.testing.assert_array_equal(inputs["q_out"], wide["q_out"].astype(BFLOAT16))
    np.testing.assert_array_equal(inputs["kv_cache"], wide["kv_cache"].astype(BFLOAT16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_out": np.zeros((5, 3, 16), np.float32)}, r"qkv has 8 heads; expected H \+ 2\*K = 3 \+ 2\*2"),
        ({"rope_table": np.zeros((64, 18), np.float32)}, "rotary dim 18 is not allowed"),
        ({"rope_table": np.zeros((64, 5), np.float32)}, "rotary dim 5 is not allowed; allowed: even"),
        ({"kv_cache": np.zeros((4, 2, 2, 12, 16), np.float32)}, "page size 12 is not allowed"),
        ({"positions": np.zeros(5, np.int64)}, "positions has dtype int64"),
        ({"slot_mapping": np.zeros(4, np.int32)}, "slot_mapping"),
        ({"q_norm": np.zeros(8, np.float32)}, "q_norm"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ContractError, match=message):
        rope_append(**(make() | change))


def test_odd_head_dims_are_refused_on_a_gpu():
    with pytest.raises(ContractError, match="head dim 20 is not allowed; allowed: a multiple of 8 up to 256"):
        _check_shapes((5, 8, 20), 4, 2, 8, 16)


@pytest.mark.parametrize(
    ("D", "rotary", "itemsize", "values"),
    [(128, 128, 2, 8), (128, 128, 4, 4), (40, 6, 2, 1), (80, 20, 2, 2), (64, 16, 2, 8), (64, 0, 2, 8), (96, 24, 4, 4)],
)
def test_vector_width_divides_both_halves_of_a_rotation(D, rotary, itemsize, values):
    assert _vector(D, rotary, itemsize) == values
