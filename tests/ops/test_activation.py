"""Activations against the standard library's functions, value by value."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops.activation import GATES, KINDS, activate, add, gate_mul, softcap

SCALAR = {
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}
EDGES = np.array([0.0, -0.0, 1e-30, -1e-30, 0.5, -0.5, 3, -3, 9, -9, 60, -60, 1e4, -1e4], np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_activate_value_by_value(kind):
    x = np.concatenate([EDGES, np.linspace(-8, 8, 200, dtype=np.float32)])[None]
    out = np.full_like(x, np.nan)
    activate(x, kind, out=out)
    want = [SCALAR[kind](float(v)) for v in x[0]]
    assert np.allclose(out[0], want, rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize("kind", GATES)
def test_gate_mul_is_activation_times_the_second_half(kind):
    rng = np.random.default_rng(2)
    gate_up = rng.standard_normal((3, 2 * 17)).astype(np.float32)
    out = np.full((3, 17), np.nan, np.float32)
    gate_mul(gate_up, kind, out=out)
    for t in range(3):
        for f in range(17):
            want = SCALAR[kind](float(gate_up[t, f])) * float(gate_up[t, 17 + f])
            assert out[t, f] == pytest.approx(want, rel=4e-6, abs=1e-7)


def test_gate_mul_rounds_the_activation_in_sixteen_bits():
    bf16 = ml_dtypes.bfloat16
    gate_up = np.array([[1.7, 3.3]], np.float32).astype(bf16)
    out = np.zeros((1, 1), bf16)
    gate_mul(gate_up, "silu", out=out)
    gate = np.float32(SCALAR["silu"](float(gate_up[0, 0]))).astype(bf16)
    assert out[0, 0] == (np.float32(gate) * np.float32(gate_up[0, 1])).astype(bf16)


def test_softcap_in_place_and_bounded():
    x = np.array([[-1e9, -30, -1e-3, 0, 15, 1e9]], np.float32)
    want = [30 * math.tanh(v / 30) for v in x[0].tolist()]
    softcap(x, 30.0, out=x)
    assert np.allclose(x[0], want, rtol=2e-6)
    assert abs(x).max() <= 30


def test_add_accumulates_in_place():
    residual = np.array([[1.0, 2.0]], np.float32)
    assert add(np.array([[0.5, -2.0]], np.float32), residual).tolist() == [[1.5, 0.0]]


def test_wrong_kinds_and_caps_are_refused():
    x = np.zeros((1, 8), np.float32)
    with pytest.raises(ContractError, match="kind='swish'.*allowed: silu, gelu, gelu_tanh, relu"):
        activate(x, "swish", out=x)
    with pytest.raises(ContractError, match="kind='relu'.*allowed: silu, gelu, gelu_tanh"):
        gate_mul(x, "relu", out=np.zeros((1, 4), np.float32))
    for cap in (0.0, -1.0, math.nan):
        with pytest.raises(ContractError, match="cap="):
            softcap(x, cap, out=x)
    with pytest.raises(ContractError, match="out"):
        gate_mul(x, "silu", out=np.zeros((1, 8), np.float32))
