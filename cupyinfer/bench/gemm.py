"""Time the routes of ``linear`` on real layer shapes: ``python -m cupyinfer.bench.gemm --help``.

Each product runs in a CUDA graph that goes through enough copies of the weight that none is served from the L2 cache,
as in a decode step, where every layer's weights are read once. Times are per product, medians over replays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cupyinfer.errors import CupyinferError, invalid
from cupyinfer.ops.gemm import LINEAR, launch_skinny, linear
from cupyinfer.runtime import cublas, cublaslt
from cupyinfer.runtime.device import choose_device
from cupyinfer.runtime.gemm_plan import SKINNY_ROWS, GemmConfig, SkinnyPlan, ring_bytes, skinny_plan
from cupyinfer.runtime.graph import capture
from cupyinfer.runtime.kernels import cdiv
from cupyinfer.runtime.timing import time_gpu
from cupyinfer.types import Array, dtype_of

SHAPES = {  # (N, I) of every weight of a layer, then the head
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "qwen3-0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
    "qwen3-14b": ((7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408), (151936, 5120)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUTES = ("skinny", "lt", "cublas")


@dataclass(frozen=True)
class Row:
    """One measurement: out[T, N] = x[T, I] @ w[N, I]^T by a route, with what it moved and did each second."""

    T: int
    N: int
    I: int
    route: str
    us: float
    tb_per_s: float
    tflop_per_s: float


class Problem:
    """Arrays of one shape: x, out, and copies of the weight that together are three times the L2 cache."""

    def __init__(self, T: int, N: int, I: int, dtype: str) -> None:
        import cupy

        kind = dtype_of(dtype)
        rng = cupy.random.default_rng(0)
        draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32).astype(kind.numpy)
        l2_bytes = cupy.cuda.Device().attributes["L2CacheSize"]
        self.x, self.out, weight = draw(T, I), cupy.empty((T, N), kind.numpy), draw(N, I)
        self.weights = [weight] + [weight.copy() for _ in range(cdiv(3 * l2_bytes, weight.nbytes))]
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.cost = LINEAR.cost(x=self.x, weight=weight, out=self.out) if LINEAR.cost else (0, 0)
        cupy.cuda.Device().synchronize()

    def seconds(self, run: Callable[[Array], Any], repeats: int = 15) -> float:
        """Median seconds of one ``run(weight)``, from replays of a graph that goes through all weights."""
        calls = [self.weights[i % len(self.weights)] for i in range(max(12, len(self.weights)))]
        with self.stream:
            run(self.weights[0])  # compile, load, allocate
            self.stream.synchronize()
            with capture(self.stream) as graph:
                for weight in calls:
                    run(weight)
            return time_gpu(graph.launch, repeats=repeats, cold=False).median / len(calls)

    def row(self, route: str, seconds: float) -> Row:
        (T, I), N = self.x.shape, self.out.shape[1]
        moved, flops = self.cost
        return Row(T, N, I, route, seconds * 1e6, moved / seconds / 1e12, flops / seconds / 1e12)

    def route(self, route: str) -> Row:
        config = GemmConfig(route=route)
        return self.row(route, self.seconds(lambda w: linear(self.x, w, out=self.out, config=config)))

    def _skinny(self, plan: SkinnyPlan, weight: Array) -> None:
        launch_skinny(self.x, weight, None, self.out, plan)

    def sweep(self) -> Iterator[Row]:
        """The skinny kernel with every launch shape; the one that is used is marked."""
        import cupy

        (T, I), N = self.x.shape, self.out.shape[1]
        itemsize = self.x.itemsize
        used = skinny_plan(T, N, I, itemsize, cupy.cuda.Device().attributes["MultiProcessorCount"])
        for tiles in (1, 2, 4) if itemsize == 2 else (1, 2):
            for warps in (2, 4, 6, 8, 10, 12, 16):
                shared = warps * ring_bytes(tiles)
                if shared > 99 * 1024 or (warps - 1) * 512 >= I * itemsize:
                    continue
                plan = SkinnyPlan(used.rows, tiles, warps, cdiv(N, 8 * tiles), shared)
                seconds = self.seconds(partial(self._skinny, plan))
                mark = " <-" if (tiles, warps) == (used.tiles, used.warps) else ""
                yield self.row(f"skinny tiles={tiles} warps={warps}{mark}", seconds)

    def tune(self) -> Iterator[Row]:
        """Time cuBLASLt's proposals and store the fastest for ``linear`` to use."""
        at = cublas.layout(self.x, self.weights[0], False, True)
        kind = dtype_of(self.x).name
        arrays = (self.x, self.out, *self.weights)
        alignment = min(cublaslt.alignment_of(a.data.ptr) for a in arrays)
        problem = cublaslt.Problem(at, kind, kind, "float32", False, alignment, cublas.WORKSPACE_BYTES)

        def seconds(i: int) -> float:
            config = GemmConfig(route="lt", algorithm=i)
            return self.seconds(lambda w: linear(self.x, w, out=self.out, config=config))

        best, times = cublaslt.tune(seconds, problem)
        for i, value in enumerate(times):
            yield self.row(f"lt proposal {i}{' (stored)' if i == best else ''}", value)


