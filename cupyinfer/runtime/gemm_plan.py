"""How a matrix product is computed: its configuration, the choice of a route, and the skinny kernel's launch shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupyinfer.errors import ContractError, invalid
from cupyinfer.runtime.cublas import COMPUTE, WORKSPACE_BYTES
from cupyinfer.runtime.kernels import cdiv
from cupyinfer.types import FLOAT_NAMES, Array, dtype_of

ROUTES = ("auto", "skinny", "lt", "cublas", "cupy")
SKINNY_ROWS = {2: 16, 4: 8}  # rows that the skinny kernel takes, by the item size of its inputs
_SMALL_WEIGHT = 4 << 20  # values; with 9 to 16 rows the libraries are faster on larger ones
_MOST_SHARED = 96 * 1024  # bytes of a block, so that two fit a multiprocessor
_RING_STAGES = {1: 4, 2: 4, 4: 3}  # by TILES, as skinny_stages in rawkernels/common/skinny.cuh


@dataclass(frozen=True)
class GemmConfig:
    """How a matrix product is computed on a GPU. The defaults leave everything to :func:`choose_route`.

    ``in_dtype``, ``out_dtype``: None takes the arrays'; a name makes other arrays an error. ``transpose_a``,
    ``transpose_b``: None is what the call says (``linear``: False, True). ``compute``: ``float32``, or ``tf32``
    (float32 inputs lose 13 bits of mantissa; not for route skinny). ``workspace_bytes``: scratch memory for the
    library. ``algorithm``: -1 lets the library choose; else cuBLAS's number, or the n-th proposal of cuBLASLt. Raises
    ConfigError.
    """

    route: str = "auto"
    in_dtype: str | None = None
    out_dtype: str | None = None
    transpose_a: bool | None = None
    transpose_b: bool | None = None
    compute: str = "float32"
    workspace_bytes: int = WORKSPACE_BYTES
    algorithm: int = -1

    def __post_init__(self) -> None:
        for name, allowed in (("route", ROUTES), ("compute", tuple(COMPUTE))):
            if getattr(self, name) not in allowed:
                raise invalid(name, getattr(self, name), ", ".join(allowed))
        for name in ("in_dtype", "out_dtype"):
            if getattr(self, name) not in (None, *FLOAT_NAMES):
                raise invalid(name, getattr(self, name), f"None, {', '.join(FLOAT_NAMES)}")
        if self.route == "skinny" and self.compute != "float32":
            raise invalid("compute", self.compute, "float32 with route skinny")
        if self.workspace_bytes < 0:
            raise invalid("workspace_bytes", self.workspace_bytes, "a number of bytes >= 0")
        if self.algorithm < -1 or (self.algorithm >= 0 and self.route not in ("lt", "cublas")):
            raise invalid("algorithm", self.algorithm, "-1, or with route lt or cublas the number of an algorithm")

    def check_arrays(self, first: Array, out: Array) -> None:
        """Raise ContractError when the arrays' dtypes are not what this configuration asks for."""
        for name, array in (("in_dtype", first), ("out_dtype", out)):
            if getattr(self, name) not in (None, str(array.dtype)):
                raise ContractError(f"{name}={getattr(self, name)!r} was asked for, but the array is {array.dtype}")


DEFAULT = GemmConfig()


@dataclass(frozen=True)
class SkinnyPlan:
    """Launch shape of the skinny kernel: its ROWS and TILES, warps in a block, blocks, shared bytes of a block."""

    rows: int
    tiles: int
    warps: int
    blocks: int
    shared: int


def split_warps(row_bytes: int, most: int) -> int:
    """Into how many warps a row of so many bytes is split: the most work at once, idle warps counted out."""
    segments = cdiv(row_bytes, 512)
    return max(range(1, most + 1), key=lambda w: (segments / cdiv(segments, w), -w))


def ring_bytes(tiles: int) -> int:
    """Shared memory of one warp, as skinny_warp_bytes in rawkernels/common/skinny.cuh."""
    return _RING_STAGES[tiles] * 8 * tiles * 128


def skinny_plan(T: int, N: int, I: int, itemsize: int, multiprocessors: int) -> SkinnyPlan:
    """The launch shape for out[T, N] = x[T, I] @ w[N, I]^T.

    A block computes 8 * tiles outputs; more tiles read the activations less often, but there should be one and a half
    blocks for each multiprocessor. The warps of a block share I in segments of 512 bytes; their number depends on N and
    I alone, so that the order of additions, hence every bit of a row's result, does not depend on how many rows there
    are. The bounds were measured on an H200 (``python -m cupyinfer.bench.gemm --mode sweep``).
    """
    blocks = cdiv(N, 8) / multiprocessors
    # few blocks: more warps in each keep more bytes in flight; very many: big ones, whose starts and ends are rarer
    most = 16 if blocks < 2 or blocks >= 8 else 12
    warps = split_warps(I * itemsize, most)
    tiles = 4 if T > 8 else 1 if blocks >= 8 else 2
    while tiles > 1 and cdiv(N, 8 * tiles) < 1.5 * multiprocessors:
        tiles //= 2
    while warps * ring_bytes(tiles) > _MOST_SHARED:
        tiles //= 2
    rows = 8 if T <= 8 else 16
    if itemsize == 4:
        rows, tiles = 1 << (T - 1).bit_length(), min(tiles, 2)
    return SkinnyPlan(rows, tiles, warps, cdiv(N, 8 * tiles), warps * ring_bytes(tiles))


def gated_plan(T: int, F: int, I: int, itemsize: int, multiprocessors: int) -> SkinnyPlan:
    """The launch shape of the skinny kernel for the 2F rows of a gate and an up projection: TILES is even."""
    plan = skinny_plan(T, 2 * F, I, itemsize, multiprocessors)
    tiles, warps = max(2, plan.tiles), split_warps(I * itemsize, 12)
    return SkinnyPlan(plan.rows, tiles, warps, cdiv(F, 4 * tiles), warps * ring_bytes(tiles))


def choose_route(T: int, N: int, I: int, dtype: Any) -> str:
    """The route that ``auto`` takes for out[T, N] = x[T, I] @ w[N, I]^T: skinny, lt or cublas.

    skinny for up to 8 rows, and up to 16 of a small 16-bit weight, when rows are multiples of 16 bytes; above that
    cuBLASLt, or cuBLAS where rows are not aligned to 16 bytes, for which cuBLASLt has few algorithms.
    """
    itemsize = dtype_of(dtype).itemsize
    width = 16 // itemsize
    most = SKINNY_ROWS[itemsize] if N * I <= _SMALL_WEIGHT else 8
    if I % width == 0 and most >= T:
        return "skinny"
    return "lt" if I % width == 0 and N % width == 0 else "cublas"
