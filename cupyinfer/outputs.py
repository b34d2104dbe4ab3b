"""What a request returns. Names follow vLLM's where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Logprob:
    """One candidate token at one position."""

    logprob: float  # natural logarithm of its probability, before temperature and the other sampling parameters
    rank: int | None = None  # 1 for the likeliest token of the vocabulary
    decoded_token: str | None = None  # None without a tokenizer


TokenLogprobs = dict[int, Logprob]  # token id -> Logprob: the token that was taken, and the likeliest ones


@dataclass
class CompletionOutput:
    """One of the ``n`` sequences of a request. In a streamed delta, text, token_ids and logprobs are the new ones only.

    ``text`` is None when the model has no tokenizer (or ``detokenize=False``). ``finish_reason``: "stop" (an end token,
    stop token or stop string), "length" (max_tokens or the context is full), "abort", or None while it runs;
    ``stop_reason`` is the stop string or stop token id that ended it, None for the model's own end token.
    """

    index: int
    text: str | None = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Timing of one request, in seconds, and its sizes, in tokens. 0 where it has not come to that yet."""

    queue: float = 0.0  # arrival to the first step that worked on it
    ttft: float = 0.0  # time to first token, from arrival
    tpot: float = 0.0  # time per output token after the first; of n > 1 sequences, the mean
    e2e: float = 0.0  # arrival to the end of its last sequence
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that the prefix cache spared
    output_tokens: int = 0


@dataclass
class RequestOutput:
    """A request and what came of it so far. ``prompt`` is None when token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # position 0 has none: nothing predicts it
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


def as_dict(output: RequestOutput) -> list[dict[str, Any]]:
    """One JSON-ready object for each sequence of a finished request (what ``cupyinfer generate --json`` prints)."""
    shared = {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
    }
    return [
        shared
        | {
            "index": c.index,
            "text": c.text,
            "token_ids": c.token_ids,
            "logprobs": _logprobs(c.logprobs),
            "cumulative_logprob": c.cumulative_logprob,
            "finish_reason": c.finish_reason,
            "stop_reason": c.stop_reason,
            "timing": dict(vars(output.metrics)),
        }
        for c in output.outputs
    ]


def _logprobs(positions: Any) -> list[Any] | None:
    if positions is None:
        return None
    return [None if p is None else [{"token_id": t, **vars(lp)} for t, lp in p.items()] for p in positions]
