"""One step's arrays, complete when built.

Sequences that compute exactly one token and sample after it ("decodes") come first, then chunks of prompts. A decode's
token is the one that the step before sampled: the device still has it (``token_rows``), so the batch can be built
before the host has read it. Everything here is NumPy; the runner carries it to the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupyinfer.engine.rows import RowTable
from cupyinfer.engine.sampling import Sampling, build_sampling
from cupyinfer.engine.scheduler import Chunk, Schedule
from cupyinfer.engine.sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """T tokens of B sequences; N rows of logits, of which the first ``len(sampled)`` are sampled from.

    int32 arrays; fields as in :class:`cupyinfer.model.inputs.StepInputs`.
    """

    token_ids: np.ndarray  # [T]; 0 where token_rows says that the device knows the token
    token_rows: np.ndarray  # [T] row whose last token it is, or -1
    positions: np.ndarray  # [T]
    slot_mapping: np.ndarray  # [T]
    query_start: np.ndarray  # [B+1]
    context_lens: np.ndarray  # [B]
    block_tables: np.ndarray  # [B, W] W: pages of the longest sequence of the step
    logits_indices: np.ndarray  # [N]
    num_decodes: int
    max_query_len: int
    sampled: list[Sequence]  # whose next token the step samples, in the order of logits rows
    scored: list[tuple[Sequence, range]]  # (sequence, positions) whose logits follow, for prompt logprobs
    sampling: Sampling

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def pure_decode(self) -> bool:
        """Every sequence computes one token and samples: the step has the shape of a captured graph."""
        return self.num_decodes == len(self.context_lens) and not self.scored


def build_batch(step: Schedule, rows: RowTable, block_size: int) -> Batch:
    """The arrays of a schedule; ``rows`` holds the block tables of its sequences."""
    decodes, chunks = step.decodes, step.chunks
    seq_rows = np.array([s.row for s in decodes] + [c.sequence.row for c in chunks], np.int32)
    starts = np.array(step.starts + [c.start for c in chunks], np.int32)
    counts = np.array([c.count for c in chunks], np.int32)
    context_lens = starts + 1
    context_lens[len(decodes) :] += counts - 1
    width = (int(context_lens.max()) - 1) // block_size + 1
    if chunks:
        query_start, positions, owner = _spread(len(decodes), starts, counts)
        slots = _slots(rows.block_tables, seq_rows[owner], positions, block_size)
    else:
        query_start, positions = np.arange(len(decodes) + 1, dtype=np.int32), starts
        slots = _slots(rows.block_tables, seq_rows, positions, block_size)
    token_ids, token_rows = _tokens(step, rows, seq_rows, starts, query_start)
    samples = _sampling(decodes, chunks)
    sampled = decodes + [c.sequence for c in chunks if c.samples]
    sample_rows, lens = (seq_rows[samples], context_lens[samples]) if chunks else (seq_rows, context_lens)
    return Batch(
        token_ids=token_ids,
        token_rows=token_rows,
        positions=positions,
        slot_mapping=slots,
        query_start=query_start,
        context_lens=context_lens,
        block_tables=rows.block_tables[seq_rows, :width],
        logits_indices=_logits_indices(chunks, query_start, samples, len(decodes)),
        num_decodes=len(decodes),
        max_query_len=int(counts.max()) if chunks else 1,
        sampled=sampled,
        scored=[(c.sequence, c.scored) for c in chunks if c.scored],
        sampling=build_sampling(rows, sampled, sample_rows, lens - rows.prompt_len[sample_rows]),
    )


def _spread(num_decodes: int, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query_start [B+1], and for each token its position [T] and the sequence that owns it [T]."""
    lens = np.ones(len(starts), np.int32)
    lens[num_decodes:] = counts
    query_start = np.zeros(len(starts) + 1, np.int32)
    np.cumsum(lens, out=query_start[1:])
    owner = np.repeat(np.arange(len(starts), dtype=np.int32), lens)
    positions = np.arange(query_start[-1], dtype=np.int32) + (starts - query_start[:-1])[owner]
    return query_start, positions, owner


