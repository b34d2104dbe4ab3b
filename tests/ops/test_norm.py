"""RMSNorm and LayerNorm against slow loops, and the rows their kernels refuse."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops import norm
from cupyinfer.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

RNG = np.random.default_rng(4)
X = (2 * RNG.standard_normal((3, 24)) + 0.5).astype(np.float32)
WEIGHT, BIAS = RNG.standard_normal((2, 24)).astype(np.float32)


def slow_rms_norm(row, eps, offset):
    scale = 1 / math.sqrt(math.fsum(float(v) ** 2 for v in row) / len(row) + eps)
    return [float(v) * scale * (float(w) + offset) for v, w in zip(row, WEIGHT, strict=True)]


def slow_layer_norm(row, eps):
    mean = math.fsum(map(float, row)) / len(row)
    variance = math.fsum((float(v) - mean) ** 2 for v in row) / len(row)
    normal = [(float(v) - mean) / math.sqrt(variance + eps) for v in row]
    return [v * float(w) + float(b) for v, w, b in zip(normal, WEIGHT, BIAS, strict=True)]


@pytest.mark.parametrize("eps, offset", [(1e-6, 0.0), (1e-5, 1.0), (0.5, 0.0)])
def test_rms_norm_against_a_slow_loop(eps, offset):
    out = rms_norm(X, WEIGHT, eps, offset, out=np.full_like(X, np.nan))
    assert np.allclose(out, [slow_rms_norm(row, eps, offset) for row in X], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm_against_a_slow_loop(eps):
    out = layer_norm(X, WEIGHT, BIAS, eps, out=np.full_like(X, np.nan))
    assert np.allclose(out, [slow_layer_norm(row, eps) for row in X], rtol=2e-6, atol=1e-6)


def test_fused_forms_add_in_place_then_normalise():
    residual = RNG.standard_normal((3, 24)).astype(np.float32)
    total = residual + X
    for fused, plain, weights in (
        (add_rms_norm, rms_norm, (WEIGHT, 1e-6, 1.0)),
        (add_layer_norm, layer_norm, (WEIGHT, BIAS, 1e-5)),
    ):
        stream = residual.copy()
        out = fused(X, stream, *weights, out=np.full_like(X, np.nan))
        assert np.array_equal(stream, total)
        assert np.array_equal(out, plain(total, *weights, out=np.empty_like(X)))


def test_sixteen_bit_residual_is_rounded_before_the_norm():
    bf16 = ml_dtypes.bfloat16
    x, residual = X.astype(bf16), (3 * X).astype(bf16)
    total = (x.astype(np.float32) + residual.astype(np.float32)).astype(bf16)
    out = add_rms_norm(x, residual, WEIGHT.astype(bf16), out=np.zeros((3, 24), bf16))
    assert np.array_equal(residual, total)
    assert np.array_equal(out, rms_norm(total, WEIGHT.astype(bf16), out=np.zeros((3, 24), bf16)))


def test_a_large_mean_does_not_cancel():
    """E[x^2] - E[x]^2 in float32 would lose everything here."""
    x = (1000 + RNG.standard_normal((1, 512))).astype(np.float32)
    ones, zeros = np.ones(512, np.float32), np.zeros(512, np.float32)
    out = layer_norm(x, ones, zeros, out=np.empty_like(x)).astype(np.float64)
    wide = x.astype(np.float64)
    want = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    assert np.abs(out - want).max() < 1e-3


def test_a_row_of_zeros_gives_zeros_or_the_bias():
    zeros = np.zeros((1, 24), np.float32)
    assert not rms_norm(zeros, WEIGHT, out=np.empty_like(zeros)).any()
    assert np.array_equal(layer_norm(zeros, WEIGHT, BIAS, out=np.empty_like(zeros))[0], BIAS)


@pytest.mark.parametrize("dtype, longest", [(np.float32, 16384), (np.float16, 32768), (ml_dtypes.bfloat16, 32768)])
def test_rows_that_the_kernels_cannot_hold_are_refused(dtype, longest):
    assert norm._block(np.zeros((1, longest), dtype)) == 512
    assert norm._block(np.zeros((1, 8), dtype)) == 32
    for E in (longest + 8, 12 if dtype != np.float32 else 6):
        with pytest.raises(ContractError, match=f"E={E}.*multiple of .* up to {longest}"):
            norm._block(np.zeros((1, E), dtype))
