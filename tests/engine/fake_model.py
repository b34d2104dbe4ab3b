"""A model without weights whose every token depends on every earlier token, read back through the pages.

It writes each token id into the KV pages at its slot, reads all tokens of the sequence back through the block table,
and predicts the next token from a hash of them: a wrong slot, page, position or length changes what comes out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cupyinfer.config import EngineConfig
from cupyinfer.engine.engine import LLMEngine
from cupyinfer.engine.loading import make_engine
from cupyinfer.engine.runner import Runner
from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.inputs import StepInputs
from cupyinfer.ops.sampling import sample_simple
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import choose_device
from cupyinfer.sampling_params import SamplingParams

VOCAB = 97
EOS = 3
_POWERS = np.array([pow(1_000_003, i, (1 << 61) - 1) for i in range(4096)], dtype=object)


def model_config(context: int = 640) -> ModelConfig:
    return ModelConfig(
        architecture="Fake",
        vocab_size=VOCAB,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        intermediate_size=8,
        max_position_embeddings=context,
        eos_token_ids=(EOS,),
    )


def fingerprint(tokens: np.ndarray) -> int:
    """A polynomial hash of the tokens, order included."""
    return int((tokens.astype(object) * _POWERS[: len(tokens)]).sum()) % ((1 << 61) - 1)


def logits_after(tokens: np.ndarray) -> np.ndarray:
    """float32 [V] logits that follow ``tokens``; the end token is likely enough to be met."""
    logits = np.random.default_rng(fingerprint(tokens)).standard_normal(VOCAB).astype(np.float32)
    logits[EOS] += 0.3
    return logits


class FakeModel:
    """Stands for a Decoder. Keeps token ids, plus one so that 0 means unwritten, in key dim 0 of layer 0."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.steps: list[StepInputs] = []

    def hidden(self, step: StepInputs, kv_caches, arena: Arena) -> None:
        pages = kv_caches[0]
        ids = np.where(step.token_rows < 0, step.token_ids, step.last_tokens[np.maximum(step.token_rows, 0)])
        kept = step.slot_mapping >= 0
        slots = step.slot_mapping[kept]
        pages[slots // self.block_size, 0, 0, slots % self.block_size, 0] = ids[kept] + 1
        self._check_layout(step)
        self.steps.append(step)

    def forward(self, step: StepInputs, kv_caches, arena: Arena) -> np.ndarray:
        self.hidden(step, kv_caches, arena)
        owner = np.searchsorted(step.query_start, step.logits_indices, side="right") - 1
        logits = arena.take("logits", (len(owner), VOCAB), np.float32)
        for n, (row, b) in enumerate(zip(step.logits_indices.tolist(), owner.tolist(), strict=True)):
            if step.context_lens[b] == 0 or step.slot_mapping[row] < 0:  # padding, or a batch that measures scratch
                logits[n] = 0
                continue
            end = int(step.positions[row]) + 1
            logits[n] = logits_after(self._read(step.block_tables[b], end, kv_caches[0]))
        return logits

    def _read(self, table: np.ndarray, end: int, pages: np.ndarray) -> np.ndarray:
        where = np.arange(end)
        stored = pages[table[where // self.block_size], 0, 0, where % self.block_size, 0]
        assert stored.all(), "a position was read that nobody wrote"
        return stored.astype(np.int64) - 1

    @staticmethod
    def _check_layout(step: StepInputs) -> None:
        lens = np.diff(step.query_start)
        assert (lens[: step.num_decodes] == 1).all() and lens.min() >= 1 and lens.max() <= step.max_query_len
        ends = step.positions[step.query_start[1:] - 1] + 1
        real = step.context_lens > 0
        assert (ends == step.context_lens)[real].all()
        used = step.slot_mapping[step.slot_mapping >= 0]
        assert len(np.unique(used)) == len(used), "two tokens of a step share a slot"


def fake_engine(depth: int = 1, context: int = 640, **settings) -> LLMEngine:
    """An engine over a FakeModel on the CPU; ``depth`` 2 launches one step ahead, as on a GPU."""
    settings = {"block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 64, **settings}
    config = EngineConfig.make(model="fake", **settings)
    device = choose_device("cpu")
    engine = make_engine(config, model_config(context), FakeModel(config.block_size), "float32", device)
    plan = replace(engine.plan, depth=depth)
    runner = Runner(engine.runner.model, VOCAB, plan, device, engine.pool.kv_caches, Arena(np))
    return LLMEngine(runner, engine.pool, plan, (EOS,))


def run(engine: LLMEngine, check=None) -> dict[tuple[str, int], tuple[list[int], str]]:
    """Step until everything is done: {(request, sequence): (tokens, finish reason)}."""
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], str] = {}
    while engine.has_unfinished():
        for update in engine.step():
            key = (update.request_id, update.index)
            assert key not in reasons, "news of a sequence that has ended"
            tokens.setdefault(key, []).extend(update.token_ids)
            if update.finish_reason:
                reasons[key] = update.finish_reason
        if check:
            check(engine)
    return {key: (tokens[key], reason) for key, reason in reasons.items()}


def alone(prompt: list[int], params: SamplingParams, seed: int = 0, max_len: int = 640) -> tuple[list[int], str]:
    """(output tokens, finish reason) of an unconstrained run, by a plain loop without any engine.

    Knows temperature, seed, max_tokens, min_tokens, ignore_eos and stop_token_ids.
    """
    tokens = list(prompt)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    for n in range(min(params.max_tokens, max_len - len(prompt))):
        logits = logits_after(np.array(tokens))
        if n < params.min_tokens:
            logits[list(ends)] = -np.inf
        token = np.zeros(1, np.int32)
        temperature = np.array([params.temperature], np.float32)
        steps = np.array([n], np.int32)
        sample_simple(logits[None], temperature, np.array([seed], np.uint64), steps, tokens=token)
        tokens.append(int(token[0]))
        if tokens[-1] in ends:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"
