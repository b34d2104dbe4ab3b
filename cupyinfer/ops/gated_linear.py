"""The first half of a gated MLP in one kernel, for few rows: both products, the activation and their combination."""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.activations import activation
from cupyinfer.runtime.device import multiprocessors
from cupyinfer.runtime.gemm_plan import SKINNY_ROWS, gated_plan
from cupyinfer.runtime.kernels import KernelSource, get, launch
from cupyinfer.types import Array, dtype_of

KINDS = ("silu", "gelu", "gelu_tanh")


def _compiles(macros) -> bool:
    if macros["DTYPE"] == "float":
        return macros["ROWS"] <= 8 and macros["TILES"] == 2
    return macros["ROWS"] >= 8


SOURCE = KernelSource(
    "gemm/gated_skinny.cu",
    ("gated_skinny",),
    {"DTYPE": ("float", "fp16", "bf16"), "ACTIVATION": KINDS, "ROWS": (1, 2, 4, 8, 16), "TILES": (2, 4)},
    only=_compiles,
)


# --- NumPy reference ------------------------------------------------------------------------------------------------
def _gated_linear_reference(x, weight, out, kind):
    both = (x.astype(np.float32) @ weight.astype(np.float32).T).astype(x.dtype).astype(np.float32)
    gate, up = np.split(both, 2, axis=1)
    out[...] = activation(gate, kind).astype(x.dtype).astype(np.float32) * up


# --- CUDA launcher --------------------------------------------------------------------------------------------------
def _gated_linear_launch(x, weight, out, kind):
    (T, I), F = x.shape, out.shape[1]
    if out.size == 0:
        return
    if not fits(x, weight):
        raise ContractError(
            f"gated_linear: x {x.shape} is not allowed on a GPU; allowed: at most {SKINNY_ROWS[x.itemsize]} rows whose "
            "length and address are multiples of 16 bytes"
        )
    plan = gated_plan(T, F, I, x.itemsize, multiprocessors(x.device.id))
    macros = {"DTYPE": dtype_of(x).ctype, "ACTIVATION": kind, "ROWS": plan.rows, "TILES": plan.tiles}
    args = (x, weight, out, np.int32(T), np.int32(F), np.int32(I))
    launch(get(SOURCE, "gated_skinny", **macros), (plan.blocks,), (32 * plan.warps,), args, shared=plan.shared)


# --- contract -------------------------------------------------------------------------------------------------------
def _sample(rng, dtype, T, F, I, kind="silu"):
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return {
        "x": draw(T, I).astype(dtype),
        "weight": (draw(2 * F, I) / np.sqrt(I)).astype(dtype),
        "out": np.full((T, F), np.nan, dtype),
        "kind": kind,
    }


GATED_LINEAR = Op(
    name="gated_linear",
    formula="out = act(x @ weight[:F].T) * (x @ weight[F:].T)",
    source="Shazeer 2020, arXiv:2002.05202 (gated linear units)",
    args=(Arg("x", "T I"), Arg("weight", "2*F I", doc="gate rows, then up rows"), Arg("out", "T F", role="out")),
    scalars={"kind": f"activation of the gate: {', '.join(KINDS)}"},
    reference=_gated_linear_reference,
    launch=_gated_linear_launch,
    sample=_sample,
    sizes=(
        *({"T": t, "F": 40, "I": 64} for t in (0, 1, 2, 3, 5, 8)),
        *(
            {"T": t, "F": f, "I": 328, "kind": k}
            for t, f, k in ((1, 13, "gelu"), (8, 257, "gelu_tanh"), (7, 1, "silu"))
        ),
        {"T": 1, "F": 3072, "I": 1024},
        {"T": 4, "F": 1030, "I": 2048},
    ),
    cost=lambda x, weight, out, **_: (x.nbytes + weight.nbytes + out.nbytes, 2 * x.size * weight.shape[0]),
    tolerance={"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2},
)


# --- public functions -----------------------------------------------------------------------------------------------
def fits(x: Array, weight: Array) -> bool:
    """True when :func:`gated_linear` has a GPU kernel for these arrays: few rows, multiples of 16 bytes."""
    size = x.itemsize
    aligned = x.data.ptr % 16 == 0 and weight.data.ptr % 16 == 0
    return x.shape[0] <= SKINNY_ROWS[size] and x.shape[1] * size % 16 == 0 and aligned


def gated_linear(x: Array, weight: Array, kind: str, *, out: Array) -> Array:
    """``out = act(x @ gate.T) * (x @ up.T)``: x [T, I], weight [2F, I] (gate rows first), out [T, F], one dtype.

    For the few rows of a decode step: on a GPU T is at most 16 (8 in float32), see :func:`fits`; use ``linear`` and
    ``gate_mul`` for more. Sums are float32 and rounded to the dtype before the activation. Raises ContractError.
    """
    if kind not in KINDS:
        raise ContractError(f"gated_linear: kind={kind!r} is not allowed; allowed: {', '.join(KINDS)}")
    GATED_LINEAR(x=x, weight=weight, out=out, kind=kind)
    return out
