"""RMSNorm and LayerNorm, alone and fused with the residual addition before them."""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.runtime.kernels import KernelSource, get, launch
from cupyinfer.types import Array, dtype_of

SOURCE = KernelSource("norm/rms_norm.cu", ("rms_norm", "add_rms_norm"), {"DTYPE": ("float", "fp16", "bf16")})
_CHUNKS = 8  # as in rms_norm.cu


# --- NumPy reference ------------------------------------------------------------------------------------------------
def _rms_norm_reference(x, weight, out, eps, offset):
    wide = x.astype(np.float32)
    scale = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps))
    out[...] = wide * scale * (weight.astype(np.float32) + np.float32(offset))


def _add_rms_norm_reference(x, residual, weight, out, eps, offset):
    residual += x
    _rms_norm_reference(residual, weight, out, eps, offset)


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _block(x: Array) -> int:
    """Threads for a row: one 16-byte chunk each where the row is short, 8 chunks at most."""
    chunks = x.shape[-1] * x.itemsize // 16
    return int(min(1024, max(32, -(-chunks // 32) * 32)))


def _rms_norm_launch(x, weight, out, eps, offset):
    kernel = get(SOURCE, "rms_norm", DTYPE=dtype_of(x).ctype)
    args = (x, weight, out, np.int32(x.shape[1]), np.float32(eps), np.float32(offset))
    launch(kernel, (x.shape[0],), (_block(x),), args)


def _add_rms_norm_launch(x, residual, weight, out, eps, offset):
    kernel = get(SOURCE, "add_rms_norm", DTYPE=dtype_of(x).ctype)
    args = (x, residual, weight, out, np.int32(x.shape[1]), np.float32(eps), np.float32(offset))
    launch(kernel, (x.shape[0],), (_block(x),), args)


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample(rng, dtype, T, E):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {"x": draw(T, E), "weight": draw(E), "out": np.full((T, E), np.nan, dtype), "eps": 1e-6, "offset": 0.0}


def _sample_add(rng, dtype, T, E):
    return _sample(rng, dtype, T, E) | {"residual": rng.standard_normal((T, E)).astype(dtype)}


_SIZES = tuple({"T": t, "E": e} for t, e in ((1, 8), (3, 256), (17, 1024), (5, 4096), (2, 5120), (1, 8192), (0, 256)))

RMS_NORM = Op(
    name="rms_norm",
    formula="out = x / sqrt(mean(x^2) + eps) * (weight + offset)",
    source="Zhang & Sennrich 2019, arXiv:1910.07467; Hugging Face LlamaRMSNorm, Gemma2RMSNorm (offset 1)",
    args=(Arg("x", "T E"), Arg("weight", "E"), Arg("out", "T E", role="out")),
    scalars={"eps": "added to the mean square", "offset": "added to every weight: 1 for Gemma, else 0"},
    reference=_rms_norm_reference,
    launch=_rms_norm_launch,
    sample=_sample,
    sizes=_SIZES,
    cost=lambda x, weight, **_: (2 * x.nbytes + weight.nbytes, 4 * x.size),
)

ADD_RMS_NORM = Op(
    name="add_rms_norm",
    formula="residual += x; out = residual / sqrt(mean(residual^2) + eps) * (weight + offset)",
    source="as rms_norm",
    args=(Arg("x", "T E"), Arg("residual", "T E", role="inout"), Arg("weight", "E"), Arg("out", "T E", role="out")),
    scalars=RMS_NORM.scalars,
    reference=_add_rms_norm_reference,
    launch=_add_rms_norm_launch,
    sample=_sample_add,
    sizes=_SIZES,
    cost=lambda x, weight, **_: (4 * x.nbytes + weight.nbytes, 5 * x.size),
)


# --- public functions -----------------------------------------------------------------------------------------------
def rms_norm(x: Array, weight: Array, eps: float = 1e-6, offset: float = 0.0, *, out: Array) -> Array:
    """``out = x / sqrt(mean(x**2) + eps) * (weight + offset)`` for each row of x [T, E].

    weight [E]; x, weight and out share a dtype (float32, float16, bfloat16); sums are float32. E must be a multiple of
    16 bytes. Raises ContractError. Source: arXiv:1910.07467.
    """
    RMS_NORM(x=x, weight=weight, out=out, eps=eps, offset=offset)
    return out


def add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float = 1e-6, offset: float = 0.0, *, out: Array
) -> Array:
    """``residual += x`` in place, then ``out = rms_norm(residual)``; all [T, E]. Saves one pass over the rows."""
    ADD_RMS_NORM(x=x, residual=residual, weight=weight, out=out, eps=eps, offset=offset)
    return out
