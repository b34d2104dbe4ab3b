"""``KVBlockPool``: a ``cupy.cuda.MemoryPool`` whose slab holds the KV pages. Importing this module needs CuPy.

>>> pool = KVBlockPool(num_pages=1000, layout=PageLayout(32, 8, 16, 128, "bfloat16"))   # doctest: +SKIP
>>> page = pool.allocate()                                                              # doctest: +SKIP
>>> scratch = pool.malloc(1 << 20)     # any other size: the ordinary pool              # doctest: +SKIP
"""

from __future__ import annotations

import cupy
from cupy.cuda import memory

from cupyinfer.errors import OutOfMemoryError
from cupyinfer.runtime.kv_pool import PageLayout, PagePool
from cupyinfer.types import dtype_of


class _PageOwner:
    """Lives as long as memory handed out on a page; the page is released with it."""


class KVBlockPool(PagePool, cupy.cuda.MemoryPool):
    """KV pages on one slab of device memory, and an ordinary memory pool for everything else.

    The slab is one allocation per layer, taken from the device when the pool is made and held until it is shrunk or
    dropped. Work on pages is ordered by the stream: a page may be released while a kernel that reads it is queued, as
    long as the next user's kernels are queued behind it on the same stream.
    """

    def __init__(self, num_pages: int, layout: PageLayout) -> None:
        """Reserve the slab on the current device. Raises OutOfMemoryError naming what was needed and is available."""
        cupy.cuda.MemoryPool.__init__(self)
        free = cupy.cuda.runtime.memGetInfo()[0]
        try:
            if num_pages * layout.page_bytes > free:  # said at once, before tables of so many pages are made
                raise OutOfMemoryError
            self._reserve(num_pages, layout)
        except OutOfMemoryError:
            raise OutOfMemoryError(
                f"{num_pages} KV pages need {num_pages * layout.page_bytes / 2**30:.2f} GiB of device memory, but "
                f"{free / 2**30:.2f} GiB are available; lower gpu_memory_utilization, num_gpu_blocks_override or "
                "max_model_len"
            ) from None

    def _segment(self, num_pages: int) -> cupy.ndarray:
        size = num_pages * self.layout.layer_bytes
        try:
            pointer = cupy.cuda.MemoryPool.malloc(self, size)
        except memory.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{size} bytes for one layer of {num_pages} KV pages: {error}") from None
        pointer.memset_async(0, size, cupy.cuda.get_current_stream())
        shape = (num_pages, *self.layout.shape)
        return cupy.ndarray(shape, dtype=dtype_of(self.layout.dtype).numpy, memptr=pointer)

    def _release_idle(self) -> None:
        cupy.cuda.get_current_stream().synchronize()  # a layer's copy may still read the old segment
        self.free_all_blocks()

    def malloc(self, size: int) -> memory.MemoryPointer:
        """``size`` bytes of device memory.

        Exactly ``layout.layer_bytes`` take a page while one is available: the pointer is the page's piece in layer 0
        (layer l is ``kv_caches[l][page]``), and the page is released when the last pointer to it is gone. Any other
        size comes from the ordinary pool.
        """
        if size != self.layout.layer_bytes or not self.ledger.available:
            return cupy.cuda.MemoryPool.malloc(self, size)
        owner = _PageOwner()
        piece = self.kv_caches[0][self._pin_page(owner)]
        owner.piece = piece  # type: ignore[attr-defined]
        return memory.MemoryPointer(memory.UnownedMemory(piece.data.ptr, size, owner), 0)

    def _other_bytes(self) -> int:
        slab = sum(cache.data.mem.size for cache in self.kv_caches)
        return self.used_bytes() - slab
