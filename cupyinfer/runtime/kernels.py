"""Kernel sources on disk -> compiled, checked, launchable kernels.

A ``.cu`` file under rawkernels/ holds ``extern "C"`` kernels and is specialised by macros (``-DDTYPE=bf16
-DHEAD_DIM=128``), so one source gives one small compiled module per data type and size. :func:`get` turns (source,
entry, macros) into a ``cupy.RawKernel``; :func:`launch` is the only place that starts one, and checks what CuPy does
not.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cupyinfer import env
from cupyinfer.errors import DeviceError
from cupyinfer.runtime.overlap import can_overlap, launch_overlapping

Macros = tuple[tuple[str, str], ...]
NULL = np.uint64(0)  # a null pointer as a kernel argument
CXX = "-std=c++17"
SOURCES: dict[str, KernelSource] = {}
_COMPILERS = 8  # kernels compiled at once
_overlapping = False  # see overlapping()
_collected: dict[Kernel, None] | None = None  # see collecting()
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_SCALARS = (np.int32, np.uint32, np.int64, np.uint64, np.float32)


@dataclass(frozen=True)
class KernelSource:
    """One ``.cu`` file, the kernels in it and the macro values it may be compiled with.

    ``variants`` maps each macro to its allowed values; every combination must compile (a test does so for every
    architecture). ``only`` keeps the combinations for which it returns True.
    A file that includes common/overlap.cuh promises that each of its kernels keeps the rules written there: inside a
    CUDA graph they may start before the kernel before them has ended.
    """

    path: str
    entries: tuple[str, ...]
    variants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    only: Callable[[Mapping[str, Any]], bool] | None = None

    def __post_init__(self) -> None:
        SOURCES[self.path] = self

    @property
    def overlaps(self) -> bool:
        return "common/overlap.cuh" in _INCLUDE.findall(read_source(self.path))

    def combinations(self) -> list[dict[str, Any]]:
        names = list(self.variants)
        every = (dict(zip(names, values, strict=True)) for values in itertools.product(*self.variants.values()))
        return [c for c in every if self.only is None or self.only(c)]


@cache
def source_root() -> Path:
    """The rawkernels/ folder: CUPYINFER_KERNEL_DIR, else inside the installed package, else beside it (a checkout)."""
    chosen = env.KERNEL_DIR.get()
    package = Path(__file__).resolve().parents[1]
    for root in [chosen] if chosen else [package / "rawkernels", package.parent / "rawkernels"]:
        if (root / "common").is_dir():
            return root
    raise DeviceError(f"the CUDA sources (rawkernels/) were not found beside {package}; reinstall cupyinfer")


@cache
def read_source(path: str) -> str:
    return (source_root() / path).read_text(encoding="utf-8")


@cache
def closure_hash(path: str) -> str:
    """Hash of a source and of everything it includes. CuPy's compile cache does not look into included files."""
    seen: dict[str, str] = {}
    todo = [path]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen[name] = read_source(name)
            todo.extend(_INCLUDE.findall(seen[name]))
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(name.encode() + b"\0" + seen[name].encode() + b"\0")
    return digest.hexdigest()[:16]


def compile_options(path: str, macros: Macros) -> tuple[str, ...]:
    defines = tuple(f"-D{name}={value}" for name, value in macros)
    return (CXX, f"-I{source_root()}", *defines, f"-DCUPYINFER_SOURCE_HASH=0x{closure_hash(path)}")


class Kernel:
    """A compiled entry of a source with fixed macros. Call it through :func:`launch`."""

    def __init__(self, source: KernelSource, entry: str, macros: Macros) -> None:
        if entry not in source.entries:
            raise DeviceError(f"{source.path} has no kernel {entry}; it has {', '.join(source.entries)}")
        import cupy

        self.name = f"{source.path}:{entry}" + "".join(f" {k}={v}" for k, v in macros)
        self.raw = cupy.RawKernel(
            read_source(source.path), entry, options=compile_options(source.path, macros), backend="nvrtc"
        )
        self.overlaps = source.overlaps
        self.shared_limit = 32 * 1024  # up to 48 KB need no asking, static shared memory included

    def compile(self) -> None:
        """Compile and load now. Raises DeviceError with the compiler's log."""
        try:
            _ = self.raw.kernel  # CuPy compiles when it is asked for
        except Exception as error:
            raise DeviceError(f"kernel {self.name} does not compile: {error}") from None

    def allow_shared(self, size: int) -> None:
        """Shared memory above 48 KB, static and dynamic together, must be asked for once per kernel."""
        if size > self.shared_limit:
            self.raw.max_dynamic_shared_size_bytes = size
            self.shared_limit = size


