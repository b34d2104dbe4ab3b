"""KV pages: the ledger's books, the pool's memory, compaction; the same pool tests on the CPU and on a GPU."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyinfer.errors import ConfigError, OutOfMemoryError
from cupyinfer.runtime.kv_pool import CpuBlockPool, PageLayout
from cupyinfer.runtime.ledger import BlockLedger

LAYOUT = PageLayout(num_layers=3, kv_heads=2, block_size=16, head_dim=8)


# --- ledger ---------------------------------------------------------------------------------------------------------
def test_pages_are_handed_out_lowest_first_and_reused():
    ledger = BlockLedger(3)
    assert [ledger.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OutOfMemoryError, match="all 3 KV pages are in use"):
        ledger.allocate()
    ledger.release(1)
    assert ledger.allocate() == 1
    ledger.check([0, 1, 2])


def test_a_shared_page_is_free_after_its_last_holder():
    ledger = BlockLedger(2)
    page = ledger.allocate()
    ledger.share(page)
    ledger.release(page)
    assert ledger.used == 1 and ledger.references(page) == 1
    ledger.release(page)
    assert ledger.used == 0 and ledger.usage().free == 2
    with pytest.raises(ConfigError, match="page=0"):
        ledger.release(page)
    with pytest.raises(ConfigError, match="page=0"):
        ledger.share(page)


def test_cached_pages_go_last_and_the_oldest_first():
    evicted = []
    ledger = BlockLedger(4, evicted.append)
    pages = [ledger.allocate() for _ in range(4)]
    for page in pages[:3]:
        ledger.keep(page)
    for page in (2, 0, 3, 1):
        ledger.release(page)
    assert ledger.usage().cached == 3 and ledger.available == 4
    ledger.share(2)  # used again: no longer a candidate
    assert [ledger.allocate() for _ in range(3)] == [3, 0, 1]
    assert evicted == [0, 1] and ledger.evictions == 2
    ledger.check([0, 1, 2, 3])
    assert not ledger.is_kept(0) and ledger.is_kept(2)


def test_check_finds_a_wrong_holder():
    ledger = BlockLedger(2)
    ledger.allocate()
    with pytest.raises(AssertionError, match="do not match"):
        ledger.check([])
    ledger.release(0)
    ledger._free.append(0)
    with pytest.raises(AssertionError, match="twice"):
        ledger.check()


def test_high_water_is_the_most_ever_used():
    ledger = BlockLedger(5)
    pages = [ledger.allocate() for _ in range(4)]
    for page in pages:
        ledger.release(page)
    ledger.allocate()
    assert ledger.usage().high_water == 4 and ledger.usage().used == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("asrkcz"), st.integers(0, 1000)), max_size=120))
def test_any_sequence_of_operations_keeps_the_books(operations):
    ledger, held = BlockLedger(7), []
    for name, number in operations:
        page = held[number % len(held)] if held else None
        if name == "a" and ledger.available:
            held.append(ledger.allocate())
        elif name == "s" and held:
            ledger.share(page)
            held.append(page)
        elif name == "r" and held:
            held.remove(page)
            ledger.release(page)
        elif name == "k" and held:
            ledger.keep(page)
        elif name == "c":
            moves = ledger.plan_compaction()
            ledger.apply_moves(moves)
            held = [moves.get(p, p) for p in held]
            live = ledger.num_pages - ledger.usage().free
            assert all(p < live for p in held)
        elif name == "z":
            ledger.drop_cached()
        ledger.check(held)
        assert ledger.usage().used == len(set(held))


# --- pools ----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def make(request):
    if request.param == "cpu":
        return CpuBlockPool
    from cupyinfer.runtime.kv_pool_cuda import KVBlockPool

    return KVBlockPool


def host(array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def mark(pool, page: int, value: int) -> None:
    for layer, cache in enumerate(pool.kv_caches):
        cache[page] = 100 * layer + value


def assert_marked(pool, page: int, value: int) -> None:
    for layer, cache in enumerate(pool.kv_caches):
        assert (host(cache[page]) == 100 * layer + value).all()


def test_layout_and_usage(make):
    pool = make(10, LAYOUT)
    assert [c.shape for c in pool.kv_caches] == [(10, 2, 2, 16, 8)] * 3
    assert all(c.flags.c_contiguous and not host(c).any() for c in pool.kv_caches)
    assert LAYOUT.layer_bytes == 2 * 2 * 16 * 8 * 4 and LAYOUT.page_bytes == 3 * LAYOUT.layer_bytes
    pages = [pool.allocate() for _ in range(4)]
    pool.share(pages[0])
    pool.release(pages[0])
    usage = pool.usage()
    assert (usage.pages.used, usage.pages.free, usage.slab_bytes) == (4, 6, 10 * LAYOUT.page_bytes)
    assert usage.used_fraction == 0.4 and usage.other_bytes == 0


def test_16_bit_pages(make):
    pool = make(2, PageLayout(1, 1, 8, 64, "bfloat16"))
    assert pool.kv_caches[0].itemsize == 2 and pool.layout.layer_bytes == 2 * 8 * 64 * 2


def test_compaction_moves_content_and_tells_the_tables(make):
    pool = make(10, LAYOUT)
    pages = [pool.allocate() for _ in range(8)]
    for page in pages:
        mark(pool, page, page)
    for page in (0, 3, 4):
        pool.release(page)
    pool.ledger.keep(7)
    pool.release(7)  # cached pages move too
    table, told = {page: page for page in (1, 2, 5, 6)}, []
    moves = pool.compact(told.append)
    assert told == [moves] and set(moves) == {5, 6, 7} and set(moves.values()) == {0, 3, 4}
    for page, value in table.items():
        assert_marked(pool, moves.get(page, page), value)
    assert_marked(pool, moves[7], 7)
    pool.ledger.check([moves.get(p, p) for p in table])
    assert pool.compact(told.append) == {}


def test_the_slab_shrinks_after_compaction(make):
    pool = make(10, LAYOUT)
    pages = [pool.allocate() for _ in range(6)]
    for page in pages:
        mark(pool, page, page)
    for page in pages[:4]:
        pool.release(page)
    with pytest.raises(ConfigError, match="num_pages=3 is not allowed; allowed: an integer >= 6"):
        pool.shrink(3)
    with pytest.raises(ConfigError, match="only shrinks"):
        pool.shrink(11)
    moves = pool.compact(lambda moves: None)
    assert pool.shrink(3) == 7 * LAYOUT.page_bytes
    assert pool.num_pages == 3 and pool.usage().slab_bytes == 3 * LAYOUT.page_bytes
    assert [len(c) for c in pool.kv_caches] == [3, 3, 3]
    for page in (4, 5):
        assert_marked(pool, moves[page], page)
    assert pool.allocate() == 2
    with pytest.raises(OutOfMemoryError):
        pool.allocate()


def test_malloc_gives_pages_and_ordinary_memory(make):
    pool = make(3, LAYOUT)
    pages = [pool.malloc(LAYOUT.layer_bytes) for _ in range(2)]
    assert pool.usage().pages.used == 2 and sorted(pool.pinned_pages) == [0, 1]
    other = pool.malloc(LAYOUT.layer_bytes + 4)
    assert pool.usage().pages.used == 2 and other is not None
    del pages[0]
    gc.collect()
    assert pool.usage().pages.used == 1 and pool.pinned_pages
    assert pool.compact(lambda moves: None) == {}, "a page held by address must not move"
    with pytest.raises(ConfigError, match="held through malloc"):
        pool.shrink(2)
    pages.clear()
    gc.collect()
    assert pool.usage().pages.used == 0 and not pool.pinned_pages


def test_malloc_of_a_page_is_the_page():
    pool = CpuBlockPool(2, LAYOUT)
    block = pool.malloc(LAYOUT.layer_bytes)
    view = block[8:].view(np.float32)
    view[:] = 7
    del block
    gc.collect()
    assert pool.usage().pages.used == 1, "a view keeps the page"
    assert (pool.kv_caches[0][0].reshape(-1)[2:] == 7).all()
    full = [pool.malloc(LAYOUT.layer_bytes) for _ in range(3)]
    assert pool.usage().pages.used == 2, "without a free page the memory is ordinary"
    assert len(full[2]) == LAYOUT.layer_bytes


@pytest.mark.gpu
def test_the_gpu_pool_is_a_cupy_allocator(cupy):
    from cupyinfer.runtime.kv_pool_cuda import KVBlockPool

    pool = KVBlockPool(4, LAYOUT)
    assert isinstance(pool, cupy.cuda.MemoryPool)
    with cupy.cuda.using_allocator(pool.malloc):
        page = cupy.full(LAYOUT.layer_bytes // 4, 5, np.float32)
        other = cupy.arange(1000)
    assert (host(pool.kv_caches[0][0]) == 5).all() and pool.usage().pages.used == 1
    assert pool.usage().other_bytes >= other.nbytes
    assert pool.used_bytes() >= 4 * LAYOUT.page_bytes
    del page
    assert pool.usage().pages.used == 0


@pytest.mark.gpu
def test_a_slab_larger_than_the_device_is_refused(cupy):
    from cupyinfer.runtime.kv_pool_cuda import KVBlockPool

    total = cupy.cuda.runtime.memGetInfo()[1]
    with pytest.raises(OutOfMemoryError, match="KV pages need .* GiB of device memory, but .* lower"):
        KVBlockPool(2 * total // LAYOUT.page_bytes, LAYOUT)
