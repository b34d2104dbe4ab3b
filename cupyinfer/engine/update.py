"""What a step reports to the front end."""

from __future__ import annotations

from dataclasses import dataclass

from cupyinfer.engine.sequence import Timing
from cupyinfer.outputs import TokenLogprobs


@dataclass(slots=True)
class RequestUpdate:
    """News of one sequence of a request, from one step."""

    request_id: str
    index: int  # of the sequence: 0 .. n-1
    token_ids: list[int]  # new output tokens; an end token or stop token is among them
    finish_reason: str | None  # "stop", "length" or "abort" when the sequence has ended
    stop_reason: int | str | None  # the stop token id or stop string; None for the model's end token
    timing: Timing  # of the sequence; goes on changing until it has finished
    cached_tokens: int  # prompt tokens that the prefix cache gave
    logprobs: list[TokenLogprobs] | None = None  # one for each new token, when asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token of sequence 0, when asked for
    request_finished: bool = False  # this was the last sequence of the request

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class EngineStats:
    """Counters of an engine: totals since it started, unless said otherwise."""

    running: int  # sequences, now
    waiting: int  # sequences, now
    pages_total: int
    pages_used: int  # now
    pages_cached: int  # now, held by nobody
    pages_high_water: int
    prefix_queried_tokens: int  # tokens of admitted sequences
    prefix_hit_tokens: int  # of these, found in the prefix cache
    preemptions: int
    steps: int
    prompt_tokens: int  # computed in prompts, again after a preemption too; not those that the prefix cache gave
    output_tokens: int
    requests: int
    graph_replays: int

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_queried_tokens if self.prefix_queried_tokens else 0.0
