"""What a request may ask for, and what the engine answers: over a fake model, one step at a time and one ahead."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import EOS, VOCAB, alone, fake_engine, logits_after, run

from cupyinfer.errors import RequestError
from cupyinfer.sampling_params import SamplingParams

PROMPT = [5, 9, 2, 61, 7]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(params=[1, 2], ids=["depth1", "depth2"])
def depth(request):
    return request.param


def one(engine, prompt, params) -> tuple[list[int], str]:
    engine.add_request("r", prompt, params)
    return run(engine)["r", 0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


# --- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], {}, "prompt is empty"),
        ([1, VOCAB], {}, rf"prompt_token_ids\[1\]={VOCAB} is not allowed; allowed: token ids from 0 to {VOCAB - 1}"),
        ([-1], {}, r"prompt_token_ids\[0\]=-1"),
        ([1.5], {}, "flat list"),
        ([True, False], {}, "flat list"),
        ([[1, 2], [3, 4]], {}, "flat list"),
        ([[1, 2], [3]], {}, "flat list"),
        (["a"], {}, "flat list"),
        ([1] * 640, {}, "has 640 tokens; allowed: at most 639"),
        ([1], {"stop_token_ids": [VOCAB]}, f"stop_token_ids={VOCAB}"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    ],
)
def test_a_bad_request_is_refused_and_disturbs_nobody(prompt, params, message):
    engine = fake_engine()
    engine.add_request("good", PROMPT, GREEDY)
    engine.step()
    with pytest.raises(RequestError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**params))
    out = run(engine)
    assert list(out) == [("good", 0)] and engine.stats().requests == 1


@pytest.mark.parametrize(
    "wish", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 0}, {"prompt_logprobs": 1}]
)
def test_what_a_huge_vocabulary_rules_out_is_refused_at_once(wish, monkeypatch):
    engine = fake_engine()
    monkeypatch.setattr(engine.runner, "vocab_size", (1 << 18) + 1)
    with pytest.raises(RequestError, match="vocabulary of 262145 tokens; allowed: at most 262144"):
        engine.add_request("bad", PROMPT, SamplingParams(**wish))
    assert not engine.has_unfinished()
    assert one(engine, PROMPT, GREEDY) == alone(PROMPT, GREEDY)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wish", [{"temperature": 1e300}, {"temperature": 1.0, "repetition_penalty": 1e-300}])
def test_numbers_beyond_float32_are_taken_as_its_last_ones(wish):
    tokens, reason = one(fake_engine(), PROMPT, SamplingParams(max_tokens=12, ignore_eos=True, seed=1, **wish))
    assert len(tokens) == 12 and reason == "length"


def test_an_id_in_use_is_refused_and_free_again_afterwards():
    engine = fake_engine()
    engine.add_request("r", PROMPT, GREEDY)
    with pytest.raises(RequestError, match="'r' is in use"):
        engine.add_request("r", PROMPT, GREEDY)
    run(engine)
    assert one(engine, PROMPT, GREEDY) == alone(PROMPT, GREEDY)


def test_a_request_that_can_never_fit_is_refused():
    engine = fake_engine(num_gpu_blocks_override=40)
    engine.pool.shrink(10)
    with pytest.raises(RequestError, match="need 13 KV pages; allowed: at most 10 pages of 16 tokens"):
        engine.add_request("r", PROMPT, SamplingParams(max_tokens=200))
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=156, temperature=0, ignore_eos=True))
    assert len(run(engine)["r", 0][0]) == 156


# --- ends -----------------------------------------------------------------------------------------------------------
def test_length_and_context_end_a_sequence(depth):
    engine = fake_engine(depth, context=32)
    assert one(engine, PROMPT, GREEDY) == (alone(PROMPT, GREEDY)[0], "length")
    tokens, reason = one(engine, PROMPT, SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True))
    assert len(tokens) == 32 - len(PROMPT) and reason == "length"


def test_end_token_and_stop_token(depth):
    engine = fake_engine(depth)
    endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    prompt, free = next((p, t) for i in range(VOCAB) if EOS in (t := alone(p := [i, 9], endless)[0]))
    end = free.index(EOS)
    updates = []
    engine.add_request("r", prompt, SamplingParams(temperature=0, max_tokens=200))
    while engine.has_unfinished():
        updates += engine.step()
    assert [t for u in updates for t in u.token_ids] == free[: end + 1]
    assert (updates[-1].finish_reason, updates[-1].stop_reason) == ("stop", None) and updates[-1].request_finished
    stop = free[4]
    params = SamplingParams(temperature=0, max_tokens=99, stop_token_ids=[stop], ignore_eos=True)
    engine.add_request("s", prompt, params)
    updates = []
    while engine.has_unfinished():
        updates += engine.step()
    assert [t for u in updates for t in u.token_ids] == free[: free.index(stop) + 1]
    assert (updates[-1].finish_reason, updates[-1].stop_reason) == ("stop", stop)


def test_min_tokens_forbids_every_end(depth):
    params = SamplingParams(temperature=0.9, max_tokens=60, min_tokens=50, stop_token_ids=[8, 20], seed=4)
    tokens, _ = one(fake_engine(depth), PROMPT, params)
    assert tokens == alone(PROMPT, params, 4)[0] and len(tokens) > 50
    assert not {EOS, 8, 20} & set(tokens[:50])


def test_abort_at_every_moment(depth):
    for steps in range(8):
        engine = fake_engine(depth)
        engine.add_request("a", PROMPT * 30, SamplingParams(max_tokens=4, n=2, ignore_eos=True))
        engine.add_request("b", PROMPT, GREEDY)
        seen = [u for _ in range(steps) for u in engine.step()]
        updates = engine.abort("a")
        ended = {u.index for u in seen if u.request_id == "a" and u.finished}
        assert {u.index for u in updates} == {0, 1} - ended
        assert all(u.finish_reason == "abort" and not u.token_ids for u in updates)
        assert [u.request_finished for u in updates[-1:]] == [True] * bool(updates)
        engine.scheduler.check()
        assert engine.abort("a") == [] and engine.abort("unknown") == []
        tokens = [t for u in seen if u.request_id == "b" for t in u.token_ids]
        while engine.has_unfinished():
            news = engine.step()
            assert all(u.request_id == "b" for u in news)
            tokens += [t for u in news for t in u.token_ids]
        assert tokens == alone(PROMPT, GREEDY)[0]
        assert engine.pool.usage().pages.used == 0


def test_the_front_end_ends_one_sequence(depth):
    engine = fake_engine(depth)
    engine.add_request("r", PROMPT, SamplingParams(temperature=0, max_tokens=30, n=2, ignore_eos=True, seed=1))
    while not engine.step():
        pass
    update = engine.finish_sequence("r", 1, "END")
    assert (update.finish_reason, update.stop_reason, update.request_finished) == ("stop", "END", False)
    assert engine.finish_sequence("r", 1) is None and engine.finish_sequence("x", 0) is None
    out = run(engine)
    assert list(out) == [("r", 0)] and out["r", 0][1] == "length"


# --- sampling -------------------------------------------------------------------------------------------------------
def test_draws_depend_on_the_seed_alone(depth):
    params = SamplingParams(temperature=1.2, max_tokens=20, ignore_eos=True, seed=77)
    want = alone(PROMPT, params, 77)
    engine = fake_engine(depth)
    for i in range(5):
        engine.add_request(f"n{i}", [i + 1] * (i + 1), SamplingParams(temperature=1.0, max_tokens=9 * i + 1))
        engine.step()
    engine.add_request("r", PROMPT, params)
    assert run(engine)["r", 0] == want
    assert one(fake_engine(depth), PROMPT, params) == want


def test_n_sequences_use_neighbouring_seeds_and_share_the_prompt(depth):
    engine = fake_engine(depth)
    prompt = PROMPT * 10
    engine.add_request("r", prompt, SamplingParams(temperature=1.0, max_tokens=9, n=3, seed=(1 << 64) - 1))
    out = run(engine)
    for index in range(3):
        single = SamplingParams(temperature=1.0, max_tokens=9)
        assert out["r", index] == alone(prompt, single, ((1 << 64) - 1 + index) % (1 << 64))
    assert engine.stats().prefix_hit_tokens == 2 * 48 and engine.stats().prompt_tokens == 50 + 2 * 2


def test_requests_without_a_seed_are_reproducible_and_differ():
    free = SamplingParams(temperature=1.0, max_tokens=15, ignore_eos=True)
    outs = []
    for seed in (0, 0, 1):
        engine = fake_engine(seed=seed)
        engine.add_request("a", PROMPT, free)
        engine.add_request("b", PROMPT, free)
        out = run(engine)
        outs.append((out["a", 0], out["b", 0]))
    assert outs[0] == outs[1] != outs[2] and outs[0][0] != outs[0][1]


def test_penalties_count_prompt_and_output_also_after_a_preemption(depth):
    """Against a slow loop; a pool so small that sequences are computed again, and rows change hands."""
    params = SamplingParams(
        temperature=0,
        max_tokens=70,
        ignore_eos=True,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.3,
    )
    engine = fake_engine(depth, context=160, block_size=8, num_gpu_blocks_override=20, max_num_seqs=3)
    for i in range(6):
        engine.add_request(str(i), [i, i, 50], params if i % 2 == 0 else GREEDY)
    out = run(engine)
    assert engine.stats().preemptions > 0
    for i in (0, 2, 4):
        assert out[str(i), 0][0] == penalized([i, i, 50], params)
    assert out["1", 0] == alone([1, 1, 50], GREEDY)


def penalized(prompt: list[int], params: SamplingParams) -> list[int]:
    tokens = list(prompt)
    for _ in range(params.max_tokens):
        logits = logits_after(np.array(tokens))
        for token in set(tokens):
            factor = np.float32(params.repetition_penalty)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in tokens[len(prompt) :]:
            logits[token] -= np.float32(params.frequency_penalty)
        for token in set(tokens[len(prompt) :]):
            logits[token] -= np.float32(params.presence_penalty)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_bias_and_filters_in_one_batch(depth):
    engine = fake_engine(depth)
    engine.add_request("bias", PROMPT, SamplingParams(temperature=0, max_tokens=9, logit_bias={40: 99, 41: -9}))
    engine.add_request("top", PROMPT, SamplingParams(temperature=2, max_tokens=9, top_k=1, ignore_eos=True))
    engine.add_request("free", PROMPT, SamplingParams(temperature=0.5, max_tokens=9, ignore_eos=True, seed=3))
    out = run(engine)
    assert out["bias", 0][0] == [40] * 9
    assert out["top", 0][0] == alone(PROMPT, GREEDY)[0][:9]
    assert out["free", 0] == alone(PROMPT, SamplingParams(temperature=0.5, max_tokens=9, ignore_eos=True), 3)


# --- log-probabilities ----------------------------------------------------------------------------------------------
def test_logprobs_are_those_of_the_model(depth):
    """Also where a bias decided the token, and next to a row that asked for none."""
    engine = fake_engine(depth)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, logit_bias={40: 99})
    engine.add_request("r", PROMPT, params)
    engine.add_request("plain", PROMPT, GREEDY)
    rows = []
    while engine.has_unfinished():
        for update in engine.step():
            if update.request_id == "r":
                rows += update.logprobs
            else:
                assert update.logprobs is None
    tokens = list(PROMPT)
    assert len(rows) == 6
    for row in rows:
        logp = log_softmax(logits_after(np.array(tokens)))
        best = np.argsort(-logp)[:3].tolist()
        assert list(row) == [40, *(t for t in best if t != 40)]
        for token, entry in row.items():
            assert entry.logprob == pytest.approx(logp[token], abs=1e-5)
            assert entry.rank == 1 + int((logp > logp[token]).sum())
        tokens.append(40)


@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_in_slices_beside_other_work(depth, n):
    prompt = np.random.default_rng(0).integers(0, VOCAB, 150).tolist()
    engine = fake_engine(depth, max_num_batched_tokens=40, max_num_seqs=8)
    engine.add_request("first", prompt, GREEDY)
    run(engine)
    for i in range(5):
        engine.add_request(f"other{i}", [i + 1], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, ignore_eos=True, n=n)
    engine.add_request("r", prompt, params)
    got = {}
    while engine.has_unfinished():
        for update in engine.step():
            if update.prompt_logprobs is not None:
                got[update.request_id, update.index] = update.prompt_logprobs
    assert list(got) == [("r", 0)]
    rows = got["r", 0]
    assert len(rows) == 150 and rows[0] is None
    for position in range(1, 150):
        logp = log_softmax(logits_after(np.array(prompt[:position])))
        assert rows[position][prompt[position]].logprob == pytest.approx(logp[prompt[position]], abs=1e-5)
        assert 2 <= len(rows[position]) <= 3
    scored = [s for s in engine.runner.model.steps if len(s.logits_indices) > s.num_sequences]
    assert scored and max(len(s.logits_indices) for s in scored) <= engine.plan.logits_rows


def test_prompt_logprobs_survive_a_preemption():
    """Of a prompt that is half computed when its pages are taken away."""
    prompt = np.random.default_rng(1).integers(0, VOCAB, 60).tolist()
    engine = fake_engine(2, context=160, block_size=8, num_gpu_blocks_override=20, max_num_batched_tokens=16)
    engine.add_request("old", [1, 2], SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
    engine.step()
    old = engine.scheduler.running[0]
    while engine.pool.ledger.available > 8 or old.capacity - old.length > 2:
        engine.step()
    engine.add_request("r", prompt, SamplingParams(temperature=0, max_tokens=60, prompt_logprobs=0, ignore_eos=True))
    young = engine.scheduler.waiting[0]
    rows, tokens, begun = [], [], 0
    while engine.has_unfinished():
        for update in engine.step():
            if update.request_id == "r":
                begun = begun or young.preemptions
                rows += update.prompt_logprobs or []
                tokens += update.token_ids
    assert begun > 0, "preempted before its first token"
    assert len(rows) == 60 and tokens == alone(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))[0]
    for position in range(1, 60):
        logp = log_softmax(logits_after(np.array(prompt[:position])))
        assert rows[position][prompt[position]].logprob == pytest.approx(logp[prompt[position]], abs=1e-5)


# --- sharing and statistics -----------------------------------------------------------------------------------------
def test_prefix_hits_are_counted_and_leave_one_token(depth):
    engine = fake_engine(depth)
    prompt = np.random.default_rng(2).integers(0, VOCAB, 64).tolist()
    assert one(engine, prompt, GREEDY) == alone(prompt, GREEDY)
    engine.add_request("again", prompt, GREEDY)  # four full pages, of which the last must be computed
    updates = []
    while engine.has_unfinished():
        updates += engine.step()
    assert [t for u in updates for t in u.token_ids] == alone(prompt, GREEDY)[0]
    assert updates[0].cached_tokens == 48
    stats = engine.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens, stats.prefix_hit_rate) == (128, 48, 0.375)
    longer = prompt + alone(prompt, GREEDY)[0] + [1, 2, 3, 4, 5]  # the next turn of a conversation: output is found too
    engine.add_request("turn", longer, GREEDY)
    assert run(engine)["turn", 0] == alone(longer, GREEDY)
    assert engine.stats().prefix_hit_tokens == 48 + 64
    off = fake_engine(depth, enable_prefix_caching=False)
    assert one(off, prompt, GREEDY) == one(off, prompt, GREEDY) and off.stats().prefix_hit_tokens == 0


def test_the_same_page_after_another_prefix_is_another_page(depth):
    engine = fake_engine(depth)
    one_page, other = np.random.default_rng(4).integers(0, VOCAB, (2, 16)).tolist()
    for prompt in (one_page + other + [9], other + one_page + [9]):
        assert one(engine, prompt, GREEDY) == alone(prompt, GREEDY)
    assert engine.stats().prefix_hit_tokens == 0


def test_a_page_whose_last_token_was_never_computed_is_not_found(depth):
    """A sequence that ends with its page: the keys and values of the last token are missing."""
    engine = fake_engine(depth)
    params = SamplingParams(temperature=0, max_tokens=32 - len(PROMPT), ignore_eos=True)
    tokens, _ = one(engine, PROMPT, params)
    longer = PROMPT + tokens + [1, 2, 3]
    assert len(longer) == 35
    assert one(engine, longer, GREEDY) == alone(longer, GREEDY)
    assert engine.stats().prefix_hit_tokens == 16


def test_statistics_and_timing(depth):
    engine = fake_engine(depth, max_num_seqs=2)
    for i in range(3):
        engine.add_request(str(i), PROMPT, GREEDY)
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.requests) == (2, 1, 3) and stats.pages_used > 0
    last = {}
    while engine.has_unfinished():
        last.update({u.request_id: u for u in engine.step()})
    stats = engine.stats()
    assert stats.output_tokens == 36 and stats.pages_used == 0 and stats.steps >= 24
    for update in last.values():
        t = update.timing
        assert t.arrival <= t.first_scheduled <= t.first_token <= t.finished
        assert t.queue <= t.ttft and t.tpot(12) > 0 and t.tpot(1) == 0
    assert last["2"].timing.queue > last["0"].timing.queue


def test_a_prompt_longer_than_the_budget_shares_its_steps(depth):
    engine = fake_engine(depth, max_num_batched_tokens=32, max_num_seqs=4)
    engine.add_request("short", PROMPT, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    prompt = np.random.default_rng(3).integers(0, VOCAB, 200).tolist()
    engine.add_request("long", prompt, GREEDY)
    out = run(engine)
    assert out["long", 0] == alone(prompt, GREEDY)
    mixed = [s for s in engine.runner.model.steps if 0 < s.num_decodes < s.num_sequences]
    assert len(mixed) >= 5 and all(s.num_tokens <= 32 for s in engine.runner.model.steps)


def test_compaction_and_shrinking_under_way(depth):
    engine = fake_engine(depth, num_gpu_blocks_override=40)
    long = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    for i in range(4):
        engine.add_request(str(i), [i + 1] * 70, long if i == 3 else GREEDY)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(4)}
    while engine.stats().running + engine.stats().waiting != 1:
        for update in engine.step():
            tokens[update.request_id] += update.token_ids
    engine.compact()
    assert max(engine.scheduler.running[0].pages) < engine.pool.ledger.num_pages - engine.pool.usage().pages.free
    assert engine.compact(num_pages=12) == 28 * engine.pool.layout.page_bytes
    engine.scheduler.check()
    for update in run_updates(engine):
        tokens[update.request_id] += update.token_ids
    assert tokens["3"] == alone([4] * 70, long)[0]
    with pytest.raises(Exception, match="num_pages=0"):
        engine.compact(num_pages=0)


def run_updates(engine):
    while engine.has_unfinished():
        yield from engine.step()


def test_close_ends_everything(depth):
    engine = fake_engine(depth)
    engine.add_request("r", PROMPT, GREEDY)
    engine.step()
    engine.close()
    assert not engine.has_unfinished() and engine.pool.usage().pages.used == 0
