"""What one forward step reads, complete when built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from cupyinfer.types import Array


class Decodes(NamedTuple):
    """The sequences of a step that have exactly one query token: rows 0 to B-1 of the token axis."""

    block_tables: Array  # [B, M]
    context_lens: Array  # [B]


class Prefills(NamedTuple):
    """The other sequences. ``query_start`` counts rows of the whole token axis."""

    block_tables: Array  # [B, M]
    query_start: Array  # [B+1]
    context_lens: Array  # [B]
    max_query_len: int


@dataclass(frozen=True)
class StepInputs:
    """The arrays of one step, int32, on the model's device. T tokens, B sequences, M pages a sequence, N logit rows.

    Sequences with one query token come first, so their tokens are the first ``num_decodes`` of the token axis.
    A padding row has context length 0 and slot -1.
    """

    token_ids: Array  # [T]; read where token_rows is negative
    token_rows: Array  # [T] row of last_tokens that holds the token, or -1
    positions: Array  # [T] of the token in its sequence
    slot_mapping: Array  # [T] page * block_size + offset; -1: keys and values are not kept
    query_start: Array  # [B+1] first token row of each sequence
    context_lens: Array  # [B] tokens of each sequence once the step's are appended
    block_tables: Array  # [B, M] page ids
    logits_indices: Array  # [N] token rows whose logits are wanted
    last_tokens: Array  # [R] last sampled token of each row of the sampling state
    num_decodes: int
    max_query_len: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lens.shape[0]

    @cached_property
    def decodes(self) -> Decodes | None:
        """Views on the decode sequences, or None."""
        n = self.num_decodes
        return Decodes(self.block_tables[:n], self.context_lens[:n]) if n else None

    @cached_property
    def prefills(self) -> Prefills | None:
        """Views on the other sequences, or None."""
        n = self.num_decodes
        if n == self.num_sequences:
            return None
        return Prefills(self.block_tables[n:], self.query_start[n:], self.context_lens[n:], self.max_query_len)
