"""cuBLASLt: matrix products whose algorithm is chosen, cached and tuned, with the bias added inside.

cuBLASLt is loaded together with cuBLAS, so its C interface is called directly (a dozen functions on opaque handles, the
same since CUDA 11): nothing has to be installed for it, and it is always the version that CuPy uses. It has no stream
state and CuPy no guard on it, so graphs capture it.

For each problem the library's heuristics propose algorithms, best guess first. :func:`tune` times them with the weights
out of the L2 cache and keeps the fastest in a JSON file under CUPYINFER_CACHE_DIR, one entry for each (bucket of T, N,
I, types); :func:`matmul` uses that entry when there is one and the first proposal otherwise.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from cupyinfer import env
from cupyinfer.errors import ConfigError, DeviceError
from cupyinfer.runtime.cublas import COMPUTE, WORKSPACE_BYTES, Layout, check, layout, loaded_library, workspace
from cupyinfer.types import Array, dtype_of

PROPOSALS = 8  # algorithms asked of the heuristics
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
_MAX_WORKSPACE, _REDUCTIONS = 1, 3  # cublasLtMatmulPreferenceAttributes_t
_ALIGNMENTS = (5, 6, 7, 8)  # CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{A,B,C,D}_BYTES
_EPILOGUE_BIAS = 4
_FLOAT32_REDUCTION = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: split sums are added in float32, in a fixed order
_CUDA_R_32F = 0

_P, _I, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES = {
    "cublasLtMatmulDescCreate": (_P, _I, _I),
    "cublasLtMatmulDescSetAttribute": (_P, _I, _P, _SIZE),
    "cublasLtMatmulDescDestroy": (_P,),
    "cublasLtMatrixLayoutCreate": (_P, _I, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatrixLayoutDestroy": (_P,),
    "cublasLtMatmulPreferenceCreate": (_P,),
    "cublasLtMatmulPreferenceSetAttribute": (_P, _I, _P, _SIZE),
    "cublasLtMatmulPreferenceDestroy": (_P,),
    "cublasLtMatmulAlgoGetHeuristic": (_P, _P, _P, _P, _P, _P, _P, _I, _P, _P),
    "cublasLtMatmulAlgoCheck": (_P, _P, _P, _P, _P, _P, _P, _P),
    "cublasLtMatmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _SIZE, _P),
}


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t. ``algo`` is cublasLtMatmulAlgo_t, 64 opaque bytes that may be stored."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def _function(name: str) -> Any:
    function = getattr(loaded_library("cublasLt"), name)
    function.argtypes, function.restype = _SIGNATURES[name], ctypes.c_int
    return function


def _call(name: str, *args: Any) -> None:
    check(_function(name)(*args), name)


@dataclass(frozen=True)
class Problem:
    """All that an algorithm depends on. ``alignment``: what every address is a multiple of, in bytes."""

    at: Layout
    dtype: str
    out_dtype: str
    compute: str
    bias: bool
    alignment: int
    workspace_bytes: int

    def key(self) -> str:
        """Under which a tuned algorithm is stored: T rounded up to its bucket, N, I, types, transposes, bias."""
        at = self.at
        shape = f"T{bucket(at.columns)}-N{at.rows}-I{at.inner}-{'NT'[at.op_second]}{'NT'[at.op_first]}"
        return f"{shape}-{self.dtype}-{self.out_dtype}-{self.compute}{'-bias' if self.bias else ''}"


def bucket(rows: int) -> int:
    """Row counts that share a tuned algorithm: up to 16, steps of 32 to 256, of 64 to 512, then powers of two."""
    if rows <= 16:
        return 16
    for step, last in ((32, 256), (64, 512)):
        if rows <= last:
            return -(-rows // step) * step
    return 1 << (rows - 1).bit_length()


class Plan:
    """Descriptors of one problem on one device. Host memory only; freed with the object."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        at, code, out_code = problem.at, dtype_of(problem.dtype).cuda_code, dtype_of(problem.out_dtype).cuda_code
        self._free: list[tuple[str, ctypes.c_void_p]] = []
        self.desc = self._make("MatmulDesc", COMPUTE[problem.compute], _CUDA_R_32F)
        self.set(_TRANSA, ctypes.c_int32(at.op_first))
        self.set(_TRANSB, ctypes.c_int32(at.op_second))
        if problem.bias:
            self.set(_EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS))
            self.set(_BIAS_POINTER, _P(problem.alignment))  # the heuristics look at its alignment only
        shape_first = (at.inner, at.rows) if at.op_first else (at.rows, at.inner)
        shape_second = (at.columns, at.inner) if at.op_second else (at.inner, at.columns)
        self.first = self._make("MatrixLayout", code, *shape_first, at.ld_first)
        self.second = self._make("MatrixLayout", code, *shape_second, at.ld_second)
        self.out = self._make("MatrixLayout", out_code, at.rows, at.columns, at.ld_out)
        self.layouts = (self.first, self.second, self.out, self.out)

    def _make(self, kind: str, *args: Any) -> ctypes.c_void_p:
        handle = _P()
        _call(f"cublasLt{kind}Create", ctypes.byref(handle), *args)
        self._free.append((f"cublasLt{kind}Destroy", handle))
        return handle

    def set(self, attribute: int, value: Any) -> None:
        _call("cublasLtMatmulDescSetAttribute", self.desc, attribute, ctypes.byref(value), ctypes.sizeof(value))

    def __del__(self) -> None:
        if _function is None:  # the interpreter is shutting down; the process gives the memory back
            return
        for destroy, handle in getattr(self, "_free", ()):
            _function(destroy)(handle)

    def proposals(self, handle: int, count: int = PROPOSALS) -> list[Proposal]:
        """Algorithms for this problem, the library's best guess first. Raises DeviceError when there is none."""
        preference = self._preference()
        try:
            found, results = ctypes.c_int(), (Proposal * count)()
            args = (handle, self.desc, *self.layouts, preference, count, results, ctypes.byref(found))
            _call("cublasLtMatmulAlgoGetHeuristic", *args)
        finally:
            _function("cublasLtMatmulPreferenceDestroy")(preference)
        usable = [r for r in results[: found.value] if r.state == 0]
        if not usable:
            raise DeviceError(f"cuBLASLt has no algorithm for {self.problem.key()}")
        return usable

    def _preference(self) -> ctypes.c_void_p:
        preference = _P()
        _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        values: list[tuple[int, Any]] = [(_MAX_WORKSPACE, ctypes.c_uint64(self.problem.workspace_bytes))]
        values.append((_REDUCTIONS, ctypes.c_uint32(_FLOAT32_REDUCTION)))
        values += [(name, ctypes.c_uint32(self.problem.alignment)) for name in _ALIGNMENTS]
        for name, value in values:
            size = ctypes.sizeof(value)
            _call("cublasLtMatmulPreferenceSetAttribute", preference, name, ctypes.byref(value), size)
        return preference

    def accepts(self, handle: int, algo: Any) -> bool:
        """Whether a stored algorithm can run this very problem within the workspace."""
        result = Proposal()
        args = (handle, self.desc, *self.layouts, ctypes.byref(algo), ctypes.byref(result))
        status = _function("cublasLtMatmulAlgoCheck")(*args)
        return status == 0 and result.state == 0 and result.workspace <= self.problem.workspace_bytes


