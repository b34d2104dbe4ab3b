"""Runs batches: the decoder, the draw, and the state that stays on the device between steps.

A decode step on a GPU is padded to a bucket and replayed as one CUDA graph, sampling included; rows that need filters,
penalties, biases or log-probabilities replay a graph of the forward pass alone and sample after it. Everything else
runs launch by launch. ``launch`` returns before the device is done; ``Handle.wait`` gives the tokens. The last tokens
stay on the device, so the next step can be launched before this one is read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from cupyinfer.config import EnginePlan
from cupyinfer.engine.batch import Batch, idle_batch
from cupyinfer.engine.runner_io import DeviceInputs, Inputs, Results, host_inputs
from cupyinfer.engine.sampling import Special
from cupyinfer.errors import OutOfMemoryError, RequestError
from cupyinfer.model.inputs import StepInputs
from cupyinfer.ops.logits import MAX_VOCAB, apply_bias, apply_penalties, logprobs
from cupyinfer.ops.sampling import sample_filtered, sample_simple
from cupyinfer.ops.sampling_state import count_prompt, count_tokens, store_last
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.graph import GraphCache
from cupyinfer.sampling_params import SamplingParams
from cupyinfer.types import Array

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Model(Protocol):
    """What the runner needs of a decoder."""

    def forward(self, step: StepInputs, kv_caches: Any, arena: Arena) -> Array:
        """float32 logits [N, V] of ``step.logits_indices``."""

    def hidden(self, step: StepInputs, kv_caches: Any, arena: Arena) -> Array:
        """The layers without the output projection."""


@dataclass(frozen=True)
class LogprobRows:
    """Log-probabilities of some rows: of the token itself with its rank, and of the most likely tokens."""

    chosen: np.ndarray  # [N] float32
    ranks: np.ndarray  # [N] int32
    top_ids: np.ndarray  # [N, top] int32
    top_logprobs: np.ndarray  # [N, top] float32


@dataclass(frozen=True)
class StepResult:
    """What a step gave: a token for each sampled row; log-probabilities where some row asked for them."""

    tokens: list[int]
    logprobs: LogprobRows | None  # in the order of the tokens
    prompt_logprobs: LogprobRows | None  # of the scored positions, in the order of the batch


class Handle:
    """A step that was launched."""

    def __init__(self, wait: Callable[[], tuple[np.ndarray, dict[str, np.ndarray]]]) -> None:
        self._wait = wait

    def wait(self) -> StepResult:
        """The result, once the device has computed it."""
        tokens, others = self._wait()
        return StepResult(tokens.tolist(), _logprob_rows(others, "sampled"), _logprob_rows(others, "prompt"))


def _logprob_rows(arrays: dict[str, np.ndarray], prefix: str) -> LogprobRows | None:
    if f"{prefix}.chosen" not in arrays:
        return None
    return LogprobRows(*(arrays[f"{prefix}.{name}"] for name in ("chosen", "ranks", "top_ids", "top_logprobs")))


class Runner:
    """One device's share of the engine: decoder, KV pages, sampling state, scratch and graphs."""

    def __init__(
        self, model: Model, vocab_size: int, plan: EnginePlan, device: Device, kv_caches: list[Array], arena: Arena
    ) -> None:
        """``kv_caches``: the pool's list of one array a layer; it may be replaced in place when the pool shrinks."""
        xp = device.xp
        self.model, self.plan, self.device, self.kv_caches, self.arena = model, plan, device, kv_caches, arena
        self.vocab_size = vocab_size
        self.stream = xp.cuda.Stream(non_blocking=True) if device.is_cuda else None
        with self.on_device():
            self.last_tokens = xp.zeros(plan.max_num_seqs, np.int32)
            self._tokens = xp.zeros(plan.max_num_seqs, np.int32)
            inputs = DeviceInputs(device, self.stream, plan, self.last_tokens) if device.is_cuda else None
        self.counts: Array | None = None  # [R, V]: made when the first request with penalties comes
        self._inputs = inputs
        self._results = Results(device, self.stream, plan.max_num_seqs)
        self.graphs = GraphCache(self.stream) if device.is_cuda else None
        self._graph_logits: dict[int, Array] = {}

    def on_device(self) -> AbstractContextManager[Any]:
        """Makes the runner's GPU and stream the current ones."""
        if self.stream is None:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(self.device.xp.cuda.Device(self.device.index))
        stack.enter_context(self.stream)
        return stack

    # --- one step ---------------------------------------------------------------------------------------------------
    def launch(self, batch: Batch) -> Handle:
        """Start a step. Batches run in the order of their launches; the device may still be busy with earlier ones."""
        with self.on_device():
            if self._inputs is None:
                inputs = host_inputs(batch, self.last_tokens)
                return self._finish(batch, inputs, self._forward(inputs.step))
            if batch.pure_decode:
                return self._decode(batch, self._inputs)
            inputs = self._inputs.send(batch)
            return self._finish(batch, inputs, self._forward(inputs.step))

    def _forward(self, step: StepInputs) -> Array | None:
        if step.logits_indices.shape[0] == 0:  # only beginnings of prompts
            self.model.hidden(step, self.kv_caches, self.arena)
            return None
        return self.model.forward(step, self.kv_caches, self.arena)

    def _decode(self, batch: Batch, sender: DeviceInputs) -> Handle:
        """A decode step on a GPU, padded to its bucket."""
        bucket = self.plan.decode_buckets[bisect_left(self.plan.decode_buckets, batch.num_decodes)]
        inputs = sender.send(batch, bucket)
        if batch.sampling.special is None:
            self._replay(("simple", bucket), lambda: self._simple_step(inputs, bucket))
            return Handle(self._results.fetch(self._tokens[: batch.num_decodes], {}))
        self._replay(("forward", bucket), lambda: self._forward_step(inputs, bucket))
        return self._finish(batch, inputs, self._graph_logits[bucket][: batch.num_decodes])

    def _replay(self, key: tuple[str, int], body: Callable[[], None]) -> None:
        """Replay the graph of ``key``; capture it first when it is missing (the body has then run once already)."""
        if not self.plan.use_graphs or self.graphs is None:
            body()
        elif not self.graphs.replay(key):
            self.graphs.capture(key, body)

    def decode_body(self, batch: Batch, bucket: int) -> Callable[[], None]:
        """The launches of a plain decode step on a GPU, to be run or captured; its inputs are sent now."""
        assert self._inputs is not None, "the CPU pads and captures nothing"
        return partial(self._simple_step, self._inputs.send(batch, bucket), bucket)

    def _simple_step(self, inputs: Inputs, bucket: int) -> None:
        logits = self.model.forward(inputs.step, self.kv_caches, self.arena)
        tokens = self._tokens[:bucket]
        sample_simple(logits, inputs.temperature, inputs.seeds, inputs.steps, tokens=tokens, arena=self.arena)
        store_last(tokens, inputs.rows, last_tokens=self.last_tokens)

    def _forward_step(self, inputs: Inputs, bucket: int) -> None:
        self._graph_logits[bucket] = self.model.forward(inputs.step, self.kv_caches, self.arena)

    # --- sampling ---------------------------------------------------------------------------------------------------
    def _finish(self, batch: Batch, inputs: Inputs, logits: Array | None) -> Handle:
        """Draw from the first rows of logits, score the rest, and start bringing the results to the host."""
        n = len(batch.sampled)
        tokens = self._tokens[:n]
        others: dict[str, Array] = {}
        if logits is not None and batch.scored:
            others |= self._score_prompts(batch, logits[n:])
        if n:
            assert logits is not None
            special = batch.sampling.special or Special()
            others |= self._draw(special, inputs, logits[:n], tokens)
            store_last(tokens, inputs.rows[:n], last_tokens=self.last_tokens)
        return Handle(self._results.fetch(tokens, others))

    def _draw(self, special: Special, inputs: Inputs, logits: Array, tokens: Array) -> dict[str, Array]:
        """Fill ``tokens`` [N]; returns the log-probabilities that were asked for, those of the unchanged logits."""
        n, extra = len(tokens), inputs.extra
        raw = logits
        if special.adjusts and special.num_logprobs >= 0:
            raw = self.arena.take("raw_logits", logits.shape, np.float32)
            raw[...] = logits
        if special.penalty_rows is not None:
            self._fill_counts(special)
            penalties = (extra["repetition"], extra["presence"], extra["frequency"])
            apply_penalties(logits, extra["penalty_rows"], self.counts, *penalties)
        if special.bias_rows is not None:
            put = self.device.xp.asarray
            apply_bias(logits, put(special.bias_rows), put(special.bias_ids), put(special.bias_values))
        temperature, seeds, steps = inputs.temperature[:n], inputs.seeds[:n], inputs.steps[:n]
        if special.top_k is not None:
            filters = (extra["top_k"], extra["top_p"], extra["min_p"])
            sample_filtered(logits, temperature, *filters, seeds, steps, tokens=tokens, arena=self.arena)
        else:
            sample_simple(logits, temperature, seeds, steps, tokens=tokens, arena=self.arena)
        if special.penalty_rows is not None:
            count_tokens(tokens, extra["penalty_rows"], self.counts)
        if special.num_logprobs < 0:
            return {}
        return self.score("sampled", raw, tokens, special.num_logprobs)

    def _score_prompts(self, batch: Batch, logits: Array) -> dict[str, Array]:
        """Log-probabilities of the prompt tokens that follow the scored positions."""
        targets = np.concatenate([s.slice(r.start + 1, r.stop + 1) for s, r in batch.scored])
        top = max(s.params.prompt_logprobs or 0 for s, _ in batch.scored)
        return self.score("prompt", logits, self.device.xp.asarray(targets), top)

    def score(self, name: str, logits: Array, tokens: Array, top: int) -> dict[str, Array]:
        """Log-probabilities of ``tokens`` [N] and of the ``top`` best ones, under names that start with ``name``."""
        n = len(tokens)
        take = lambda what, shape, dtype: self.arena.take(f"{name}.{what}", shape, dtype)
        result = {
            "chosen": take("chosen", (n,), np.float32),
            "ranks": take("ranks", (n,), np.int32),
            "top_ids": take("top_ids", (n, top), np.int32),
            "top_logprobs": take("top_logprobs", (n, top), np.float32),
        }
        logprobs(logits, tokens, top, **result, arena=self.arena)
        return {f"{name}.{what}": array for what, array in result.items()}

    # --- token counts -----------------------------------------------------------------------------------------------
    def prepare(self, params: SamplingParams) -> None:
        """Make what a request with these parameters needs.

        Raises RequestError, OutOfMemoryError; nothing else is disturbed.
        """
        scored = params.logprobs is not None or params.prompt_logprobs is not None
        if self.vocab_size > MAX_VOCAB and (params.filtered or scored):
            raise RequestError(
                f"top_k, top_p, min_p and logprobs are not available for a vocabulary of {self.vocab_size} tokens; "
                f"allowed: at most {MAX_VOCAB}"
            )
        if not params.penalized or self.counts is not None:
            return
        rows, nbytes = self.plan.max_num_seqs, 4 * self.plan.max_num_seqs * self.vocab_size
        try:
            with self.on_device():
                self.counts = self.device.xp.zeros((rows, self.vocab_size), np.int32)
        except MemoryError:
            raise OutOfMemoryError(
                f"penalties need {nbytes / 2**20:.0f} MiB for token counts, which are not available; lower "
                "gpu_memory_utilization or max_num_seqs"
            ) from None

    def _fill_counts(self, special: Special) -> None:
        """Rows that start (again): forget who had the row before, count the prompt and the output so far."""
        if not special.fresh:
            return
        xp = self.device.xp
        for row, _ in special.fresh:
            self.counts[row] = 0  # type: ignore[index]
        prompts = [s.slice(0, s.prompt_len) for _, s in special.fresh]
        outputs = [s.slice(s.prompt_len, len(s.tokens)) for _, s in special.fresh]
        for parts, count in ((prompts, count_prompt), (outputs, count_tokens)):
            rows = np.repeat(np.array([row for row, _ in special.fresh], np.int32), [len(p) for p in parts])
            if len(rows):
                count(xp.asarray(np.concatenate(parts)), xp.asarray(rows), self.counts)

    # --- graphs -----------------------------------------------------------------------------------------------------
    def capture_graphs(self, progress: Progress | None = None) -> None:
        """Capture the decode step of every bucket, the largest first (it reserves the most scratch)."""
        if not self.plan.use_graphs or self.graphs is None or self._inputs is None:
            return
        buckets = self.plan.decode_buckets[::-1]
        self.arena.retain()
        with self.on_device():
            for done, bucket in enumerate(buckets, 1):
                self.graphs.capture(("simple", bucket), self.decode_body(idle_batch(decodes=bucket), bucket))
                if progress:
                    progress("graphs", done, len(buckets))

    def run_idle(self, batch: Batch) -> None:
        """Run a batch of ``idle_batch`` launch by launch, for the scratch it reserves and the kernels it compiles."""
        assert self._inputs is not None, "only a GPU has scratch to reserve"
        with self.on_device():
            inputs = self._inputs.send(batch, batch.num_decodes)
            if batch.num_decodes:
                self._simple_step(inputs, batch.num_decodes)
            else:
                self._forward(inputs.step)

    def drop_graphs(self) -> None:
        """Forget every graph (the pages moved to other addresses); they are captured again when needed."""
        if self.graphs is not None:
            with self.on_device():
                self.graphs.clear()
            self._graph_logits.clear()

    def synchronize(self) -> None:
        """Wait until everything launched has run."""
        if self.stream is not None:
            self.stream.synchronize()
