"""gated_linear: the reference against a plain loop, and its launch shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops.gated_linear import KINDS, gated_linear
from cupyinfer.runtime.gemm_plan import gated_plan

ACTIVATIONS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_formula(kind):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 16)), rng.standard_normal((10, 16)) / 4
    out = np.full((3, 5), np.nan, np.float32)
    gated_linear(x.astype(np.float32), weight.astype(np.float32), kind, out=out)
    for t in range(3):
        for f in range(5):
            gate = sum(x[t, i] * weight[f, i] for i in range(16))
            up = sum(x[t, i] * weight[5 + f, i] for i in range(16))
            assert out[t, f] == pytest.approx(ACTIVATIONS[kind](gate) * up, rel=2e-5, abs=1e-6)


def test_another_activation_is_refused():
    x, weight, out = (np.zeros(s, np.float32) for s in ((1, 8), (4, 8), (1, 2)))
    with pytest.raises(ContractError, match="kind='relu'"):
        gated_linear(x, weight, "relu", out=out)


@pytest.mark.parametrize("T, F, I, itemsize", [(1, 14336, 4096, 2), (16, 3072, 1024, 2), (8, 100, 64, 4), (1, 1, 8, 2)])
def test_every_output_has_a_block(T, F, I, itemsize):
    plan = gated_plan(T, F, I, itemsize, 132)
    assert plan.tiles % 2 == 0 and plan.blocks * 4 * plan.tiles >= F > (plan.blocks - 1) * 4 * plan.tiles
    assert plan.rows >= T and plan.shared <= 227 * 1024
