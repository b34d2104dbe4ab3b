"""Rows by index against slow loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops.embedding import embed, gather_rows, resolve_tokens


def test_embed_against_a_slow_loop():
    rng = np.random.default_rng(0)
    table, places = rng.standard_normal((7, 10)).astype(np.float32), rng.standard_normal((4, 10)).astype(np.float32)
    ids, positions = np.array([3, 3, 0, 6], np.int32), np.array([0, 3, 1, 1], np.int32)
    out = np.full((4, 10), np.nan, np.float32)
    embed(ids, table, out=out)
    assert all(np.array_equal(out[t], table[ids[t]]) for t in range(4))
    embed(ids, table, scale=3.0, positions=positions, position_table=places, out=out)
    for t in range(4):
        for e in range(10):
            assert out[t, e] == np.float32(np.float32(3.0) * table[ids[t], e]) + places[positions[t], e]


def test_sixteen_bit_rows_are_copied_bit_for_bit():
    table = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(64, 1024)
    ids = np.array([63, 1, 0], np.int32)
    out = np.zeros((3, 1024), ml_dtypes.bfloat16)
    embed(ids, table, out=out)
    assert np.array_equal(out.view(np.uint16), table[ids].view(np.uint16))


def test_scale_and_position_round_after_each_operation():
    """As Hugging Face's bfloat16 models: the scaled embedding is rounded before the position is added."""
    bf16 = ml_dtypes.bfloat16
    table, places = np.array([[1.0078125]], bf16), np.array([[0.00390625]], bf16)
    zero, out = np.zeros(1, np.int32), np.zeros((1, 1), bf16)
    embed(zero, table, scale=3.0, positions=zero, position_table=places, out=out)
    scaled = np.float32(3.0234375).astype(bf16)
    assert out[0, 0] == (np.float32(scaled) + np.float32(0.00390625)).astype(bf16)


def test_positions_without_their_table_are_refused():
    with pytest.raises(ContractError, match="positions and position_table"):
        embed(
            np.zeros(1, np.int32),
            np.zeros((1, 8), np.float32),
            positions=np.zeros(1, np.int32),
            out=np.zeros((1, 8), np.float32),
        )


def test_resolve_tokens_takes_device_tokens_where_a_row_is_named():
    out = np.full(4, -1, np.int32)
    last = np.array([100, 101, 102], np.int32)
    resolve_tokens(np.array([5, 6, 7, 8], np.int32), np.array([-1, 2, 0, -1], np.int32), last, out=out)
    assert out.tolist() == [5, 102, 100, 8]


def test_gather_rows_may_repeat_and_reorder():
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    out = np.full((4, 3), np.nan, np.float32)
    gather_rows(x, np.array([4, 0, 0, 2], np.int32), out=out)
    assert out.tolist() == [x[4].tolist(), x[0].tolist(), x[0].tolist(), x[2].tolist()]