def measure(shapes: list[tuple[int, int, int]], dtype: str, routes: list[str], mode: str = "routes") -> Iterator[Row]:
    """Time every (T, N, I). ``mode``: routes, sweep (launch shapes of skinny) or tune (cuBLASLt)."""
    for T, N, I in shapes:
        few = SKINNY_ROWS[dtype_of(dtype).itemsize] >= T
        if mode == "tune" and few or mode == "sweep" and not few:
            continue
        problem = Problem(T, N, I, dtype)
        if mode == "routes":
            yield from (problem.route(route) for route in routes if few or route != "skinny")
        else:
            yield from problem.sweep() if mode == "sweep" else problem.tune()


def print_rows(rows: list[Row], title: str) -> None:
    table = Table("T", "N", "I", "route", "us", "TB/s", "TFLOP/s", title=title)
    before = None
    for row in rows:
        if before not in (None, (row.T, row.N, row.I)):
            table.add_section()
        before = (row.T, row.N, row.I)
        numbers = (f"{row.us:.2f}", f"{row.tb_per_s:.2f}", f"{row.tflop_per_s:.1f}")
        table.add_row(str(row.T), str(row.N), str(row.I), row.route, *numbers)
    Console(width=110).print(table)


def _list(text: str, allowed: tuple[Any, ...], name: str) -> list[Any]:
    """A comma-separated list; every entry must be one of ``allowed``."""
    kind = type(allowed[0])
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or (kind is str and not set(values) <= set(allowed)) or (kind is int and min(values) < 1):
        raise invalid(name, text, f"a list like {','.join(str(a) for a in allowed)}")
    return values


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cupyinfer.bench.gemm", description=__doc__)
    parser.add_argument("--models", default="llama-8b,qwen3-0.6b", help=f"shapes of: {', '.join(SHAPES)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="values of T")
    parser.add_argument("--routes", default=",".join(ROUTES), help="of skinny, lt, cublas")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--mode", default="routes", choices=("routes", "sweep", "tune"))
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    options = parser.parse_args(arguments)
    try:
        models = _list(options.models, tuple(SHAPES), "models")
        values, routes = _list(options.rows, ROWS, "rows"), _list(options.routes, ROUTES, "routes")
        device = choose_device("cuda")
        shapes = [(t, *shape) for model in models for shape in SHAPES[model] for t in values]
        rows = []
        for row in measure(shapes, options.dtype, routes, options.mode):
            rows.append(row)
            if options.json:
                print(json.dumps(asdict(row)), flush=True)
    except CupyinferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.json:
        print_rows(rows, f"linear, {options.dtype}, {device.name}, weights not in L2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
