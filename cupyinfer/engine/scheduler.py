"""Who computes what in the next step, decided in tokens and pages only.

Continuous batching: every running sequence gets its next token or its next piece of prompt, oldest first, then waiting
sequences are admitted, first come first served, as long as the step's token budget, the rows of the sampling state and
the KV pages last. Long prompts are cut to what the budget leaves (chunked prefill), so they share steps with decoding
ones. A sequence gets the pages of all its known tokens when it is admitted; when decoding ones run out of pages, the
youngest gives its pages back and is computed again later (preemption by recomputation). Nothing is ever lost: the
oldest sequence can always evict all others, and one that could not fit alone is refused before it is added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from cupyinfer.config import EnginePlan
from cupyinfer.engine.prefix_cache import PrefixCache, held_pages
from cupyinfer.engine.rows import RowTable
from cupyinfer.engine.sequence import Sequence, Status
from cupyinfer.errors import RequestError, invalid
from cupyinfer.runtime.ledger import BlockLedger

_WATERMARK = 0.01  # share of the pages that admissions leave to those who run already


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start .. start + count`` of a sequence.

    ``samples``: the chunk ends at the last token, so a new one follows. ``scored``: positions of the chunk whose logits
    are wanted for prompt logprobs.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    scored: range = range(0)

    @property
    def logits_rows(self) -> int:
        return len(self.scored) + self.samples


@dataclass(slots=True)
class Schedule:
    """The next step: sequences that compute exactly their last token, with its position, and chunks of prompts."""

    decodes: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.count for chunk in self.chunks)


class NeedsCollect(Exception):  # noqa: N818 - a signal between scheduler and engine, not an error
    """Pages ran out while steps are in flight: their results must be read before anything can be preempted."""


class Scheduler:
    """Queues of waiting and running sequences over one ledger of pages."""

    def __init__(self, plan: EnginePlan, ledger: BlockLedger, prefix: PrefixCache, rows: RowTable) -> None:
        self.plan = plan
        self.ledger = ledger
        self.prefix = prefix
        self.rows = rows
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0

    # --- entering and leaving ---------------------------------------------------------------------------------------
    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError when it could not run even with all pages."""
        pages = self._pages_for(sequence.max_len - 1)  # the last token sampled is never computed
        if pages > self.ledger.num_pages:
            raise RequestError(
                f"request {sequence.request_id}: {sequence.prompt_len} prompt tokens and up to "
                f"{sequence.max_len - sequence.prompt_len} output tokens need {pages} KV pages; allowed: at most "
                f"{self.ledger.num_pages} pages of {self.plan.block_size} tokens"
            )
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out for good; its pages are free for whatever is launched from now on."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # --- one step ---------------------------------------------------------------------------------------------------
    def schedule(self, now: float = 0.0, may_preempt: bool = True) -> Schedule:
        """Plan the next step and count it as computed. An empty schedule means that nothing can be launched now.

        ``now``: seconds of ``time.perf_counter()``, noted as the start of sequences that are admitted.
        Raises NeedsCollect (having changed nothing but page tables that grew) when a preemption is due and
        ``may_preempt`` is False.
        """
        step = Schedule()
        budget = self.plan.max_num_batched_tokens
        spare_rows = self.plan.logits_rows - len(self.running)
        self._grow_tables(may_preempt)
        for sequence in self.running:
            if budget == 0:
                break
            length, computed = sequence.length, sequence.computed
            if length - computed == 1 and (computed >= sequence.prompt_len or not sequence.wants_prompt_logprobs):
                if length < sequence.max_len:
                    step.decodes.append(sequence)
                    step.starts.append(computed)
                    sequence.computed = length
                    sequence.length = length + 1
                    sequence.pending += 1
                    budget -= 1
            elif length > computed and length < sequence.max_len:
                chunk = self._take_chunk(sequence, budget, spare_rows)
                spare_rows -= max(0, chunk.logits_rows - 1)
                budget -= chunk.count
                step.chunks.append(chunk)
        self._admit(step, budget, spare_rows, now)
        return step

    def _grow_tables(self, may_preempt: bool) -> None:
        """Give every running sequence room for its next token, oldest first; the youngest pay for it."""
        size = self.plan.block_size
        needy = [s for s in self.running if s.length > s.capacity and s.length < s.max_len]
        for sequence in needy:
            if sequence.status is not Status.RUNNING:
                continue
            while not self.ledger.available and sequence.status is Status.RUNNING:
                if not may_preempt:
                    raise NeedsCollect
                self._preempt(self.running[-1])
            if sequence.status is Status.RUNNING:
                page = self.ledger.allocate()
                self.rows.block_tables[sequence.row, len(sequence.pages)] = page
                sequence.pages.append(page)
                sequence.capacity += size

    def _take_chunk(self, sequence: Sequence, budget: int, spare_rows: int) -> Chunk:
        """The next piece of a sequence's known tokens, counted as computed; its full pages are shared from now on."""
        start = sequence.computed
        count = min(sequence.length - start, budget)
        scored = range(0)
        if sequence.wants_prompt_logprobs:
            first = max(start, len(sequence.prompt_logprobs))  # those before a preemption are there already
            count = min(count, max(0, first - start) + 1 + spare_rows)
            scored = range(first, min(start + count, sequence.prompt_len - 1))
        samples = start + count == sequence.length
        sequence.computed = start + count
        if samples:
            sequence.length += 1
            sequence.pending += 1
        if sequence.computed >= sequence.register_at:
            self.prefix.register(sequence)
        return Chunk(sequence, start, count, samples, scored)

    def _admit(self, step: Schedule, budget: int, spare_rows: int, now: float) -> None:
        """Start waiting sequences while tokens, rows and pages last."""
        while self.waiting and budget > 0 and spare_rows > 0 and self.rows.available:
            sequence = self.waiting[0]
            if not self._give_pages(sequence):
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.status = Status.RUNNING
            sequence.row = self.rows.assign(sequence)
            sequence.timing.first_scheduled = sequence.timing.first_scheduled or now
            chunk = self._take_chunk(sequence, budget, spare_rows - 1)
            budget -= chunk.count
            spare_rows -= max(1, chunk.logits_rows)
            if chunk.count == 1 and chunk.samples and not chunk.scored:
                step.decodes.append(sequence)
                step.starts.append(chunk.start)
            else:
                step.chunks.append(chunk)

    def _give_pages(self, sequence: Sequence) -> bool:
        """Pages for all known tokens, shared ones first; False (and nothing changed) when there are too few."""
        shared = self.prefix.match(sequence)
        needed = self._pages_for(sequence.length) - len(shared)
        idle = sum(self.ledger.references(page) == 0 for page in shared)
        reserve = int(self.ledger.num_pages * _WATERMARK) if self.running else 0
        if needed + idle + reserve > self.ledger.available:
            return False
        for page in shared:
            self.ledger.share(page)
        sequence.pages = shared + [self.ledger.allocate() for _ in range(needed)]
        sequence.capacity = len(sequence.pages) * self.plan.block_size
        sequence.computed = len(shared) * self.plan.block_size
        sequence.register_at = sequence.computed + self.plan.block_size
        sequence.literal_len = sequence.length
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
        self.prefix.record(sequence.length, sequence.computed)
        return True

    # --- giving back ------------------------------------------------------------------------------------------------
    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; everything but the known tokens is computed again later."""
        assert sequence.pending == 0, "a sequence with steps in flight cannot be preempted"
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.status = Status.WAITING
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Release pages and row. The last page goes first: a prefix stays useful longer than its continuation."""
        for page in reversed(sequence.pages):
            self.ledger.release(page)
        sequence.pages = []
        sequence.capacity = 0
        self.rows.free(sequence.row)
        sequence.row = -1

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.plan.block_size)

    # --- housekeeping -----------------------------------------------------------------------------------------------
    def apply_moves(self, moves: Mapping[int, int]) -> None:
        """Pages were renumbered by compaction."""
        for sequence in self.running:
            sequence.pages = [moves.get(page, page) for page in sequence.pages]
            self.rows.block_tables[sequence.row, : len(sequence.pages)] = sequence.pages
        self.prefix.apply_moves(moves)

    def check_shrink(self, num_pages: int) -> None:
        """Raise ConfigError unless everybody here could also run to the end with that many pages."""
        longest = max((s.max_len - 1 for s in (*self.running, *self.waiting)), default=1)
        least = max(self.ledger.used, self._pages_for(longest))
        if num_pages < least:
            raise invalid("num_pages", num_pages, f"an integer >= {least}, which the unfinished requests need")

    def check(self, pinned: tuple[int, ...] = ()) -> None:
        """Raise AssertionError unless queues, pages, rows and prefix cache agree."""
        self.ledger.check(held_pages(self.running) + list(pinned))
        self.prefix.check()
        assert all(not (s.pages or s.computed or s.pending) and s.row < 0 for s in self.waiting)
        assert all(s.status is Status.WAITING for s in self.waiting)
        assert all(s.status is Status.RUNNING for s in self.running)
        assert len({s.row for s in self.running}) == len(self.running) == self.rows.used
        for s in self.running:
            assert s.capacity == len(s.pages) * self.plan.block_size >= s.computed
            assert self.rows.block_tables[s.row, : len(s.pages)].tolist() == s.pages
            assert s.length == len(s.tokens) + s.pending and s.computed <= s.length
