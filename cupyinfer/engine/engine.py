"""The step loop: requests in, tokens out.

On a GPU the engine works one step ahead: step n+1 is launched before the tokens of step n are read, so the device never
waits for the host. A sequence that turns out to have ended in step n has one token too many in step n+1; it is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq

import numpy as np

from cupyinfer.config import EnginePlan
from cupyinfer.engine.batch import Batch, build_batch
from cupyinfer.engine.prefix_cache import PrefixCache
from cupyinfer.engine.rows import RowTable
from cupyinfer.engine.runner import Handle, LogprobRows, Runner
from cupyinfer.engine.scheduler import NeedsCollect, Schedule, Scheduler
from cupyinfer.engine.sequence import Request, Sequence, derive_seed
from cupyinfer.engine.update import EngineStats, RequestUpdate
from cupyinfer.errors import OutOfMemoryError, RequestError
from cupyinfer.outputs import Logprob, TokenLogprobs
from cupyinfer.runtime.kv_pool import PagePool
from cupyinfer.sampling_params import SamplingParams

_MASK64 = (1 << 64) - 1


class LLMEngine:
    """Serves many requests at once with one model. Call it from one thread.

    ``add_request`` checks and queues; ``step`` does one step and returns the news; ``abort`` and ``finish_sequence``
    end something early, between steps.
    """

    def __init__(self, runner: Runner, pool: PagePool, plan: EnginePlan, eos_token_ids: Seq[int] = ()) -> None:
        """``pool`` holds ``plan.num_blocks`` pages; ``eos_token_ids`` end a sequence unless it ignores them."""
        self.runner = runner
        self.pool = pool
        self.plan = plan
        self.vocab_size = runner.vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.rows = RowTable(plan.max_num_seqs, plan.blocks_per_sequence)
        self.prefix = PrefixCache(pool.ledger, plan.block_size, plan.enable_prefix_caching)
        self.scheduler = Scheduler(plan, pool.ledger, self.prefix, self.rows)
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[tuple[Batch, Handle]] = deque()
        self._added = 0
        self._steps = 0
        self._prompt_tokens = 0
        self._output_tokens = 0

    # --- requests ---------------------------------------------------------------------------------------------------
    def add_request(self, request_id: str, prompt_token_ids: Seq[int], params: SamplingParams | None = None) -> None:
        """Queue a prompt. Raises RequestError (OutOfMemoryError) and leaves everything else as it was."""
        params = params or SamplingParams()
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; allowed: one that no unfinished request has")
        prompt = self._check_prompt(request_id, prompt_token_ids)
        params.validate_for(self.vocab_size)
        self.runner.prepare(params)
        seed = derive_seed(self.plan.seed, self._added) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        max_len = min(len(prompt) + params.max_tokens, self.plan.max_model_len)
        now = time.perf_counter()
        sequences = [
            Sequence(
                request_id,
                index,
                prompt,
                params,
                seed=(seed + index) & _MASK64,
                max_len=max_len,
                stop_ids=ends,
                arrival=now,
            )
            for index in range(params.n)
        ]
        for sequence in sequences:
            self.scheduler.add(sequence)  # they are of one size: the first raises or none does
        self._added += 1
        self._requests[request_id] = Request(request_id, sequences)

    def _check_prompt(self, request_id: str, prompt: Seq[int]) -> list[int]:
        """The prompt as a list of Python ints. Raises RequestError."""
        if len(prompt) == 0:
            raise RequestError(f"request {request_id}: the prompt is empty; allowed: at least one token")
        if len(prompt) >= self.plan.max_model_len:
            raise RequestError(
                f"request {request_id}: the prompt has {len(prompt)} tokens; allowed: at most "
                f"{self.plan.max_model_len - 1} (max_model_len={self.plan.max_model_len}, less one to generate)"
            )
        allowed = f"token ids from 0 to {self.vocab_size - 1} (the model's vocabulary)"
        try:
            ids = np.asarray(prompt)
        except ValueError:
            ids = np.zeros((0, 0))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError(f"request {request_id}: prompt_token_ids must be a flat list of {allowed}")
        bad = (ids < 0) | (ids >= self.vocab_size)
        if bad.any():
            where = int(np.argmax(bad))
            raise RequestError(
                f"request {request_id}: prompt_token_ids[{where}]={int(ids[where])} is not allowed; allowed: {allowed}"
            )
        return ids.tolist()

    def abort(self, request_id: str) -> list[RequestUpdate]:
        """End a request at once; its unfinished sequences are reported with reason "abort". Unknown ids give []."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        now = time.perf_counter()
        open_ = [s for s in request.sequences if not s.finished]
        updates = [self._end(s, [], "abort", None, now) for s in open_]
        for update in updates[-1:]:
            update.request_finished = True
        return updates

    def finish_sequence(self, request_id: str, index: int, stop_reason: str | None = None) -> RequestUpdate | None:
        """End one sequence with reason "stop", as when its text contains a stop string; None when it had ended."""
        request = self._requests.get(request_id)
        if request is None or request.sequences[index].finished:
            return None
        update = self._end(request.sequences[index], [], "stop", stop_reason, time.perf_counter())
        self._close(update)
        return update

    def has_unfinished(self) -> bool:
        return self.scheduler.has_work()

    # --- stepping ---------------------------------------------------------------------------------------------------
    def step(self) -> list[RequestUpdate]:
        """Launch the next step and collect the oldest one that is due; returns what is new.

        The list may be empty while requests are unfinished.
        """
        updates: list[RequestUpdate] = []
        launched = self._launch(updates)
        if self._in_flight and (len(self._in_flight) >= self.plan.depth or not launched):
            self._collect(updates)
        return updates

    def _launch(self, updates: list[RequestUpdate]) -> bool:
        """Launch one step; False when there is nothing to launch. News that had to be read first go to ``updates``."""
        now = time.perf_counter()
        try:
            step = self.scheduler.schedule(now, may_preempt=not self._in_flight)
        except NeedsCollect:
            while self._in_flight:
                self._collect(updates)
            step = self.scheduler.schedule(now)
        if not step:
            self._check_progress()
            return False
        batch = build_batch(step, self.rows, self.plan.block_size)
        self._in_flight.append((batch, self.runner.launch(batch)))
        self._steps += 1
        self._prompt_tokens += _prompt_tokens(step)
        return True

    def _check_progress(self) -> None:
        if self.scheduler.waiting and not self.scheduler.running and not self._in_flight:
            head = self.scheduler.waiting[0]
            raise OutOfMemoryError(
                f"request {head.request_id} needs more KV pages than the {self.pool.ledger.available} that are left "
                f"beside {len(self.pool.pinned_pages)} held through malloc()"
            )

    def _collect(self, updates: list[RequestUpdate]) -> None:
        """Read the oldest step in flight and turn its tokens into news."""
        batch, handle = self._in_flight.popleft()
        result = handle.wait()
        now = time.perf_counter()
        if result.prompt_logprobs is not None:
            _keep_prompt_logprobs(batch, result.prompt_logprobs)
        wanted = batch.sampling.special.wanted if result.logprobs is not None and batch.sampling.special else None
        append = updates.append
        for i, (sequence, token) in enumerate(zip(batch.sampled, result.tokens, strict=True)):
            if sequence.finish_reason is not None:
                continue  # it ended while this step was in flight
            update = self._take_token(sequence, token, now)
            if wanted is not None and wanted[i] >= 0:
                assert result.logprobs is not None
                update.logprobs = [_token_logprobs(result.logprobs, i, token, int(wanted[i]))]
            append(update)

    def _take_token(self, sequence: Sequence, token: int, now: float) -> RequestUpdate:
        sequence.pending -= 1
        tokens = sequence.tokens
        tokens.append(token)
        known = len(tokens)
        self._output_tokens += 1
        if known >= sequence.register_at:
            self.prefix.register(sequence)
        if token in sequence.stop_ids:
            named = token in sequence.params.stop_token_ids
            update = self._end(sequence, [token], "stop", token if named else None, now)
        elif known >= sequence.max_len:
            update = self._end(sequence, [token], "length", None, now)
        else:
            update = RequestUpdate(
                sequence.request_id, sequence.index, [token], None, None, sequence.timing, sequence.cached_tokens
            )
        if known == sequence.prompt_len + 1:
            sequence.timing.first_token = now
            if sequence.wants_prompt_logprobs:
                update.prompt_logprobs = [None, *sequence.prompt_logprobs]
        if update.finish_reason is not None:
            self._close(update)
        return update

    def _end(
        self, sequence: Sequence, tokens: list[int], reason: str, stop_reason: int | str | None, now: float
    ) -> RequestUpdate:
        """Take a sequence out of the schedule. What is in flight for it is dropped when it is read."""
        self.scheduler.finish(sequence)
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        sequence.timing.finished = now
        return RequestUpdate(
            sequence.request_id,
            sequence.index,
            tokens,
            reason,
            stop_reason,
            sequence.timing,
            sequence.cached_tokens,
        )

    def _close(self, update: RequestUpdate) -> None:
        """Forget the request when this was its last sequence."""
        if self._requests[update.request_id].finished:
            update.request_finished = True
            del self._requests[update.request_id]

    # --- housekeeping -----------------------------------------------------------------------------------------------
    def compact(self, num_pages: int | None = None) -> int:
        """Move the pages in use to the lowest numbers; with ``num_pages`` also shrink the pool to that many.

        Waits for what is in flight (its tokens are reported by the next steps). Cached pages beyond the new size are
        given up. Returns the bytes given back. Raises ConfigError when the unfinished requests need more.
        """
        self.runner.synchronize()
        with self.runner.on_device():
            if num_pages is None:
                self.pool.compact(self.scheduler.apply_moves)
                return 0
            self.scheduler.check_shrink(num_pages)
            self.prefix.clear()
            self.pool.compact(self.scheduler.apply_moves)
            self.runner.drop_graphs()
            return self.pool.shrink(num_pages)

    def stats(self) -> EngineStats:
        pages, prefix = self.pool.ledger.usage(), self.prefix.stats
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages_total=pages.total,
            pages_used=pages.used,
            pages_cached=pages.cached,
            pages_high_water=pages.high_water,
            prefix_queried_tokens=prefix.queried_tokens,
            prefix_hit_tokens=prefix.hit_tokens,
            preemptions=self.scheduler.preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            requests=self._added,
            graph_replays=self.runner.graphs.replays if self.runner.graphs else 0,
        )

    def close(self) -> None:
        """Wait for the device, end every request and destroy the graphs."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self._in_flight.clear()
        self.runner.synchronize()
        self.runner.drop_graphs()


def _prompt_tokens(step: Schedule) -> int:
    """Prompt tokens that the step computes; those computed again after a preemption count again."""
    return sum(c.count for c in step.chunks) + sum(
        start < s.prompt_len for s, start in zip(step.decodes, step.starts, strict=True)
    )


def _keep_prompt_logprobs(batch: Batch, rows: LogprobRows) -> None:
    at = 0
    for sequence, positions in batch.scored:
        most = sequence.params.prompt_logprobs or 0
        if sequence.finish_reason is None:
            sequence.prompt_logprobs += [
                _token_logprobs(rows, at + i, sequence.tokens[p + 1], most) for i, p in enumerate(positions)
            ]
        at += len(positions)


def _token_logprobs(rows: LogprobRows, i: int, token: int, most: int) -> TokenLogprobs:
    """The token itself first, then the ``most`` likeliest ones."""
    found = {token: Logprob(float(rows.chosen[i]), int(rows.ranks[i]))}
    ids, values = rows.top_ids[i, :most].tolist(), rows.top_logprobs[i, :most].tolist()
    for rank, (other, value) in enumerate(zip(ids, values, strict=True), 1):
        found.setdefault(other, Logprob(value, rank))
    return found
