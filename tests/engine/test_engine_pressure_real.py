"""The pressure property over real attention, with every way to sample: each request as if it were alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cupyinfer.config import EngineConfig
from cupyinfer.engine.engine import LLMEngine
from cupyinfer.engine.loading import load_engine
from cupyinfer.engine.runner import Runner
from cupyinfer.runtime.arena import Arena
from cupyinfer.sampling_params import SamplingParams

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PAGES, REQUESTS, CONTEXT = 40, 64, 320


def engine_of(name: str, depth: int = 1, **settings) -> LLMEngine:
    """A float32 engine on the CPU; ``depth`` 2 launches one step ahead, as on a GPU."""
    config = EngineConfig.make(model=str(GOLDEN / name), device="cpu", max_model_len=CONTEXT, **settings)
    engine = load_engine(config)[0]
    plan, old = replace(engine.plan, depth=depth), engine.runner
    runner = Runner(old.model, old.vocab_size, plan, old.device, engine.pool.kv_caches, Arena(np))
    return LLMEngine(runner, engine.pool, plan, tuple(engine.eos_token_ids))


def random_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    some = lambda share: rng.random() < share
    count = int(rng.choice([1, 5, 20, 60]))
    wish: dict = {"max_tokens": count, "temperature": float(rng.choice([0, 0, 0.7, 1.5])), "ignore_eos": some(0.8)}
    wish["seed"] = int(rng.integers(1 << 62))
    wish |= {"top_k": int(rng.choice([1, 5, 50]))} if some(0.3) else {}
    wish |= {"top_p": float(rng.choice([0.1, 0.9, 0.99]))} if some(0.3) else {}
    wish |= {"min_p": 0.05} if some(0.2) else {}
    wish |= {"repetition_penalty": float(rng.choice([1.3, 0.8]))} if some(0.3) else {}
    wish |= {"presence_penalty": float(rng.choice([-2, 0.5]))} if some(0.2) else {}
    wish |= {"frequency_penalty": float(rng.choice([-1, 0.3]))} if some(0.2) else {}
    wish |= {"logit_bias": {5: 3.0, 7: -100.0, 9: -math.inf}} if some(0.2) else {}
    wish |= {"min_tokens": int(rng.integers(0, count + 1))} if some(0.3) else {}
    wish |= {"stop_token_ids": rng.integers(0, vocab, 6).tolist()} if some(0.3) else {}
    wish |= {"logprobs": int(rng.choice([0, 1, 5, 20]))} if some(0.3) else {}
    wish |= {"prompt_logprobs": int(rng.choice([0, 1, 5, 20]))} if some(0.3) else {}
    return SamplingParams(**wish, n=int(rng.choice([2, 8])) if some(0.1) else 1)


def random_requests(rng: np.random.Generator, vocab: int) -> list[tuple[str, list[int], SamplingParams]]:
    prefixes = [rng.integers(3, vocab, n).tolist() for n in (0, 16, 33, 64, 100)]
    prompts = [
        prefixes[rng.integers(5)] + rng.integers(3, vocab, rng.integers(1, 40)).tolist() for _ in range(REQUESTS)
    ]
    return [(str(i), prompt, random_params(rng, vocab)) for i, prompt in enumerate(prompts)]


def drive(engine: LLMEngine, requests, rng: np.random.Generator | None = None) -> tuple[dict, set[str]]:
    """({(request, sequence): [tokens, reason, logprobs, prompt logprobs]}, aborted requests); aborts need ``rng``."""
    news: dict[tuple[str, int], list] = {}
    waiting, aborted = list(requests), set()

    def take(updates) -> None:
        for u in updates:
            seen = news.setdefault((u.request_id, u.index), [[], None, [], None])
            assert seen[1] is None, "news of a sequence that has ended"
            seen[0] += u.token_ids
            seen[1], seen[2] = u.finish_reason, seen[2] + (u.logprobs or [])
            seen[3] = u.prompt_logprobs or seen[3]

    while waiting or engine.has_unfinished():
        while waiting and (rng is None or rng.random() < 0.9):
            engine.add_request(*waiting.pop(0))
        take(engine.step())
        engine.scheduler.check()
        if rng is not None and rng.random() < 0.02:
            victim = str(rng.integers(REQUESTS - len(waiting)))
            updates = engine.abort(victim)
            take(updates)
            aborted |= {victim} if updates else set()
    return news, aborted


def check_logprobs(got, want) -> None:
    """The same tokens with nearly the same values, position by position."""
    assert len(got or []) == len(want or [])
    for a, b in zip(got or [], want or [], strict=True):
        if b is None:
            assert a is None
            continue
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[t].logprob for t in b], [b[t].logprob for t in b], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name, seed", [("llama", 0), ("gemma3", 1), ("qwen3-moe", 2)])
def test_every_request_gets_what_it_gets_alone(name, seed, depth):
    rng = np.random.default_rng(seed)
    roomy = engine_of(name, max_num_seqs=8, enable_prefix_caching=False, num_gpu_blocks_override=1000)
    tight = engine_of(
        name, depth, max_num_seqs=32, max_num_batched_tokens=47, block_size=8, num_gpu_blocks_override=PAGES
    )
    requests = random_requests(rng, roomy.vocab_size)
    want = {key: value for request in requests for key, value in drive(roomy, [request])[0].items()}
    got, aborted = drive(tight, requests, rng)
    for key, (tokens, reason, logprobs, prompt_logprobs) in want.items():
        if key[0] in aborted:
            assert got.get(key, [[]])[0] == tokens[: len(got.get(key, [[]])[0])]
            continue
        assert got[key][:2] == [tokens, reason], requests[int(key[0])]
        check_logprobs(got[key][2], logprobs)
        check_logprobs(got[key][3], prompt_logprobs)
    stats = tight.stats()
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 100 and aborted
    assert stats.pages_used == 0 and tight.prefix.clear() == stats.pages_cached
    assert tight.pool.usage().pages.free == PAGES
