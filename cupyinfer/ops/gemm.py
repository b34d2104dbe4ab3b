"""Matrix products: ``linear`` (a layer's weight, stored [out, in] as Hugging Face does) and the general ``gemm``.

On a GPU a product takes one of four routes (``GemmConfig.route``; ``auto`` is
:func:`~cupyinfer.runtime.gemm_plan.choose_route`):

* ``skinny``: our own kernel for few rows, which is a stream of the weights from memory (rawkernels/gemm/skinny.cu).
* ``lt``: cuBLASLt, with tuned algorithms and the bias added inside (:mod:`cupyinfer.runtime.cublaslt`).
* ``cublas``: ``cublasGemmEx`` on the handle and in the library of ``cupy.cublas`` (:mod:`cupyinfer.runtime.cublas`).
* ``cupy``: ``cupy.cublas`` itself, CuPy's documented way. CuPy refuses it while a CUDA graph is captured, which is why
  the two routes above call the same library beneath that refusal.

All accumulate in float32, never in TF32 unless asked, and give the same bits eagerly and in a graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError, invalid
from cupyinfer.runtime import cublas, cublaslt
from cupyinfer.runtime.device import multiprocessors
from cupyinfer.runtime.gemm_plan import DEFAULT, SKINNY_ROWS, GemmConfig, SkinnyPlan, choose_route, skinny_plan
from cupyinfer.runtime.kernels import NULL, KernelSource, cdiv, get, launch
from cupyinfer.types import Array, dtype_of

_FEW_ROWS = 3  # on the CPU, up to here one matrix-vector product a row beats BLAS's matrix-matrix product
_CTYPES = ("float", "fp16", "bf16")


def _compiles(macros: Any) -> bool:
    wide = macros["DTYPE"] == "float"
    if macros["OUT"] not in (macros["DTYPE"], "float"):
        return False
    return macros["ROWS"] <= 8 and macros["TILES"] <= 2 if wide else macros["ROWS"] >= 8


SKINNY = KernelSource(
    "gemm/skinny.cu",
    ("skinny",),
    {"DTYPE": _CTYPES, "OUT": _CTYPES, "ROWS": (1, 2, 4, 8, 16), "TILES": (1, 2, 4)},
    only=_compiles,
)
BIAS = KernelSource(
    "gemm/bias.cu", ("fill_bias",), {"DTYPE": _CTYPES, "OUT": _CTYPES}, only=lambda m: m["OUT"] in (m["DTYPE"], "float")
)


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


def _gemm_reference(a, b, out, transpose_a=False, transpose_b=False, alpha=1.0, beta=0.0, config=None):
    _check_shapes(a, b, out, transpose_a, transpose_b)
    a, b = a.astype(np.float32, copy=False), b.astype(np.float32, copy=False)
    product = np.float32(alpha) * ((a.T if transpose_a else a) @ (b.T if transpose_b else b))
    out[...] = product if beta == 0 else product + np.float32(beta) * out.astype(np.float32)


def _check_shapes(a: Array, b: Array, out: Array, transpose_a: bool, transpose_b: bool) -> None:
    if a.ndim != 2 or b.ndim != 2:
        raise ContractError(f"gemm: a and b must have two axes; shapes {a.shape}, {b.shape}")
    left, right = a.shape[::-1] if transpose_a else a.shape, b.shape[::-1] if transpose_b else b.shape
    if left[1] != right[0] or out.shape != (left[0], right[1]):
        raise ContractError(f"gemm: op(a) {left} @ op(b) {right} does not give out {out.shape}")


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def launch_skinny(x: Array, weight: Array, bias: Array | None, out: Array, plan: SkinnyPlan | None = None) -> None:
    """Start the skinny kernel with ``plan`` (a benchmark's) or :func:`skinny_plan`'s launch shape. Checks nothing."""
    import cupy

    (T, I), N = x.shape, weight.shape[0]
    if plan is None:
        plan = skinny_plan(T, N, I, x.itemsize, multiprocessors(cupy.cuda.runtime.getDevice()))
    macros = {"DTYPE": dtype_of(x).ctype, "OUT": dtype_of(out).ctype, "ROWS": plan.rows, "TILES": plan.tiles}
    args = (x, weight, NULL if bias is None else bias, out, np.int32(T), np.int32(N), np.int32(I))
    launch(get(SKINNY, "skinny", **macros), (plan.blocks,), (32 * plan.warps,), args, shared=plan.shared)


def _library_launch(route: str, a: Array, b: Array, out: Array, bias: Array | None, config: GemmConfig, **how) -> None:
    """A product by the library of ``route``. A bias that it cannot add itself is what out starts from (beta = 1)."""
    how["compute"] = config.compute
    if route != "cupy":
        how |= {"algorithm": config.algorithm, "workspace_bytes": config.workspace_bytes}
    if route == "lt" and bias is not None and bias.dtype == out.dtype:
        how["bias"] = bias
    elif bias is not None:
        kernel = get(BIAS, "fill_bias", DTYPE=dtype_of(bias).ctype, OUT=dtype_of(out).ctype)
        rows, columns = out.shape
        launch(kernel, (rows, cdiv(columns, 256)), (256,), (bias, out, np.int32(columns)))
        how["beta"] = 1.0
    {"lt": cublaslt.matmul, "cublas": cublas.gemm, "cupy": cublas.gemm_cupy}[route](a, b, out, **how)


def _linear_launch(x, weight, out, bias=None, arena=None, config=None):
    config = config or DEFAULT
    if out.size == 0:
        return
    aligned = x.data.ptr % 16 == 0 and weight.data.ptr % 16 == 0
    route = config.route
    if route == "auto":
        ours = aligned and config.compute == "float32"
        route = choose_route(x.shape[0], *weight.shape, x.dtype) if ours else "cublas"
    if route != "skinny":
        _library_launch(route, x, weight, out, bias, config, transpose_b=True)
        return
    if not aligned or x.shape[1] * x.itemsize % 16 or x.shape[0] > SKINNY_ROWS[x.itemsize]:
        limit = f"at most {SKINNY_ROWS[x.itemsize]} rows whose length and address are multiples of 16 bytes"
        raise ContractError(f"linear: route=skinny needs {limit}; x has shape {x.shape}")
    launch_skinny(x, weight, bias, out)


def _gemm_launch(a, b, out, transpose_a=False, transpose_b=False, alpha=1.0, beta=0.0, config=None):
    config = config or DEFAULT
    _check_shapes(a, b, out, transpose_a, transpose_b)
    if config.route == "skinny":
        raise invalid("route", "skinny", "auto, lt, cublas, cupy (gemm); skinny is a route of linear")
    if out.size == 0:
        return
    width = 16 // a.itemsize
    aligned = all(n % width == 0 for n in (*a.shape, *b.shape))
    route = ("lt" if aligned else "cublas") if config.route == "auto" else config.route
    how = {"transpose_a": transpose_a, "transpose_b": transpose_b, "alpha": alpha, "beta": beta}
    _library_launch(route, a, b, out, None, config, **how)


# --- contracts ------------------------------------------------------------------------------------------------------
_TOLERANCE = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1e-2}
_SHAPES = (
    *((t, 48, 64) for t in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 100, 256)),
    *((t, n, i) for t in (1, 7, 13, 40) for n, i in ((1, 8), (33, 40), (257, 328))),
    *((t, n, i) for t in (1, 6, 16) for n, i in ((2048, 1024), (512, 3072), (4096, 256))),
    (0, 16, 16),
)


def _sample_linear(rng, dtype, T, N, I, bias=False, wide_out=False):
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    out = np.full((T, N), np.nan, np.float32 if wide_out else dtype)
    return {"x": draw(T, I), "weight": draw(N, I), "bias": draw(N) if bias else None, "out": out}


def _sample_gemm(rng, dtype, T, N, I, transpose_a=False, transpose_b=False, alpha=1.0, beta=0.0):
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    out = draw(T, N) if beta else np.full((T, N), np.nan, dtype)
    a, b = draw(*((I, T) if transpose_a else (T, I))), draw(*((N, I) if transpose_b else (I, N)))
    how = {"transpose_a": transpose_a, "transpose_b": transpose_b, "alpha": alpha, "beta": beta}
    return {"a": a, "b": b, "out": out, **how}


LINEAR = Op(
    name="linear",
    formula="out = x @ weight.T + bias",
    args=(Arg("x", "T I"), Arg("weight", "N I"), Arg("bias", "N", optional=True), Arg("out", "T N", "anyfloat", "out")),
    scalars={"config": "GemmConfig: route, types, compute type, workspace, algorithm"},
    reference=_linear_reference,
    launch=_linear_launch,
    sample=_sample_linear,
    sizes=(
        *({"T": t, "N": n, "I": i} for t, n, i in _SHAPES),
        *({"T": t, "N": n, "I": 96, "bias": True} for t in (1, 12, 50) for n in (31, 64)),
        *({"T": t, "N": 72, "I": 128, "bias": b, "wide_out": True} for t in (3, 16, 40) for b in (False, True)),
    ),
    cost=lambda x, weight, out, **_: (x.nbytes + weight.nbytes + out.nbytes, 2 * x.size * weight.shape[0]),
    tolerance=_TOLERANCE,
)

GEMM = Op(
    name="gemm",
    formula="out = alpha * op(a) @ op(b) + beta * out",
    args=(Arg("a", "..."), Arg("b", "..."), Arg("out", "T N", "anyfloat", "inout")),
    scalars={"transpose_a": "op(a) is a.T", "transpose_b": "op(b) is b.T", "alpha": "", "beta": "0: out is not read"},
    reference=_gemm_reference,
    launch=_gemm_launch,
    sample=_sample_gemm,
    sizes=(
        *({"T": 24, "N": 40, "I": 56, "transpose_a": bool(t & 1), "transpose_b": t > 1} for t in range(4)),
        {"T": 5, "N": 7, "I": 3, "transpose_a": True},
        {"T": 64, "N": 128, "I": 96, "alpha": 0.5, "beta": 2.0},
        {"T": 0, "N": 8, "I": 8},
    ),
    cost=lambda a, b, out, beta=0.0, **_: (a.nbytes + b.nbytes + out.nbytes * (2 if beta else 1), _flops(a, out)),
    tolerance=_TOLERANCE,
)


def _flops(a: Array, out: Array) -> int:
    """2 * T * N * I: a holds T * I values, out T * N."""
    return 2 * a.size * out.shape[1]


# --- public functions -----------------------------------------------------------------------------------------------
def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    out: Array,
    arena: Any = None,
    config: GemmConfig | None = None,
) -> Array:
    """``out = x @ weight.T + bias``: x [T, I], weight [N, I] as a Hugging Face Linear stores it, bias [N], out [T, N].

    x, weight and bias share a dtype; out has it too, or is float32 (logits of a 16-bit model). Sums are float32. The
    routes of ``config`` are a GPU's; NumPy computes on the CPU. ``arena`` is accepted like in every op; no scratch
    memory is needed. Raises ContractError for other shapes or dtypes, DeviceError when the library fails.
    """
    if out.dtype != x.dtype and out.dtype != np.float32:
        raise ContractError(f"linear: out has dtype {out.dtype}; allowed: {x.dtype}, float32")
    if config is not None:
        config.check_arrays(x, out)
        flips = (config.transpose_a, config.transpose_b)
        if flips[0] or flips[1] is False:
            raise invalid("transpose_a, transpose_b", flips, "False and True (or None): linear multiplies by weight.T")
    LINEAR(x=x, weight=weight, bias=bias, out=out, arena=arena, config=config)
    return out


def gemm(
    a: Array,
    b: Array,
    *,
    transpose_a: bool | None = None,
    transpose_b: bool | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Array,
    config: GemmConfig | None = None,
) -> Array:
    """``out = alpha * op(a) @ op(b) + beta * out``; op transposes or not, out [T, N] is float32 or of a's dtype.

    a is [T, I], or [I, T] with ``transpose_a``; b is [I, N], or [N, I] with ``transpose_b``; dense, one dtype. A
    transpose not given here is the configuration's, else False. With beta = 0 out is not read. Sums are float32.
    Raises ContractError, ConfigError, DeviceError.
    """
    if out.dtype != a.dtype and out.dtype != np.float32:
        raise ContractError(f"gemm: out has dtype {out.dtype}; allowed: {a.dtype}, float32")
    config = config or DEFAULT
    config.check_arrays(a, out)
    flip_a = bool(config.transpose_a if transpose_a is None else transpose_a)
    flip_b = bool(config.transpose_b if transpose_b is None else transpose_b)
    GEMM(a=a, b=b, out=out, transpose_a=flip_a, transpose_b=flip_b, alpha=alpha, beta=beta, config=config)
    return out
