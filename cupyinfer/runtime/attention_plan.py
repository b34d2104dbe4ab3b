"""How paged decode attention is launched: its grid, tile, ring buffers and shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from cupyinfer.errors import ContractError
from cupyinfer.runtime.device import multiprocessors

MAX_ROWS = 16  # query heads that a decode block serves at once, as in common/paged_work.cuh
_COMBINE_ROWS = 5  # rows whose sums the warps of a block exchange at once, as in paged_decode.cu
_RESERVED_SHARED = 4096  # per block: what CUDA keeps for itself, and the kernels' static shared memory


@cache
def device_limits(index: int) -> tuple[int, int]:
    """(number of SMs, bytes of shared memory per SM) of a GPU."""
    import cupy

    return multiprocessors(index), cupy.cuda.Device(index).attributes["MaxSharedMemoryPerMultiprocessor"]


@dataclass(frozen=True)
class DecodePlan:
    """How paged decode runs: blocks in the grid, threads of one, positions of a block's tile, ring buffers of a warp
    (16 bit), shared bytes of a block."""

    workers: int
    threads: int
    tile: int
    stages: int
    shared: int


@cache
def decode_plan(D: int, itemsize: int, G: int, B: int, sms: int, shared_per_sm: int) -> DecodePlan:
    """The grid and shared memory of paged decode; the sizes mirror the constants of the .cu files.

    Two blocks per SM where they fit with at least two buffers each, and as many buffers (up to 4) as then fit.
    Raises ContractError when not even one block fits.
    """
    prefix = 4 * (B + 1)
    choices: tuple[int, ...] = (4, 3, 2)
    if itemsize == 2:
        warps = 2 if D > 160 else 4
        tile = 16 * warps
        ring, fixed = 4 * tile * D, warps * min(G, _COMBINE_ROWS) * (D + 8) * 4 + prefix
    else:
        warps, tile, choices = 4, 16 if D > 128 else 32, (2,)
        ring, fixed = 2 * tile * (D + 4) * 4, min(G, MAX_ROWS) * D * 4 + prefix
    for blocks in (2, 1):
        for stages in choices:
            shared = stages * ring + fixed
            if blocks * (shared + _RESERVED_SHARED) <= shared_per_sm:
                return DecodePlan(blocks * sms, 32 * warps, tile, stages, shared)
    raise ContractError(f"paged_decode: B={B} sequences do not fit the {shared_per_sm} bytes of shared memory of an SM")
