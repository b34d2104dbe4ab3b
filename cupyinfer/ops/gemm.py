"""Matrix products: ``linear`` (a layer's weight, stored [out, in] as Hugging Face does) and the general ``gemm``."""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.types import Array

_FEW_ROWS = 3  # on the CPU, up to here one matrix-vector product a row beats BLAS's matrix-matrix product


# --- NumPy reference ------------------------------------------------------------------------------------------------
def _product(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """out = x @ weight.T, all float32, without copies."""
    if len(x) <= _FEW_ROWS:
        for row, result in zip(x, out, strict=True):
            np.dot(weight, row, out=result)
    else:
        np.matmul(x, weight.T, out=out)


def _linear_reference(x, weight, out, bias=None, arena=None, config=None):
    if x.dtype == np.float32:
        _product(x, weight, out)
        if bias is not None:
            out += bias
        return
    wide = np.empty(out.shape, np.float32)
    _product(x.astype(np.float32), weight.astype(np.float32), wide)
    if bias is not None:
        wide += bias.astype(np.float32)
    out[...] = wide


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _linear_launch(x, weight, out, bias=None, arena=None, config=None):
    raise NotImplementedError


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample_linear(rng, dtype, T, N, I, bias=False, wide_out=False):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    out = np.full((T, N), np.nan, np.float32 if wide_out else dtype)
    return {"x": draw(T, I), "weight": draw(N, I), "bias": draw(N) if bias else None, "out": out}


LINEAR = Op(
    name="linear",
    formula="out = x @ weight.T + bias",
    args=(Arg("x", "T I"), Arg("weight", "N I"), Arg("bias", "N", optional=True), Arg("out", "T N", "anyfloat", "out")),
    reference=_linear_reference,
    launch=_linear_launch,
    sample=_sample_linear,
    sizes=({"T": 1, "N": 8, "I": 8}, {"T": 5, "N": 33, "I": 40, "bias": True, "wide_out": True}),
    cost=lambda x, weight, out, **_: (x.nbytes + weight.nbytes + out.nbytes, 2 * x.size * weight.shape[0]),
    tolerance={"float32": 5e-6, "float16": 2e-3, "bfloat16": 1e-2},
)


# --- public functions -----------------------------------------------------------------------------------------------
def linear(x: Array, weight: Array, bias: Array | None = None, *, out: Array, arena=None, config=None) -> Array:
    """``out = x @ weight.T + bias``: x [T, I], weight [N, I] as a Hugging Face Linear stores it, bias [N], out [T, N].

    x, weight and bias share a dtype; out has it too, or is float32 (logits of a 16-bit model). Sums are float32.
    Raises ContractError for other shapes or dtypes.
    """
    LINEAR(x=x, weight=weight, bias=bias, out=out, arena=arena, config=config)
    return out