@cache
def _kernel(path: str, entry: str, macros: Macros) -> Kernel:
    return Kernel(SOURCES[path], entry, macros)


def get(source: KernelSource, entry: str, **macros: Any) -> Kernel:
    """The kernel ``entry`` of ``source`` with these macro values (compiled at first use, cached on disk by CuPy)."""
    return _kernel(source.path, entry, tuple((k, str(v)) for k, v in macros.items()))


def compile_all(kernels: Collection[Kernel], progress: Callable[[int, int], None] | None = None) -> None:
    """Compile and load many kernels for the current device, several at once: NVRTC runs outside Python's lock.

    Raises DeviceError with the compiler's log.
    """
    if not kernels:
        return
    import cupy

    device = cupy.cuda.Device()

    def one(kernel: Kernel) -> None:
        with device:  # each thread has a current device of its own
            kernel.compile()

    with ThreadPoolExecutor(max_workers=_COMPILERS) as pool:
        for done, _ in enumerate(pool.map(one, kernels), 1):
            if progress:
                progress(done, len(kernels))


@contextmanager
def collecting() -> Iterator[Collection[Kernel]]:
    """Launches inside start nothing; their kernels are in the collection that is yielded, for :func:`compile_all`.

    Library calls (cuBLAS) are not launches: they run, on whatever the arrays hold.
    """
    global _collected
    before, _collected = _collected, {}
    try:
        yield _collected.keys()
    finally:
        _collected = before


def launch(kernel: Kernel, grid: Iterable[int], block: Iterable[int], args: Sequence[Any], *, shared: int = 0) -> None:
    """Start a kernel on CuPy's current stream.

    ``args``: CuPy arrays, NumPy scalars of exact width (np.int32, np.float32, ...) or NULL. CuPy passes whatever it is
    given, so a Python int would reach the kernel as 64 bits: it is refused here. An empty grid launches nothing.
    ``shared``: bytes of dynamic shared memory.
    """
    grid, block = tuple(grid), tuple(block)
    if 0 in grid:
        return
    for position, arg in enumerate(args):
        if not (hasattr(arg, "__cuda_array_interface__") or isinstance(arg, _SCALARS)):
            kind = type(arg).__name__
            raise DeviceError(f"{kernel.name}: argument {position} is {kind}; pass an array or a NumPy scalar")
    threads = block[0] * (block[1] if len(block) > 1 else 1) * (block[2] if len(block) > 2 else 1)
    if not 0 < threads <= 1024 or max(grid[1:], default=1) > 65535:
        raise DeviceError(f"{kernel.name}: grid {grid}, block {block} exceed CUDA's limits")
    if _collected is not None:
        _collected[kernel] = None
        return
    kernel.allow_shared(shared)
    if env_debug() >= 2:
        print(f"launch {kernel.name} grid={grid} block={block} shared={shared}", file=sys.stderr)
    if kernel.overlaps and _overlapping:
        launch_overlapping(kernel.raw.kernel.ptr, grid, block, args, shared)
    else:
        kernel.raw(grid, block, tuple(args), shared_mem=shared)


@contextmanager
def overlapping() -> Iterator[None]:
    """Kernels launched inside may start before the one before them has ended, if they are made for it.

    Used while a graph is captured: such a launch takes longer to issue from Python, which a graph does once.
    """
    global _overlapping
    before, _overlapping = _overlapping, can_overlap()
    try:
        yield
    finally:
        _overlapping = before


@cache
def env_debug() -> int:
    return env.DEBUG.get()


def cdiv(a: int, b: int) -> int:
    """The smallest integer >= a / b."""
    return -(-a // b)
