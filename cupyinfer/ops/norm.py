"""RMSNorm and LayerNorm, alone and fused with the residual addition before them."""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.kernels import KernelSource, get, launch
from cupyinfer.types import Array, dtype_of

SOURCE = KernelSource("norm/rms_norm.cu", ("rms_norm", "add_rms_norm"), {"DTYPE": ("float", "fp16", "bf16")})
LAYER_SOURCE = KernelSource(
    "norm/layer_norm.cu", ("layer_norm", "add_layer_norm"), {"DTYPE": ("float", "fp16", "bf16")}
)
_CHUNKS, _MAX_THREADS = 8, 512  # as in rms_norm.cu and layer_norm.cu


# --- NumPy references -----------------------------------------------------------------------------------------------
def _wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float32 else x.astype(np.float32)


def _rms_norm_reference(x, weight, out, eps, offset):
    wide, factor = _wide(x), _wide(weight)
    mean_square = np.einsum("te,te->t", wide, wide)[:, None] / np.float32(x.shape[1])
    if offset:
        factor = factor + np.float32(offset)
    scaled = wide * (np.float32(1) / np.sqrt(mean_square + np.float32(eps)))
    np.multiply(scaled, factor, out=out, casting="same_kind")


def _add_rms_norm_reference(x, residual, weight, out, eps, offset):
    residual += x
    _rms_norm_reference(residual, weight, out, eps, offset)


def _layer_norm_reference(x, weight, bias, out, eps):
    wide = _wide(x)
    centred = wide - wide.mean(axis=1, keepdims=True)
    variance = np.einsum("te,te->t", centred, centred)[:, None] / np.float32(x.shape[1])
    centred *= np.float32(1) / np.sqrt(variance + np.float32(eps))
    centred *= _wide(weight)
    np.add(centred, _wide(bias), out=out, casting="same_kind")


def _add_layer_norm_reference(x, residual, weight, bias, out, eps):
    residual += x
    _layer_norm_reference(residual, weight, bias, out, eps)


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _block(x: Array) -> int:
    """Threads for a row: one 16-byte chunk each where the row is short, 8 chunks at most.

    Raises ContractError when a row is not a whole number of chunks or longer than 512 threads can keep in registers.
    """
    chunks, rest = divmod(x.shape[1] * x.itemsize, 16)
    if rest or chunks > _MAX_THREADS * _CHUNKS:
        N = 16 // x.itemsize
        raise ContractError(
            f"norm: a row of E={x.shape[1]} {x.dtype} values is not allowed; "
            f"allowed: a multiple of {N} up to {_MAX_THREADS * _CHUNKS * N}"
        )
    return int(min(_MAX_THREADS, max(32, -(-chunks // 32) * 32)))


def _rms_norm_launch(x, weight, out, eps, offset):
    kernel = get(SOURCE, "rms_norm", DTYPE=dtype_of(x).ctype)
    args = (x, weight, out, np.int32(x.shape[1]), np.float32(eps), np.float32(offset))
    launch(kernel, (x.shape[0],), (_block(x),), args)


def _add_rms_norm_launch(x, residual, weight, out, eps, offset):
    kernel = get(SOURCE, "add_rms_norm", DTYPE=dtype_of(x).ctype)
    args = (x, residual, weight, out, np.int32(x.shape[1]), np.float32(eps), np.float32(offset))
    launch(kernel, (x.shape[0],), (_block(x),), args)


def _layer_norm_launch(x, weight, bias, out, eps):
    kernel = get(LAYER_SOURCE, "layer_norm", DTYPE=dtype_of(x).ctype)
    launch(kernel, (x.shape[0],), (_block(x),), (x, weight, bias, out, np.int32(x.shape[1]), np.float32(eps)))


def _add_layer_norm_launch(x, residual, weight, bias, out, eps):
    kernel = get(LAYER_SOURCE, "add_layer_norm", DTYPE=dtype_of(x).ctype)
    args = (x, residual, weight, bias, out, np.int32(x.shape[1]), np.float32(eps))
    launch(kernel, (x.shape[0],), (_block(x),), args)


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample(rng, dtype, T, E):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {"x": draw(T, E), "weight": draw(E), "out": np.full((T, E), np.nan, dtype), "eps": 1e-6, "offset": 0.0}


def _sample_add(rng, dtype, T, E):
    return _sample(rng, dtype, T, E) | {"residual": rng.standard_normal((T, E)).astype(dtype)}


def _sample_layer(rng, dtype, T, E):
    draw = lambda *shape: (1 + rng.standard_normal(shape)).astype(dtype)
    return {"x": draw(T, E), "weight": draw(E), "bias": draw(E), "out": np.full((T, E), np.nan, dtype), "eps": 1e-5}


def _sample_add_layer(rng, dtype, T, E):
    return _sample_layer(rng, dtype, T, E) | {"residual": rng.standard_normal((T, E)).astype(dtype)}


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

_LAYER_ARGS = (Arg("weight", "E"), Arg("bias", "E"), Arg("out", "T E", role="out"))

LAYER_NORM = Op(
    name="layer_norm",
    formula="out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias",
    source="Ba, Kiros & Hinton 2016, arXiv:1607.06450; torch.nn.LayerNorm (biased variance)",
    args=(Arg("x", "T E"), *_LAYER_ARGS),
    scalars={"eps": "added to the variance"},
    reference=_layer_norm_reference,
    launch=_layer_norm_launch,
    sample=_sample_layer,
    sizes=_SIZES,
    cost=lambda x, weight, **_: (2 * x.nbytes + 2 * weight.nbytes, 8 * x.size),
)

ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    formula="residual += x; out = (residual - mean) / sqrt(var + eps) * weight + bias",
    source="as layer_norm",
    args=(Arg("x", "T E"), Arg("residual", "T E", role="inout"), *_LAYER_ARGS),
    scalars=LAYER_NORM.scalars,
    reference=_add_layer_norm_reference,
    launch=_add_layer_norm_launch,
    sample=_sample_add_layer,
    sizes=_SIZES,
    cost=lambda x, weight, **_: (4 * x.nbytes + 2 * weight.nbytes, 9 * x.size),
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


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5, *, out: Array) -> Array:
    """``out = (x - mean) / sqrt(var + eps) * weight + bias`` for each row of x [T, E]; biased variance.

    weight, bias [E]; all share a dtype; sums are float32. E must be a multiple of 16 bytes. Raises ContractError.
    Source: arXiv:1607.06450.
    """
    LAYER_NORM(x=x, weight=weight, bias=bias, out=out, eps=eps)
    return out


def add_layer_norm(x: Array, residual: Array, weight: Array, bias: Array, eps: float = 1e-5, *, out: Array) -> Array:
    """``residual += x`` in place, then ``out = layer_norm(residual)``; x, residual, out [T, E]."""
    ADD_LAYER_NORM(x=x, residual=residual, weight=weight, bias=bias, out=out, eps=eps)
    return out
