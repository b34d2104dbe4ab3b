"""The three workloads that engines are compared by: a decode grid, prefill, and a whole offline batch.

TPOT is measured from outside, as (time for all output tokens - time for one) / (tokens - 1), each the best of
``rounds``; the percentiles are those of single engine steps in the decode phase.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass, field

import numpy as np

from cupyinfer.api import LLM
from cupyinfer.bench.roofline import Roofline, Weights, decode_cost, prefill_cost
from cupyinfer.model.config import ModelConfig
from cupyinfer.runtime.timing import Samples
from cupyinfer.sampling_params import SamplingParams


@dataclass(frozen=True)
class Result:
    """One line of the report. ``value`` in ``unit``; ``roofline`` is the share of the measured ceiling, 0 to 1."""

    workload: str
    value: float
    unit: str
    roofline: float
    steps: dict[str, float] = field(default_factory=dict)  # ms of one engine step: median, p10, p90, p99
    details: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """What every workload needs: the engine, its shape, and the machine's ceilings."""

    llm: LLM
    config: ModelConfig
    weights: Weights
    roofline: Roofline
    itemsize: int
    rounds: int = 2

    def prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Random prompts; a new seed for each round, so that the prefix cache has nothing to offer."""
        rng = np.random.default_rng(seed)
        return rng.integers(0, min(10_000, self.config.vocab_size), (count, length)).tolist()


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[float, list[float]]:
    """(seconds for everything, end time of each step in seconds since the start)."""
    engine = llm.engine
    start = time.perf_counter()
    for i, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(f"bench-{start}-{i}", prompt, param)
    ends = []
    while engine.has_unfinished():
        engine.step()
        ends.append(time.perf_counter() - start)
    return ends[-1], ends


def decode(bench: Bench, batch: int, prompt: int, out: int) -> Result:
    """TPOT in ms of ``batch`` sequences decoding ``out`` tokens after prompts of ``prompt`` tokens, greedy."""
    ones: list[float] = []
    totals: list[float] = []
    tail: list[float] = []
    run(bench.llm, bench.prompts(batch, prompt, 0), [_greedy(4)] * batch)  # compile, capture, touch the memory
    for round_ in range(bench.rounds):
        one, _ = run(bench.llm, bench.prompts(batch, prompt, 2 * round_ + 1), [_greedy(1)] * batch)
        total, ends = run(bench.llm, bench.prompts(batch, prompt, 2 * round_ + 2), [_greedy(out)] * batch)
        ones.append(one)
        totals.append(total)
        tail.extend(np.diff(ends[-(out - 1) :]))
    steps = Samples(tuple(tail))
    # where other programs disturb the prompts' part, the difference can be anything: no step was faster than this
    tpot = max((min(totals) - min(ones)) / (out - 1), steps.percentile(10))
    cost = decode_cost(bench.config, bench.weights, batch, prompt + out / 2, bench.itemsize)
    share = bench.roofline.seconds(*cost) / tpot
    name = f"decode batch {batch}, prompt {prompt}, out {out}"
    return Result(name, tpot * 1e3, "ms TPOT", share, steps.summary(), {"tokens/s": batch / tpot})


def prefill(bench: Bench, count: int, length: int) -> Result:
    """Prompt tokens per second of ``count`` prompts of ``length`` tokens, one output token each."""
    seconds = []
    for round_ in range(bench.rounds + 1):  # the first round compiles and warms up
        total, _ = run(bench.llm, bench.prompts(count, length, 100 + round_), [_greedy(1)] * count)
        seconds.append(total)
    best = min(seconds[1:])
    cost = prefill_cost(bench.config, bench.weights, count, length, bench.itemsize)
    share = bench.roofline.seconds(*cost) / best
    return Result(f"prefill {count} x {length}", count * length / best, "tokens/s", share, details={"seconds": best})


def offline(bench: Bench, sequences: int = 256) -> Result:
    """Output tokens per second of nano-vllm's workload: random prompts and outputs of 100 to 1024 tokens.

    ``random.seed(0)``; prompts of ``randint(100, 1024)`` ids from ``randint(0, 10000)``, then
    ``max_tokens=randint(100, 1024)`` each, temperature 0.6, EOS ignored. Source: bench.py of nano-vllm.
    """
    rng = random.Random(0)
    top = min(10_000, bench.config.vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(100, 1024))] for _ in range(sequences)]
    lengths = [rng.randint(100, 1024) for _ in prompts]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in lengths]
    run(bench.llm, [prompts[0][::-1]], [_greedy(8)])
    total, ends = run(bench.llm, prompts, params)
    made = sum(p.max_tokens or 0 for p in params)
    floor = _offline_floor(bench, prompts, params)
    steps = Samples(tuple(np.diff(ends))).summary()
    details = {"output tokens": made, "seconds": total, "steps": len(ends)}
    return Result(f"offline {sequences} sequences", made / total, "output tokens/s", floor / total, steps, details)


def _offline_floor(bench: Bench, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    """Seconds that the ceilings allow: prompts as one prefill, then decode steps of the sequences still running."""
    lengths = np.array([len(p) for p in prompts])
    outs = np.array([p.max_tokens for p in params])
    mean = int(lengths.mean())
    seconds = bench.roofline.seconds(*prefill_cost(bench.config, bench.weights, len(prompts), mean, bench.itemsize))
    for step in range(1, int(outs.max())):
        alive = outs > step
        context = float((lengths[alive] + step).mean())
        cost = decode_cost(bench.config, bench.weights, int(alive.sum()), context, bench.itemsize)
        seconds += bench.roofline.seconds(*cost)
    return seconds


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
