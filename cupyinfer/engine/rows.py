"""The table of running sequences: one row each, as NumPy arrays, so that a batch is built without a loop over tokens.

A row is also the sequence's place in the sampling state on the device (last token, token counts).
"""

from __future__ import annotations

import numpy as np

from cupyinfer.engine.sequence import Sequence

_TINY, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class RowTable:
    """R rows. A row is assigned when a sequence starts to run and free again when it finishes or is preempted."""

    def __init__(self, num_rows: int, blocks_per_sequence: int) -> None:
        self.num_rows = num_rows
        self.block_tables = np.zeros((num_rows, blocks_per_sequence), np.int32)  # [R, M]
        self.prompt_len = np.zeros(num_rows, np.int32)
        self.literal_len = np.zeros(num_rows, np.int32)  # tokens whose values the host sends; later ones it need not
        self.seed = np.zeros(num_rows, np.uint64)
        self.temperature = np.zeros(num_rows, np.float32)  # 0: greedy
        self.top_k = np.zeros(num_rows, np.int32)  # 0: off
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.repetition_penalty = np.ones(num_rows, np.float32)
        self.presence_penalty = np.zeros(num_rows, np.float32)
        self.frequency_penalty = np.zeros(num_rows, np.float32)
        self.filtered = np.zeros(num_rows, bool)  # top-k, top-p or min-p
        self.penalized = np.zeros(num_rows, bool)
        self.biased_until = np.zeros(num_rows, np.int32)  # output tokens that a bias (or min_tokens) applies to
        self.num_logprobs = np.full(num_rows, -1, np.int32)  # -1: none wanted
        self.special = np.zeros(num_rows, bool)  # needs more than temperature and a draw, at least for some tokens
        self.bias: list[tuple[np.ndarray, np.ndarray] | None] = [None] * num_rows  # (token ids, values) of logit_bias
        self.masked: list[np.ndarray | None] = [None] * num_rows  # ids forbidden before min_tokens
        self.min_tokens = np.zeros(num_rows, np.int32)
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.num_rows - len(self._free)

    def assign(self, sequence: Sequence) -> int:
        """Give the sequence a row: its pages, lengths and sampling parameters are written there."""
        row = self._free.pop()
        params = sequence.params
        self.block_tables[row, : len(sequence.pages)] = sequence.pages
        self.prompt_len[row] = sequence.prompt_len
        self.literal_len[row] = sequence.literal_len
        self.seed[row] = sequence.seed
        self.temperature[row] = 0.0 if params.greedy else min(params.temperature, _MOST)
        self.top_k[row] = max(0, params.top_k)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.repetition_penalty[row] = max(params.repetition_penalty, _TINY)
        self.presence_penalty[row] = params.presence_penalty
        self.frequency_penalty[row] = params.frequency_penalty
        self.filtered[row] = params.filtered
        self.penalized[row] = params.penalized
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._assign_bias(row, sequence)
        self.special[row] = (
            params.filtered or params.penalized or params.logprobs is not None or self.biased_until[row] > 0
        )
        return row

    def _assign_bias(self, row: int, sequence: Sequence) -> None:
        bias, least = sequence.params.logit_bias, sequence.params.min_tokens
        ids = sorted(sequence.stop_ids) if least else []
        self.bias[row] = (np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)) if bias else None
        self.masked[row] = np.array(ids, np.int32) if ids else None
        self.min_tokens[row] = least if ids else 0
        self.biased_until[row] = np.iinfo(np.int32).max if bias else self.min_tokens[row]

    def free(self, row: int) -> None:
        """The row may be assigned again; what is in flight for it is ordered before its next use."""
        self._free.append(row)
