"""Who holds which KV page: reference counts, the free list and the pages kept for their content.

Pure bookkeeping over page numbers; it never touches the memory behind them. Every page is in exactly one state:

* *free*: on the free list;
* *used*: held by one or more sequences (the reference count);
* *cached*: held by nobody, but its content is worth keeping: it is handed out only when no page is free, the longest
  unused first.

All operations are O(1) per page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from cupyinfer.errors import OutOfMemoryError, invalid


@dataclass(frozen=True)
class PageUsage:
    """Pages by state. ``high_water`` is the most pages ever in use at once."""

    total: int
    used: int
    free: int
    cached: int
    high_water: int


class BlockLedger:
    """Books over ``num_pages`` equal pages, numbered from 0.

    ``on_evict(page)`` is called when a cached page is about to be reused for something else.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] | None = None) -> None:
        if num_pages < 1:
            raise invalid("num_pages", num_pages, "an integer >= 1")
        self.num_pages = num_pages
        self.on_evict = on_evict
        self.high_water = 0
        self.evictions = 0
        self._refs = [0] * num_pages
        self._keep = [False] * num_pages  # content worth keeping after the last holder is gone
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low numbers first keeps the used part compact
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    # --- counts -----------------------------------------------------------------------------------------------------
    @property
    def available(self) -> int:
        """Pages that :meth:`allocate` can still give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.num_pages - self.available

    def usage(self) -> PageUsage:
        return PageUsage(self.num_pages, self.used, len(self._free), len(self._cached), self.high_water)

    def references(self, page: int) -> int:
        """How many holders the page has."""
        return self._refs[page]

    def is_kept(self, page: int) -> bool:
        """Whether the page's content outlives its holders."""
        return self._keep[page]

    # --- operations -------------------------------------------------------------------------------------------------
    def allocate(self) -> int:
        """A page with one reference and no content. Raises OutOfMemoryError when every page is in use."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page = self._evict()
        else:
            raise OutOfMemoryError(f"all {self.num_pages} KV pages are in use")
        self._refs[page] = 1
        self._note_use()
        return page

    def share(self, page: int) -> None:
        """One more holder for a used or cached page."""
        if self._refs[page] == 0:
            if page not in self._cached:
                raise invalid("page", page, "a page that is used or cached")
            del self._cached[page]
        self._refs[page] += 1
        self._note_use()

    def release(self, page: int) -> None:
        """One holder less. After the last one a kept page becomes cached (the youngest), any other free."""
        refs = self._refs[page] - 1
        if refs < 0:
            raise invalid("page", page, "a page that is in use")
        self._refs[page] = refs
        if refs == 0:
            if self._keep[page]:
                self._cached[page] = None
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """Mark the content of a used page as worth keeping."""
        if self._refs[page] == 0:
            raise invalid("page", page, "a page that is in use")
        self._keep[page] = True

    def drop_cached(self) -> int:
        """Forget the content of every cached page; returns how many became free."""
        count = len(self._cached)
        while self._cached:
            self._free.append(self._evict())
        return count

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._keep[page] = False
        self.evictions += 1
        if self.on_evict is not None:
            self.on_evict(page)
        return page

    def _note_use(self) -> None:
        used = self.num_pages - len(self._free) - len(self._cached)
        if used > self.high_water:
            self.high_water = used

    # --- compaction -------------------------------------------------------------------------------------------------
    def plan_compaction(self, pinned: Collection[int] = ()) -> dict[int, int]:
        """``{old page: new page}`` that moves used and cached pages to the lowest numbers with the fewest moves.

        Pages in ``pinned`` stay where they are.
        """
        fixed = set(pinned)
        live = [p for p in range(self.num_pages) if p not in fixed and (self._refs[p] or p in self._cached)]
        targets = [p for p in range(self.num_pages) if p not in fixed][: len(live)]
        stay = set(live).intersection(targets)
        movers = (page for page in live if page not in stay)
        holes = (page for page in targets if page not in stay)
        return dict(zip(movers, holes, strict=True))

    def apply_moves(self, moves: Mapping[int, int]) -> None:
        """Renumber pages as :meth:`plan_compaction` said (the memory behind them was copied by the caller)."""
        for old, new in moves.items():
            self._refs[new], self._refs[old] = self._refs[old], 0
            self._keep[new], self._keep[old] = self._keep[old], False
        self._cached = OrderedDict((moves.get(page, page), None) for page in self._cached)
        self._rebuild_free()

    def resize(self, num_pages: int) -> None:
        """Change the number of pages. Pages beyond the new end must be free; raises ConfigError otherwise."""
        held = [p for p in range(num_pages, self.num_pages) if self._refs[p] or p in self._cached]
        if num_pages < 1 or held:
            lowest = max(held) + 1 if held else 1
            raise invalid("num_pages", num_pages, f"an integer >= {lowest} (pages below that are in use or cached)")
        grow = max(0, num_pages - self.num_pages)
        self._refs = self._refs[:num_pages] + [0] * grow
        self._keep = self._keep[:num_pages] + [False] * grow
        self.num_pages = num_pages
        self._rebuild_free()

    def _rebuild_free(self) -> None:
        pages = range(self.num_pages - 1, -1, -1)
        self._free = [page for page in pages if not self._refs[page] and page not in self._cached]

    # --- invariants -------------------------------------------------------------------------------------------------
    def check(self, held: Iterable[int] | None = None) -> None:
        """Raise AssertionError unless the books balance.

        ``held``: every page number as often as somebody holds it; the reference counts must then match exactly.
        """
        free, cached = set(self._free), set(self._cached)
        used = {page for page, refs in enumerate(self._refs) if refs > 0}
        assert len(free) == len(self._free), "a page is twice on the free list"
        assert not (free & cached or free & used or cached & used), "a page is in two states"
        assert len(free) + len(cached) + len(used) == self.num_pages, "a page is in no state"
        assert all(self._keep[page] for page in cached), "a cached page is not marked as kept"
        assert not any(self._keep[page] for page in free), "a free page is marked as kept"
        assert min(self._refs) >= 0 and self.high_water >= len(used)
        if held is not None:
            counts = [0] * self.num_pages
            for page in held:
                counts[page] += 1
            assert counts == self._refs, "reference counts do not match the holders"
