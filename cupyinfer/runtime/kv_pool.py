"""Memory of the KV pages: what both pools share, and the one for the CPU.

The slab holds ``num_pages`` pages. A page has a number and a piece in every layer; layer ``l`` is the array
``kv_caches[l]`` of shape [P, 2, K, S, D] (page, key or value, kv head, token in the page, dim). Pages are handed out by
a :class:`~cupyinfer.runtime.ledger.BlockLedger`. The GPU's pool is :class:`cupyinfer.runtime.kv_pool_cuda.KVBlockPool`
(its class statement needs CuPy).

>>> pool = CpuBlockPool(num_pages=4, layout=PageLayout(num_layers=2, kv_heads=1, block_size=16, head_dim=8))
>>> page = pool.allocate()
>>> pool.kv_caches[0][page].shape
(2, 1, 16, 8)
>>> pool.usage().pages.used
1
>>> pool.release(page)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyinfer.errors import OutOfMemoryError, invalid
from cupyinfer.runtime.device import array_module
from cupyinfer.runtime.ledger import BlockLedger, PageUsage
from cupyinfer.runtime.memory import host_memory
from cupyinfer.types import Array, dtype_of

Moves = Mapping[int, int]
_COPY_BYTES = 64 << 20  # pages moved at once during compaction: bounds the temporary copy


@dataclass(frozen=True)
class PageLayout:
    """What one page holds: keys and values of ``block_size`` tokens, in every layer."""

    num_layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[2, K, S, D] of one page in one layer."""
        return (2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one page in one layer."""
        return 2 * self.kv_heads * self.block_size * self.head_dim * dtype_of(self.dtype).itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.num_layers * self.layer_bytes


@dataclass(frozen=True)
class PoolUsage:
    """Pages by state, and bytes: of one page (all layers), of the slab, and handed out from elsewhere by ``malloc``."""

    pages: PageUsage
    page_bytes: int
    slab_bytes: int
    other_bytes: int

    @property
    def used_fraction(self) -> float:
        return self.pages.used / self.pages.total


class PagePool:
    """Pages on a slab of one array per layer; subclasses say where memory comes from. Not thread-safe."""

    ledger: BlockLedger
    layout: PageLayout
    kv_caches: list[Array]

    def _reserve(self, num_pages: int, layout: PageLayout) -> None:
        self.layout = layout
        self.ledger = BlockLedger(num_pages)
        self._pinned: dict[int, None] = {}  # pages handed out by address: they cannot move
        self.kv_caches = [self._segment(num_pages) for _ in range(layout.num_layers)]

    def _segment(self, num_pages: int) -> Array:
        """A zeroed array [num_pages, 2, K, S, D]; zeroed so that masked reads of unwritten tokens are finite."""
        raise NotImplementedError

    def _release_idle(self) -> None:
        """Give memory that nothing uses back to the system."""

    # --- pages ------------------------------------------------------------------------------------------------------
    @property
    def num_pages(self) -> int:
        return self.ledger.num_pages

    def allocate(self) -> int:
        """The number of a page that is now used once. Raises OutOfMemoryError when none is left."""
        return self.ledger.allocate()

    def share(self, page: int) -> None:
        """One more holder of the page."""
        self.ledger.share(page)

    def release(self, page: int) -> None:
        """One holder less; the page is free, or cached, after the last."""
        self.ledger.release(page)

    def usage(self) -> PoolUsage:
        slab = self.num_pages * self.layout.page_bytes
        return PoolUsage(self.ledger.usage(), self.layout.page_bytes, slab, self._other_bytes())

    def _other_bytes(self) -> int:
        return 0

    def _pin_page(self, owner: Any) -> int:
        """Allocate a page that stays where it is until ``owner`` is garbage."""
        page = self.ledger.allocate()
        self._pinned[page] = None
        weakref.finalize(owner, self._unpin, page)
        return page

    def _unpin(self, page: int) -> None:
        del self._pinned[page]
        self.ledger.release(page)

    @property
    def pinned_pages(self) -> Collection[int]:
        """Pages handed out by ``malloc``."""
        return self._pinned.keys()

    # --- compaction -------------------------------------------------------------------------------------------------
    def compact(self, apply: Callable[[Moves], None]) -> Moves:
        """Move used and cached pages to the lowest numbers.

        Returns ``{old: new}`` and calls ``apply`` with it, which must renumber every block table that it knows.
        The copies are issued on the current stream. Pages from ``malloc`` stay.
        """
        moves = self.ledger.plan_compaction(self._pinned)
        if moves:
            xp = array_module(self.kv_caches[0])
            self._copy_pages(xp.asarray(list(moves.keys())), xp.asarray(list(moves.values())))
        self.ledger.apply_moves(moves)
        apply(moves)
        return moves

    def _copy_pages(self, old: Array, new: Array) -> None:
        """Copy pages ``old`` [n] to ``new`` [n], disjoint, in every layer."""
        step = max(1, _COPY_BYTES // self.layout.layer_bytes)
        for cache in self.kv_caches:
            words = cache.reshape(len(cache), -1).view(np.uint32)  # whatever the dtype, pages move as plain words
            for start in range(0, len(old), step):
                words[new[start : start + step]] = words[old[start : start + step]]

    def shrink(self, num_pages: int) -> int:
        """Keep only the first ``num_pages`` pages; returns the bytes given back.

        The pages above must be free (:meth:`compact` first, ``ledger.drop_cached()`` to give up cached ones); raises
        ConfigError otherwise. The arrays of ``kv_caches`` are replaced: captured CUDA graphs must be captured again.
        """
        before = sum(cache.nbytes for cache in self.kv_caches)
        if num_pages > self.num_pages:
            raise invalid("num_pages", num_pages, f"at most {self.num_pages}: a pool only shrinks")
        if self._pinned:
            raise invalid("num_pages", num_pages, "shrinking only while no page is held through malloc()")
        self.ledger.resize(num_pages)
        for layer, cache in enumerate(self.kv_caches):  # layer by layer: room for one layer's copy suffices
            smaller = self._segment(num_pages)
            smaller[...] = cache[:num_pages]
            self.kv_caches[layer] = smaller
            del cache
            self._release_idle()
        return before - sum(cache.nbytes for cache in self.kv_caches)


class CpuBlockPool(PagePool):
    """KV pages in host memory, as NumPy arrays. The system commits memory only when a page is first written."""

    def __init__(self, num_pages: int, layout: PageLayout) -> None:
        """Reserve ``num_pages`` pages. Raises OutOfMemoryError when they exceed the machine's memory."""
        try:
            if num_pages * layout.page_bytes > host_memory():  # said before tables of so many pages are made
                raise MemoryError
            self._reserve(num_pages, layout)
        except MemoryError:
            raise OutOfMemoryError(
                f"{num_pages} KV pages need {num_pages * layout.page_bytes / 2**30:.2f} GiB of host memory, which this "
                "machine does not have; lower num_gpu_blocks_override or max_model_len"
            ) from None

    def _segment(self, num_pages: int) -> np.ndarray:
        return np.zeros((num_pages, *self.layout.shape), dtype_of(self.layout.dtype).numpy)

    def malloc(self, size: int) -> np.ndarray:
        """``size`` bytes as a uint8 array.

        Exactly ``layout.layer_bytes`` take a page while one is available: the array is the page's piece in layer 0, and
        the page is released with the array. Any other size is ordinary memory.
        """
        if size != self.layout.layer_bytes or not self.ledger.available:
            return np.empty(size, np.uint8)
        owner = _PageBuffer()
        page = self._pin_page(owner)
        owner.fill(self.kv_caches[0][page])
        return np.asarray(owner)


class _PageBuffer:
    """Keeps a page taken while an array made from it lives (NumPy holds the object that gave the memory)."""

    def fill(self, piece: np.ndarray) -> None:
        self._piece = piece
        self.__array_interface__ = piece.view(np.uint8).reshape(-1).__array_interface__