@lru_cache(maxsize=2048)
def _chosen(device: int, handle: int, problem: Problem, algorithm: int) -> tuple[Plan, Any]:
    """(plan, algorithm) for a problem; ``algorithm`` >= 0 takes that proposal, -1 the tuned or the first one."""
    plan = Plan(problem)
    stored = tuned(str(tuning_file(device))).get(problem.key()) if algorithm < 0 else None
    if stored is not None:
        algo = (ctypes.c_uint64 * 8)(*stored)
        if plan.accepts(handle, algo):
            return plan, algo
    found = plan.proposals(handle)
    if algorithm >= len(found):
        raise DeviceError(f"algorithm={algorithm} was asked for, but cuBLASLt proposes {len(found)} (0 is the first)")
    return plan, found[max(algorithm, 0)].algo


def matmul(
    a: Array,
    b: Array,
    out: Array,
    bias: Array | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    compute: str = "float32",
    algorithm: int = -1,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> None:
    """``out = alpha * op(a) @ op(b) + beta * out + bias`` on CuPy's current stream.

    a and b: dense, two-dimensional, one dtype; out float32 or that dtype; bias [columns of out] in out's dtype. Sums
    are float32. ``algorithm``: -1 the tuned one, else the heuristics' first; n >= 0 their n-th. Raises DeviceError.
    """
    import cupy
    from cupy.cuda import device

    arrays = [x for x in (a, b, out, bias) if x is not None]
    alignment = min(alignment_of(x.data.ptr) for x in arrays)
    at = layout(a, b, transpose_a, transpose_b)
    names = (dtype_of(a).name, dtype_of(out).name)
    problem = Problem(at, *names, compute, bias is not None, alignment, workspace_bytes)
    handle = device.get_cublas_handle()  # a cuBLAS handle is a cuBLASLt handle
    plan, algo = _chosen(cupy.cuda.runtime.getDevice(), handle, problem, algorithm)
    if bias is not None:
        plan.set(_BIAS_POINTER, _P(bias.data.ptr))
    scale, add = ctypes.byref(ctypes.c_float(alpha)), ctypes.byref(ctypes.c_float(beta))
    # fmt: off
    _call(
        "cublasLtMatmul", handle, plan.desc, scale, b.data.ptr, plan.first, a.data.ptr, plan.second, add,
        out.data.ptr, plan.out, out.data.ptr, plan.out, ctypes.byref(algo),
        workspace(workspace_bytes), workspace_bytes, cupy.cuda.get_current_stream().ptr,
    )
    # fmt: on


def alignment_of(address: int) -> int:
    """The largest power of two up to 256 that divides an address."""
    return min(256, address & -address) if address else 256


# --- tuned algorithms -----------------------------------------------------------------------------------------------
def tuning_file(device: int) -> Path:
    """Where the tuned algorithms of a device are kept: one file for each GPU model and cuBLASLt version."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    get_version = loaded_library("cublasLt").cublasLtGetVersion
    get_version.restype = ctypes.c_size_t
    safe = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return env.CACHE_DIR.get() / f"cublaslt-{safe}-{get_version()}.json"


@lru_cache(maxsize=8)
def tuned(path: str) -> dict[str, list[int]]:
    """The stored algorithms by :meth:`Problem.key`. Raises ConfigError when :func:`store` cannot have written them."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        entries = {key: [int(x) for x in value["algo"]] for key, value in json.loads(text).items()}
        if any(len(algo) != 8 for algo in entries.values()):
            raise ValueError("an algorithm must be 8 integers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the tuning file {path} is damaged ({error}); delete it and tune again") from None
    return entries


def store(path: str, key: str, algo: list[int], microseconds: float) -> None:
    """Add one tuned algorithm to the file, replacing it as a whole so that a reader never sees half of it.

    Raises ConfigError when the file is damaged or its folder cannot be written.
    """
    tuned(path)  # refuses to overwrite a damaged file
    target = Path(path)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        entries = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        entries[key] = {"algo": algo, "us": round(microseconds, 2)}
        temporary.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise ConfigError(f"tuned settings cannot be written to {path} (CUPYINFER_CACHE_DIR): {error}") from None
    tuned.cache_clear()


def tune(run: Callable[[int], float], problem: Problem) -> tuple[int, list[float]]:
    """Time every proposal for ``problem`` and store the fastest.

    ``run(i)`` returns the seconds that a product with proposal i takes, with cold weights (cupyinfer.bench.gemm has
    one). Returns (the index of the fastest, all seconds).
    """
    import cupy
    from cupy.cuda import device

    index, handle = cupy.cuda.runtime.getDevice(), device.get_cublas_handle()
    found = Plan(problem).proposals(handle)
    seconds = [run(i) for i in range(len(found))]
    best = min(range(len(found)), key=seconds.__getitem__)
    store(str(tuning_file(index)), problem.key(), list(found[best].algo), seconds[best] * 1e6)
    _chosen.cache_clear()
    return best, seconds