def _slots(tables: np.ndarray, token_rows: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Where each token's keys and values go: page * block_size + offset. block_size is a power of two."""
    slots = tables[token_rows, positions >> (block_size.bit_length() - 1)]
    slots *= block_size
    slots += positions & (block_size - 1)
    return slots


def _tokens(
    step: Schedule, rows: RowTable, seq_rows: np.ndarray, starts: np.ndarray, query_start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(token_ids, token_rows), both [T]: literal ids for prompts, rows of the device's last tokens for the rest."""
    decodes, n = step.decodes, len(step.decodes)
    token_ids = np.zeros(query_start[-1], np.int32)
    token_rows = np.full(query_start[-1], -1, np.int32)
    token_rows[:n] = seq_rows[:n]
    literal = starts[:n] < rows.literal_len[seq_rows[:n]]
    if literal.any():  # the end of a prompt that was cut, cached or preempted so that one token is left
        for i in np.flatnonzero(literal).tolist():
            token_ids[i], token_rows[i] = decodes[i].tokens[starts[i]], -1
    for chunk, begin in zip(step.chunks, query_start[n:-1].tolist(), strict=True):
        token_ids[begin : begin + chunk.count] = chunk.sequence.slice(chunk.start, chunk.start + chunk.count)
    return token_ids, token_rows


def _sampling(decodes: list[Sequence], chunks: list[Chunk]) -> list[int]:
    """Indices of the sequences that sample, in batch order."""
    return list(range(len(decodes))) + [i for i, c in enumerate(chunks, len(decodes)) if c.samples]


def _logits_indices(chunks: list[Chunk], query_start: np.ndarray, samples: list[int], num_decodes: int) -> np.ndarray:
    """Token rows whose logits are wanted: the last one of each sampling sequence, then the scored positions."""
    if not chunks:
        return query_start[:-1]
    scored = [
        np.arange(c.scored.start, c.scored.stop, dtype=np.int32) + (begin - c.start)
        for c, begin in zip(chunks, query_start[num_decodes:-1].tolist(), strict=True)
        if c.scored
    ]
    return np.concatenate([query_start[1:][samples] - 1, *scored]).astype(np.int32, copy=False)


def idle_batch(prompt_lens: list[int] | None = None, *, decodes: int = 0, logits_rows: int = 0) -> Batch:
    """A batch of no sequence's tokens, to size scratch and capture graphs: its keys and values are not kept.

    ``decodes`` padding rows, or prompts of ``prompt_lens`` tokens (attending to page 0) with ``logits_rows`` rows of
    logits.
    """
    lens = np.array(prompt_lens or [0] * decodes, np.int32)
    tokens = int(lens.sum()) or decodes
    query_start = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens if prompt_lens else np.ones_like(lens), out=query_start[1:])
    rows = logits_rows if prompt_lens else decodes
    return Batch(
        token_ids=np.zeros(tokens, np.int32),
        token_rows=np.full(tokens, -1, np.int32),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in (prompt_lens or [1] * decodes)]),
        slot_mapping=np.full(tokens, -1, np.int32),
        query_start=query_start,
        context_lens=lens,
        block_tables=np.zeros((len(lens), 1), np.int32),
        logits_indices=np.arange(rows, dtype=np.int32),
        num_decodes=0 if prompt_lens else decodes,
        max_query_len=int(lens.max()) if prompt_lens else 1,
        sampled=[],
        scored=[],
        sampling=Sampling(
            rows=np.full(decodes, -1, np.int32),
            steps=np.zeros(decodes, np.int32),
            seeds=np.zeros(decodes, np.uint64),
            temperature=np.zeros(decodes, np.float32),
        ),
    )
