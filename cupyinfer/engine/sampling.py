"""How the rows of one step are sampled, as arrays in the order of the logits rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupyinfer.engine.rows import RowTable
from cupyinfer.engine.sequence import Sequence


@dataclass(frozen=True)
class Special:
    """What goes beyond a temperature and a draw; N sampled rows, J biases. Arrays are None when no row needs them."""

    top_k: np.ndarray | None = None  # [N] int32; the three filters come together
    top_p: np.ndarray | None = None  # [N] float32
    min_p: np.ndarray | None = None  # [N] float32
    penalty_rows: np.ndarray | None = None  # [N] int32 row of the token counts, or -1; the penalties come together
    repetition: np.ndarray | None = None  # [N] float32
    presence: np.ndarray | None = None  # [N] float32
    frequency: np.ndarray | None = None  # [N] float32
    fresh: tuple[tuple[int, Sequence], ...] = ()  # (row, sequence) whose token counts must be filled first
    bias_rows: np.ndarray | None = None  # [J] int32 index of the logits row
    bias_ids: np.ndarray | None = None  # [J] int32
    bias_values: np.ndarray | None = None  # [J] float32
    num_logprobs: int = -1  # most alternatives that a row asks for; -1: no log-probabilities at all
    wanted: np.ndarray | None = None  # [N] int32 alternatives each row asks for, or -1

    @property
    def adjusts(self) -> bool:
        """The logits are changed before the draw."""
        return self.penalty_rows is not None or self.bias_rows is not None


@dataclass(frozen=True)
class Sampling:
    """Every row's draw: softmax(logits / temperature), keyed by (seed, step)."""

    rows: np.ndarray  # [N] int32 row of the sampling state
    steps: np.ndarray  # [N] int32 index of the token in its sequence's output
    seeds: np.ndarray  # [N] uint64
    temperature: np.ndarray  # [N] float32; 0: greedy
    special: Special | None = None


def build_sampling(rows: RowTable, sampled: list[Sequence], ids: np.ndarray, steps: np.ndarray) -> Sampling:
    """``sampled[n]`` sits in row ``ids[n]`` of the table and gets output token number ``steps[n]``."""
    special = _special(rows, sampled, ids, steps) if rows.special[ids].any() else None
    return Sampling(ids, steps, rows.seed[ids], rows.temperature[ids], special)


def _special(rows: RowTable, sampled: list[Sequence], ids: np.ndarray, steps: np.ndarray) -> Special | None:
    fields: dict = {}
    if rows.filtered[ids].any():
        fields |= {"top_k": rows.top_k[ids], "top_p": rows.top_p[ids], "min_p": rows.min_p[ids]}
    penalized = rows.penalized[ids]
    if penalized.any():
        first = penalized & (steps == rows.literal_len[ids] - rows.prompt_len[ids])
        fields |= {
            "penalty_rows": np.where(penalized, ids, np.int32(-1)),
            "repetition": rows.repetition_penalty[ids],
            "presence": rows.presence_penalty[ids],
            "frequency": rows.frequency_penalty[ids],
            "fresh": tuple((int(ids[n]), sampled[n]) for n in np.flatnonzero(first)),
        }
    biased = np.flatnonzero(steps < rows.biased_until[ids])
    if len(biased):
        fields |= _biases(rows, biased, ids, steps)
    wanted = rows.num_logprobs[ids]
    if wanted.max() >= 0:
        fields |= {"num_logprobs": int(wanted.max()), "wanted": wanted}
    return Special(**fields) if fields else None


def _biases(rows: RowTable, biased: np.ndarray, ids: np.ndarray, steps: np.ndarray) -> dict:
    """logit_bias of each row, and -inf for the ids that min_tokens forbids."""
    where, tokens, values = [], [], []
    for n in biased.tolist():
        row = ids[n]
        bias, masked = rows.bias[row], rows.masked[row]
        if bias is not None:
            tokens.append(bias[0])
            values.append(bias[1])
            where.append(np.full(len(bias[0]), n, np.int32))
        if masked is not None and steps[n] < rows.min_tokens[row]:
            tokens.append(masked)
            values.append(np.full(len(masked), -np.inf, np.float32))
            where.append(np.full(len(masked), n, np.int32))
    return {
        "bias_rows": np.concatenate(where),
        "bias_ids": np.concatenate(tokens),
        "bias_values": np.concatenate(values),
    }
