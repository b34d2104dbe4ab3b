"""The whole engine over tiny real checkpoints: the tokens of Hugging Face transformers, under pressure too."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cupyinfer.config import EngineConfig
from cupyinfer.engine.engine import LLMEngine
from cupyinfer.engine.loading import load_engine
from cupyinfer.sampling_params import SamplingParams

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
LENGTHS = (1, 17, 300)


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


def engine_of(name: str, device: str, **settings) -> LLMEngine:
    settings = {"max_num_seqs": 32, "max_num_batched_tokens": 101, "dtype": "float32", **settings}
    return load_engine(EngineConfig.make(model=str(GOLDEN / name), device=device, **settings))[0]


def greedy(engine: LLMEngine, prompts: list[list[int]], count: int) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    while engine.has_unfinished():
        for update in engine.step():
            tokens[int(update.request_id)] += update.token_ids
        engine.scheduler.check()
    return tokens


def check_mixed(name: str, device: str, **settings) -> LLMEngine:
    """32 sequences of all prompt lengths; the same prompt comes again and again, so prefixes are shared as well."""
    data, engine = golden(name), engine_of(name, device, **settings)
    lengths = [LENGTHS[i % 3] for i in range(32)]
    tokens = greedy(engine, [data[f"prompt_{n}"].tolist() for n in lengths], 64)
    for i, n in enumerate(lengths):
        assert tokens[i] == data[f"tokens_{n}"].tolist(), f"{name}: sequence {i}, prompt of {n} tokens"
    assert engine.pool.usage().pages.used == 0
    return engine


def test_there_are_goldens():
    assert len(NAMES) == 12


@pytest.mark.parametrize("name", NAMES)
def test_mixed_batch(name):
    check_mixed(name, "cpu")


def test_mixed_batch_under_pressure():
    """40 pages: preemption, eviction and shared prefixes, over real attention."""
    engine = check_mixed("qwen3", "cpu", num_gpu_blocks_override=40, max_model_len=400)
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0


def test_an_engine_alone_gives_the_same():
    data = golden("llama")
    for n in LENGTHS:
        (tokens,) = greedy(engine_of("llama", "cpu", max_num_seqs=1), [data[f"prompt_{n}"].tolist()], 64)
        assert tokens == data[f"tokens_{n}"].tolist()


# --- on a GPU -------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_batch_on_the_gpu(name, eager):
    engine = check_mixed(name, "cuda", enforce_eager=eager, num_gpu_blocks_override=1200)
    assert (engine.stats().graph_replays == 0) is eager
    engine.close()


@pytest.mark.gpu
def test_pressure_on_the_gpu():
    engine = check_mixed("qwen3", "cuda", num_gpu_blocks_override=40, max_model_len=400)
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0 and stats.graph_replays > 0
    assert stats.pages_total == 40
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
def test_graphs_give_bit_for_bit_what_eager_gives(name, dtype, cupy):
    """Tokens, log-probabilities and the KV pages themselves; plain rows and rows that sample outside the graph."""
    seen = []
    for eager in (True, False):
        engine = engine_of(name, "cuda", dtype=dtype, enforce_eager=eager, num_gpu_blocks_override=300)
        seen.append((varied_requests(engine), [cache.get() for cache in engine.pool.kv_caches]))
        replays = engine.stats().graph_replays
        assert (replays == 0) if eager else (replays > 50)
        engine.close()
    (eager_news, eager_pages), (graph_news, graph_pages) = seen
    assert eager_news == graph_news
    for a, b in zip(eager_pages, graph_pages, strict=True):
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8))


def varied_requests(engine: LLMEngine) -> dict:
    """{request: [(tokens, logprobs)]} of requests that use every way to sample, some alone in their steps."""
    base = {"max_tokens": 40, "ignore_eos": True, "seed": 5}
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05, "logprobs": 4},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
        {"temperature": 0.5, "logit_bias": {9: 3.0}, "min_tokens": 10, "stop_token_ids": [4]},
        {"temperature": 1.0, "prompt_logprobs": 2, "logprobs": 0},
    ]
    news: dict[str, list] = {}
    rng = np.random.default_rng(0)
    for phase in (kinds[:2], kinds, kinds[4:5]):
        for i, kind in enumerate(phase):
            prompt = rng.integers(3, 150, int(rng.integers(1, 90))).tolist()
            engine.add_request(f"{len(news)}-{i}", prompt, SamplingParams(**(base | kind)))
        while engine.has_unfinished():
            for u in engine.step():
                news.setdefault(u.request_id, []).append((u.token_ids, u.logprobs, u.prompt_logprobs))
    return news


@pytest.mark.gpu
def test_varied_requests_on_the_gpu_as_on_the_cpu():
    """float32 draws agree with the NumPy path, row by row."""
    cpu, gpu = (engine_of("llama", device, num_gpu_blocks_override=300) for device in ("cpu", "cuda"))
    want, got = varied_requests(cpu), varied_requests(gpu)
    for request, rows in want.items():
        assert [row[0] for row in got[request]] == [row[0] for row in rows], request
    gpu.close()


@pytest.mark.gpu
def test_shrinking_the_pool_recaptures(cupy):
    data, engine = golden("llama"), engine_of("llama", "cuda", num_gpu_blocks_override=300)
    want = data["tokens_17"].tolist()
    engine.add_request("a", data["prompt_17"].tolist(), SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    tokens = [t for _ in range(20) for u in engine.step() for t in u.token_ids]
    assert engine.compact(num_pages=40) == 260 * engine.pool.layout.page_bytes
    while engine.has_unfinished():
        tokens += [t for u in engine.step() for t in u.token_ids]
    assert tokens == want
    engine.close()


@pytest.mark.gpu
def test_out_of_memory_at_the_start_is_one_clear_error(cupy):
    from cupyinfer.errors import OutOfMemoryError

    with pytest.raises(OutOfMemoryError, match="KV pages need .* lower"):
        engine_of("llama", "cuda", num_gpu_blocks_override=1 << 30)
    with pytest.raises(OutOfMemoryError, match="raise gpu_memory_utilization"):
        engine_of("llama", "cuda", gpu_memory_utilization=1e-6)
