"""The arrays of a step against a slow loop, and the scheduler's order."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import fake_engine

from cupyinfer.engine.batch import build_batch, idle_batch
from cupyinfer.engine.scheduler import NeedsCollect
from cupyinfer.engine.sequence import Sequence, derive_seed
from cupyinfer.sampling_params import SamplingParams


def add(engine, name: str, length: int, max_tokens: int = 20, **params) -> None:
    prompt = np.random.default_rng(length).integers(0, 90, length).tolist()
    engine.add_request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params))


def names(sequences) -> list[str]:
    return [s.request_id for s in sequences]


def slow_batch(step, block_size):
    """Token by token: (id or None where the device has it, row, position, slot) of each."""
    tokens = []
    parts = [(s, start, 1) for s, start in zip(step.decodes, step.starts, strict=True)]
    parts += [(c.sequence, c.start, c.count) for c in step.chunks]
    for sequence, start, count in parts:
        for position in range(start, start + count):
            on_device = position >= sequence.literal_len
            slot = sequence.pages[position // block_size] * block_size + position % block_size
            row = sequence.row if on_device else -1
            tokens.append((0 if on_device else sequence.tokens[position], row, position, slot))
    return tokens, parts


def test_every_array_of_mixed_steps():
    engine = fake_engine(2, max_num_batched_tokens=48, block_size=8)
    for i, length in enumerate((1, 3, 30, 100, 1, 8, 17)):
        add(engine, str(i), length, prompt_logprobs=0 if i == 3 else None)
    kinds = set()
    for _ in range(12):
        step = engine.scheduler.schedule()
        batch = build_batch(step, engine.rows, 8)
        tokens, parts = slow_batch(step, 8)
        got = zip(
            *(a.tolist() for a in (batch.token_ids, batch.token_rows, batch.positions, batch.slot_mapping)), strict=True
        )
        assert list(got) == tokens
        assert batch.query_start.tolist() == np.cumsum([0] + [n for _, _, n in parts]).tolist()
        assert batch.context_lens.tolist() == [start + n for _, start, n in parts]
        for table, (sequence, start, n) in zip(batch.block_tables, parts, strict=True):
            used = -(-(start + n) // 8)
            assert table[:used].tolist() == sequence.pages[:used]
        ends = batch.query_start[1:] - 1
        sampling = [True] * len(step.decodes) + [c.samples for c in step.chunks]
        assert batch.logits_indices[: len(batch.sampled)].tolist() == ends[np.array(sampling, bool)].tolist()
        assert batch.sampled == [s for (s, _, _), samples in zip(parts, sampling, strict=True) if samples]
        scored = batch.positions[batch.logits_indices[len(batch.sampled) :]].tolist()
        assert scored == [p for _, positions in batch.scored for p in positions]
        assert batch.sampling.rows.tolist() == [s.row for s in batch.sampled]
        assert batch.sampling.steps.tolist() == [s.length - 1 - s.prompt_len for s in batch.sampled]
        assert all(a.dtype == np.int32 for a in (batch.token_ids, batch.slot_mapping, batch.logits_indices))
        assert batch.block_tables.flags.c_contiguous
        kinds.add((bool(step.decodes), bool(step.chunks), bool(batch.scored), batch.pure_decode))
        for sequence in batch.sampled:  # as if the step's tokens had come back
            sequence.pending -= 1
            sequence.tokens.append(7)
    assert {(True, True, True, False), (True, True, False, False)} <= kinds or len(kinds) >= 3


def test_older_requests_go_first_and_the_budget_is_kept():
    engine = fake_engine(max_num_batched_tokens=20, max_num_seqs=4)
    for i in range(6):
        add(engine, str(i), 8)
    step = engine.scheduler.schedule()
    assert step.num_tokens == 20 and [(c.sequence.request_id, c.count) for c in step.chunks] == [
        ("0", 8),
        ("1", 8),
        ("2", 4),
    ]
    step = engine.scheduler.schedule()
    assert names(step.decodes) == ["0", "1"] and [c.count for c in step.chunks] == [4, 8]
    assert names(engine.scheduler.waiting) == ["4", "5"], "rows are the limit"


def test_the_youngest_is_preempted_and_comes_back_first():
    engine = fake_engine(
        context=64, block_size=8, num_gpu_blocks_override=8, max_num_seqs=4, enable_prefix_caching=False
    )
    scheduler = engine.scheduler
    for i in range(4):
        add(engine, str(i), 15, 40)
    scheduler.schedule()
    assert names(scheduler.running) == ["0", "1", "2", "3"] and engine.pool.ledger.available == 0
    scheduler.schedule()  # the 16th token of each still fits
    for sequence in scheduler.running:
        sequence.pending -= 2
        sequence.tokens.extend([1, 1])
    with pytest.raises(NeedsCollect):
        scheduler.schedule(may_preempt=False)
    scheduler.check()
    step = scheduler.schedule()
    assert names(step.decodes) == ["0", "1"] and not step.chunks
    assert names(scheduler.waiting) == ["2", "3"] and scheduler.preemptions == 2
    scheduler.check()


def test_idle_batches():
    pad = idle_batch(decodes=3)
    assert pad.pure_decode and pad.slot_mapping.tolist() == [-1] * 3 and not pad.context_lens.any()
    prompts = idle_batch([5, 2], logits_rows=4)
    assert prompts.positions.tolist() == [0, 1, 2, 3, 4, 0, 1] and prompts.query_start.tolist() == [0, 5, 7]
    assert not prompts.pure_decode and prompts.max_query_len == 5 and len(prompts.logits_indices) == 4


def test_derived_seeds_are_spread():
    seeds = {derive_seed(s, i) for s in range(10) for i in range(100)}
    assert len(seeds) == 1000 and max(seeds) < 1 << 64
    assert bin(derive_seed(0, 0) ^ derive_seed(0, 1)).count("1") > 15


def test_sequence_slices():
    sequence = Sequence("r", 0, [4, 5, 6], SamplingParams(), seed=0, max_len=9, stop_ids=frozenset(), arrival=0.0)
    part = sequence.slice(1, 3)
    sequence.tokens.append(7)  # the copy does not keep the tokens from growing
    assert part.tolist() == [5, 6] and part.dtype == np.int32 and sequence.output == [7] and sequence.num_output == 1
