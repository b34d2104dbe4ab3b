"""A plain driver of a decoder over paged caches, for tests: no scheduler, pages in random order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cupyinfer.model.decoder import Decoder
from cupyinfer.model.inputs import StepInputs
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import to_host


@dataclass
class Sequence:
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)


class PagedDriver:
    """Runs steps of any mix of sequences and returns their logits in host memory."""

    def __init__(self, decoder: Decoder, num_pages: int = 64, block_size: int = 16, seed: int = 0) -> None:
        self.decoder, self.xp, self.block_size = decoder, decoder.device.xp, block_size
        shape = decoder.config.kv_cache_shape(num_pages, block_size)
        poison = np.full(shape, np.nan, np.float32).astype(
            decoder.dtype.numpy
        )  # a slot read before it is written shows
        self.caches = [self.xp.array(poison) for _ in range(decoder.config.num_layers)]
        self.free = np.random.default_rng(seed).permutation(num_pages).tolist()
        self.arena = Arena(self.xp)

    def step(self, work: list[tuple[Sequence, int]], every_row: bool = False) -> np.ndarray:
        """Compute the next n tokens of each (sequence, n); logits [N, V] of the last of each, or of every row.

        Sequences with n = 1 must come first.
        """
        inputs, ends = self._inputs(work)
        if not every_row:
            inputs = StepInputs(**(vars(inputs) | {"logits_indices": self._ints([end - 1 for end in ends])}))
        for sequence, n in work:
            sequence.computed += n
        return to_host(self.decoder.forward(inputs, self.caches, self.arena)).copy()

    def greedy(self, prompts: list[list[int]], steps: int, chunk: int = 10**9) -> tuple[np.ndarray, list[list[int]]]:
        """Run all prompts together, prefilling ``chunk`` tokens at a time; (first logits [B, V], greedy tokens)."""
        sequences = [Sequence(list(map(int, prompt))) for prompt in prompts]
        first: list[np.ndarray | None] = [None] * len(prompts)
        new: list[list[int]] = [[] for _ in prompts]
        while any(len(tokens) < steps for tokens in new):
            active = [i for i, tokens in enumerate(new) if len(tokens) < steps]
            amount = {i: min(chunk, len(sequences[i].tokens) - sequences[i].computed) for i in active}
            active.sort(key=lambda i: amount[i] != 1)
            logits = self.step([(sequences[i], amount[i]) for i in active])
            for i, row in zip(active, logits, strict=True):
                if sequences[i].computed < len(sequences[i].tokens):
                    continue  # the prompt is not finished
                first[i] = row if first[i] is None else first[i]
                new[i].append(int(row.argmax()))
                sequences[i].tokens.append(new[i][-1])
        return np.stack(first), new

    def _inputs(self, work: list[tuple[Sequence, int]]) -> tuple[StepInputs, list[int]]:
        ids, positions, slots, starts = [], [], [], [0]
        for sequence, n in work:
            span = range(sequence.computed, sequence.computed + n)
            while len(sequence.pages) * self.block_size < span.stop:
                sequence.pages.append(self.free.pop())
            ids += sequence.tokens[span.start : span.stop]
            positions += span
            slots += [sequence.pages[p // self.block_size] * self.block_size + p % self.block_size for p in span]
            starts.append(len(ids))
        tables = np.zeros((len(work), max(len(s.pages) for s, _ in work)), np.int32)
        for row, (sequence, _) in zip(tables, work, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        lengths = [n for _, n in work]
        decodes = (
            lengths.index(next((n for n in lengths if n != 1), None)) if any(n != 1 for n in lengths) else len(work)
        )
        # even rows are given by the host, odd rows by last_tokens, as when the device sampled them a step before
        rows = [-1 if t % 2 == 0 else t for t in range(len(ids))]
        inputs = StepInputs(
            token_ids=self._ints([i if r < 0 else 0 for i, r in zip(ids, rows, strict=True)]),
            token_rows=self._ints(rows),
            positions=self._ints(positions),
            slot_mapping=self._ints(slots),
            query_start=self._ints(starts),
            context_lens=self._ints([s.computed + n for s, n in work]),
            block_tables=self.xp.asarray(tables),
            logits_indices=self._ints(range(len(ids))),
            last_tokens=self._ints(ids),
            num_decodes=decodes,
            max_query_len=max(lengths),
        )
        return inputs, starts[1:]

    def _ints(self, values) -> np.ndarray:
        return self.xp.asarray(np.array(list(values), np.int32))
