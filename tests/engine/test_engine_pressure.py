"""Many requests over few pages: nothing is lost, leaked or changed by its neighbours (property test)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from fake_model import EOS, VOCAB, FakeModel, alone, fake_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupyinfer.engine.engine import LLMEngine
from cupyinfer.sampling_params import SamplingParams

PAGES, REQUESTS = 40, 64


@dataclass
class Outcome:
    prompt: list[int]
    params: SamplingParams
    tokens: list[list[int]]
    reasons: list[str | None] = field(default_factory=list)


def random_params(rng: np.random.Generator) -> SamplingParams:
    max_tokens = int(rng.integers(1, 60))
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.0, 0.7, 1.5])),
        max_tokens=max_tokens,
        min_tokens=int(rng.integers(0, max_tokens)) if rng.random() < 0.3 else 0,
        ignore_eos=bool(rng.random() < 0.6),
        stop_token_ids=[11] if rng.random() < 0.2 else [],
        seed=int(rng.integers(0, 1 << 62)),
        n=int(rng.integers(2, 4)) if rng.random() < 0.1 else 1,
    )


def random_requests(rng: np.random.Generator) -> list[Outcome]:
    """Prompts that begin with one of a few prefixes; some are a prefix exactly, some the same as another."""
    prefixes = [rng.integers(0, VOCAB, n).tolist() for n in (0, 16, 33, 64, 90)]
    requests = []
    for _ in range(REQUESTS):
        params = random_params(rng)
        prompt = list(prefixes[rng.integers(len(prefixes))])
        if not prompt or rng.random() < 0.8:
            prompt += rng.integers(0, VOCAB, int(rng.integers(1, 40))).tolist()
        requests.append(Outcome(prompt, params, [[] for _ in range(params.n)], [None] * params.n))
    return requests


def check_invariants(engine: LLMEngine) -> None:
    engine.scheduler.check(tuple(engine.pool.pinned_pages))


def disturb(engine: LLMEngine, rng: np.random.Generator, open_ids: list[int], take) -> None:
    """Between two steps: sometimes abort a request, end one as a stop string would, or compact the pool."""
    if open_ids and rng.random() < 0.05:
        take(engine.abort(str(rng.choice(open_ids))))
    if open_ids and rng.random() < 0.05:
        update = engine.finish_sequence(str(rng.choice(open_ids)), 0, "a stop string")
        take([update] if update else [])
    if rng.random() < 0.05:
        engine.compact()


def drive(engine: LLMEngine, requests: list[Outcome], rng: np.random.Generator) -> None:
    """Add requests over time and step to the end, checking the books after every step."""

    def take(updates):
        for update in updates:
            outcome = requests[int(update.request_id)]
            assert outcome.reasons[update.index] is None, "news of a sequence that has ended"
            outcome.tokens[update.index] += update.token_ids
            outcome.reasons[update.index] = update.finish_reason

    added = 0
    while added < len(requests) or engine.has_unfinished():
        while added < len(requests) and rng.random() < 0.7:
            engine.add_request(str(added), requests[added].prompt, requests[added].params)
            added += 1
        take(engine.step())
        check_invariants(engine)
        disturb(engine, rng, [i for i in range(added) if None in requests[i].reasons], take)
        check_invariants(engine)


def check_outcome(outcome: Outcome) -> None:
    for index, (tokens, reason) in enumerate(zip(outcome.tokens, outcome.reasons, strict=True)):
        want, end = alone(outcome.prompt, outcome.params, outcome.params.seed + index)
        if reason == end and len(tokens) == len(want):
            assert tokens == want
        else:  # ended from outside: what there is must be right
            assert reason in ("abort", "stop") and tokens == want[: len(tokens)]


@pytest.mark.parametrize("depth", [1, 2])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1 << 32),
    block_size=st.sampled_from([8, 16]),
    rows=st.sampled_from([1, 3, 16, 32]),
    budget=st.sampled_from([32, 47, 200]),
    caching=st.booleans(),
)
def test_every_request_gets_its_tokens(depth, seed, block_size, rows, budget, caching):
    rng = np.random.default_rng(seed)
    engine = fake_engine(
        depth,
        context=PAGES * block_size,
        block_size=block_size,
        num_gpu_blocks_override=PAGES,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
    )
    requests = random_requests(rng)
    drive(engine, requests, rng)
    for outcome in requests:
        check_outcome(outcome)
    usage = engine.pool.usage().pages
    assert usage.used == 0 and usage.free + usage.cached == PAGES
    stats = engine.stats()
    assert stats.running == stats.waiting == 0 and stats.requests == REQUESTS
    engine.prefix.clear()
    assert engine.pool.usage().pages.free == PAGES


@pytest.mark.parametrize("depth", [1, 2])
def test_pressure_really_preempts_shares_and_evicts(depth):
    """The property above would be empty if the pool never ran out."""
    engine = fake_engine(depth, context=320, block_size=8, num_gpu_blocks_override=PAGES, max_num_seqs=32)
    rng = np.random.default_rng(0)
    requests = random_requests(rng)
    drive(engine, requests, rng)
    stats = engine.stats()
    assert stats.preemptions > 5 and stats.prefix_hit_tokens > 100 and engine.prefix.stats.evicted_pages > 50
    assert stats.pages_high_water == PAGES
    assert isinstance(engine.runner.model, FakeModel) and max(s.num_decodes for s in engine.runner.model.steps) > 8
    assert any(0 < s.num_decodes < s.num_sequences for s in engine.runner.model.steps), "no mixed step"
    assert EOS < VOCAB
