"""How many threads NumPy's BLAS uses on the CPU.

BLAS splits even small products over all cores and lets its threads spin while they wait. For the products of a small
model that costs more than it gives, and when another process wants a core, several times more. So small steps run on
one thread; large products keep them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_MANY_FLOPS = 1e9  # of one product: some milliseconds on one core, longer than a thread waits for a core that is taken
_MANY_VALUES = 4 << 20  # of a weight: beyond the caches, where two cores read memory faster than one


@cache
def _libraries() -> tuple[Any, ...]:
    from threadpoolctl import ThreadpoolController

    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


def wants_all_threads(tokens: int, weight_values: int) -> bool:
    """Whether a step over ``tokens`` rows of a model whose largest layer weight has so many values gains from them."""
    return weight_values >= _MANY_VALUES or 2 * tokens * weight_values >= _MANY_FLOPS


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` BLAS threads, then restore what was."""
    libraries = _libraries()
    before = [library.get_num_threads() for library in libraries]
    for library in libraries:
        library.set_num_threads(count)
    try:
        yield
    finally:
        for library, threads in zip(libraries, before, strict=True):
            library.set_num_threads(threads)
