"""Elementwise ops of the MLP and around it: gated and plain activations, soft-capping, residual addition."""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.activations import activation
from cupyinfer.runtime.kernels import KernelSource, cdiv, get, launch
from cupyinfer.types import Array, dtype_of

GATES = ("silu", "gelu", "gelu_tanh")
KINDS = (*GATES, "relu")
SOURCE = KernelSource(
    "activation/activation.cu",
    ("gate_mul", "activate", "softcap", "add"),
    {"DTYPE": ("float", "fp16", "bf16"), "ACTIVATION": KINDS},
)
_THREADS = 256


# --- NumPy references -----------------------------------------------------------------------------------------------
def _wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float32 else x.astype(np.float32)


def _gate_mul_reference(gate_up, out, kind):
    F = out.shape[1]
    gate = activation(_wide(gate_up[:, :F]), kind)
    if out.dtype == np.float32:
        np.multiply(gate, gate_up[:, F:], out=out)
    else:
        out[...] = gate.astype(out.dtype).astype(np.float32) * _wide(gate_up[:, F:])


def _activate_reference(x, out, kind):
    out[...] = activation(_wide(x), kind)


def _softcap_reference(x, out, cap):
    cap = np.float32(cap)
    out[...] = cap * np.tanh(_wide(x) / cap)


def _add_reference(x, residual):
    residual += x


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _grid(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(rows, blocks along a row): every thread handles 16 bytes of one row."""
    return rows, cdiv(columns, _THREADS * (16 // itemsize))


def _kernel(entry: str, x: Array, kind: str = "silu"):
    return get(SOURCE, entry, DTYPE=dtype_of(x).ctype, ACTIVATION=kind)


def _gate_mul_launch(gate_up, out, kind):
    T, F = out.shape
    launch(_kernel("gate_mul", out, kind), _grid(T, F, out.itemsize), (_THREADS,), (gate_up, out, np.int32(F)))


def _activate_launch(x, out, kind):
    T, F = x.shape
    launch(_kernel("activate", x, kind), _grid(T, F, x.itemsize), (_THREADS,), (x, out, np.int32(F)))


def _softcap_launch(x, out, cap):
    T, F = x.shape
    args = (x, out, np.int32(F), np.float32(cap))
    launch(_kernel("softcap", x), _grid(T, F, x.itemsize), (_THREADS,), args)


def _add_launch(x, residual):
    T, E = x.shape
    launch(_kernel("add", x), _grid(T, E, x.itemsize), (_THREADS,), (x, residual, np.int32(E)))


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample_gate(rng, dtype, T, F, kind):
    gate_up = (3 * rng.standard_normal((T, 2 * F))).astype(dtype)
    return {"gate_up": gate_up, "out": np.full((T, F), np.nan, dtype), "kind": kind}


def _sample_activate(rng, dtype, T, F, kind):
    x = (3 * rng.standard_normal((T, F))).astype(dtype)
    return {"x": x, "out": np.full((T, F), np.nan, dtype), "kind": kind}


def _sample_softcap(rng, dtype, T, F):
    x = (40 * rng.standard_normal((T, F))).astype(dtype)
    return {"x": x, "out": np.full((T, F), np.nan, dtype), "cap": 30.0}


def _sample_add(rng, dtype, T, E):
    draw = lambda: rng.standard_normal((T, E)).astype(dtype)
    return {"x": draw(), "residual": draw()}


_SHAPES = ((1, 1), (3, 7), (5, 257), (2, 3072), (3, 14336), (0, 64))

GATE_MUL = Op(
    name="gate_mul",
    formula="out = act(gate_up[:, :F]) * gate_up[:, F:]",
    source="Shazeer 2020, arXiv:2002.05202; Hugging Face LlamaMLP (silu), Gemma2MLP (gelu_pytorch_tanh)",
    args=(Arg("gate_up", "T 2*F"), Arg("out", "T F", role="out")),
    scalars={"kind": "silu, gelu (exact, erf) or gelu_tanh"},
    reference=_gate_mul_reference,
    launch=_gate_mul_launch,
    sample=_sample_gate,
    sizes=tuple({"T": t, "F": f, "kind": GATES[i % 3]} for i, (t, f) in enumerate(_SHAPES)),
    cost=lambda gate_up, out, **_: (gate_up.nbytes + out.nbytes, 8 * out.size),
)

ACTIVATE = Op(
    name="activate",
    formula="out = act(x)",
    source="Hendrycks & Gimpel 2016, arXiv:1606.08415 (GELU); Hugging Face gelu, gelu_new, silu, relu",
    args=(Arg("x", "T F"), Arg("out", "T F", role="out")),
    scalars={"kind": "silu, gelu (exact, erf), gelu_tanh or relu"},
    reference=_activate_reference,
    launch=_activate_launch,
    sample=_sample_activate,
    sizes=tuple({"T": t, "F": f, "kind": KINDS[i % 4]} for i, (t, f) in enumerate(_SHAPES)),
    cost=lambda x, **_: (2 * x.nbytes, 8 * x.size),
)

SOFTCAP = Op(
    name="softcap",
    formula="out = cap * tanh(x / cap)",
    source="Gemma 2, arXiv:2408.00118; Hugging Face final_logit_softcapping",
    args=(Arg("x", "T F"), Arg("out", "T F", role="out", doc="may be x itself")),
    scalars={"cap": "bound of the result, > 0"},
    reference=_softcap_reference,
    launch=_softcap_launch,
    sample=_sample_softcap,
    sizes=tuple({"T": t, "F": f} for t, f in _SHAPES),
    cost=lambda x, **_: (2 * x.nbytes, 4 * x.size),
)

ADD = Op(
    name="add",
    formula="residual += x",
    args=(Arg("x", "T E"), Arg("residual", "T E", role="inout")),
    reference=_add_reference,
    launch=_add_launch,
    sample=_sample_add,
    sizes=tuple({"T": t, "E": e} for t, e in _SHAPES),
    cost=lambda x, **_: (3 * x.nbytes, x.size),
)


# --- public functions -----------------------------------------------------------------------------------------------
def gate_mul(gate_up: Array, kind: str, *, out: Array) -> Array:
    """``out = act(gate_up[:, :F]) * gate_up[:, F:]``: gate_up [T, 2F], out [T, F], any F, one float dtype.

    kind: silu, gelu (exact) or gelu_tanh. The activation is rounded to the dtype before the product, as Hugging Face
    does. Raises ContractError.
    """
    if kind not in GATES:
        raise ContractError(f"gate_mul: kind={kind!r} is not allowed; allowed: {', '.join(GATES)}")
    GATE_MUL(gate_up=gate_up, out=out, kind=kind)
    return out


def activate(x: Array, kind: str, *, out: Array) -> Array:
    """``out = act(x)``, both [T, F] of one float dtype; kind: silu, gelu, gelu_tanh or relu. out may be x."""
    if kind not in KINDS:
        raise ContractError(f"activate: kind={kind!r} is not allowed; allowed: {', '.join(KINDS)}")
    ACTIVATE(x=x, out=out, kind=kind)
    return out


def softcap(x: Array, cap: float, *, out: Array) -> Array:
    """``out = cap * tanh(x / cap)``, both [T, F] of one float dtype; out may be x. cap > 0, else ContractError."""
    if not cap > 0:
        raise ContractError(f"softcap: cap={cap!r} is not allowed; allowed: a number > 0")
    SOFTCAP(x=x, out=out, cap=cap)
    return out


def add(x: Array, residual: Array) -> Array:
    """``residual += x`` in place, both [T, E] of one float dtype; returns residual."""
    ADD(x=x, residual=residual)
    return residual
