"""One request and its sequences: tokens, pages, progress, timing."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyinfer.errors import invalid
from cupyinfer.sampling_params import SamplingParams

_MASK64 = (1 << 64) - 1


class Status(enum.Enum):
    """Where a sequence is: not started (or preempted), in the batch, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class Timing:
    """When things happened to one sequence, in seconds of ``time.perf_counter()``; 0 where it has not yet."""

    arrival: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def queue(self) -> float:
        """Seconds from arrival to the first step that worked on the sequence."""
        return max(0.0, self.first_scheduled - self.arrival)

    @property
    def ttft(self) -> float:
        """Time to first token: seconds from arrival to the first output token."""
        return max(0.0, self.first_token - self.arrival)

    def tpot(self, output_tokens: int) -> float:
        """Time per output token after the first, in seconds; 0 when there was one token at most."""
        if output_tokens < 2 or not self.finished:
            return 0.0
        return (self.finished - self.first_token) / (output_tokens - 1)


class Sequence:
    """One continuation of one prompt. A request with n > 1 has n of them.

    ``length`` counts the tokens whose position is decided: prompt, known output, and the ones being sampled by steps
    that are launched but not read yet (``pending``). ``computed`` counts the tokens whose keys and values are in the
    pages once everything launched has run. A sequence therefore has ``length - computed`` tokens left to compute; when
    that reaches 0 the step samples one more.
    """

    __slots__ = (
        "request_id", "index", "params", "seed", "tokens", "prompt_len", "max_len", "stop_ids", "length", "computed",
        "pending", "pages", "capacity", "hashes", "register_at", "cached_tokens", "row", "literal_len", "status",
        "finish_reason", "stop_reason", "timing", "prompt_logprobs", "wants_prompt_logprobs", "preemptions",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt: Seq[int] | np.ndarray,
        params: SamplingParams,
        *,
        seed: int,
        max_len: int,
        stop_ids: frozenset[int],
        arrival: float,
    ) -> None:
        """``max_len``: most tokens of prompt and output; ``stop_ids``: tokens that end the output."""
        self.request_id = request_id
        self.index = index  # 0 .. n-1
        self.params = params
        self.seed = seed
        self.tokens = array("i", prompt)  # prompt, then the output as far as it is known
        self.prompt_len = len(self.tokens)
        self.max_len = max_len
        self.stop_ids = stop_ids
        self.length = self.prompt_len
        self.computed = 0
        self.pending = 0
        self.pages: list[int] = []
        self.capacity = 0  # tokens that fit into ``pages``
        self.hashes: list[bytes] = []  # of the full pages of known tokens, as far as they were needed
        self.register_at = 0  # known tokens at which the next page may enter the prefix cache
        self.cached_tokens = 0  # prompt tokens that the prefix cache gave
        self.row = -1
        self.literal_len = 0  # tokens known when the sequence was last admitted: later ones are on the device too
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.timing = Timing(arrival)
        self.prompt_logprobs: list[Any] = []
        self.wants_prompt_logprobs = index == 0 and params.prompt_logprobs is not None
        self.preemptions = 0

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def num_output(self) -> int:
        """Output tokens known so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def output(self) -> list[int]:
        """The known output tokens."""
        return self.tokens[self.prompt_len :].tolist()

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Known tokens [stop - start], int32, copied."""
        return np.frombuffer(self.tokens[start:stop], dtype=np.int32)

    def __repr__(self) -> str:
        return f"Sequence({self.request_id}/{self.index}, {self.status.value}, {self.computed}/{self.length})"


class Request:
    """A prompt with its sampling parameters and its ``params.n`` sequences."""

    def __init__(self, request_id: str, sequences: list[Sequence]) -> None:
        self.request_id = request_id
        self.sequences = sequences

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)


def derive_seed(engine_seed: int, counter: int) -> int:
    """The 64-bit seed of the ``counter``-th request of an engine, when the request brings none.

    SplitMix64's finaliser (Steele, Lea & Flood 2014) over both numbers: neighbouring requests get unrelated streams.
    """
    if engine_seed < 0 or counter < 0:
        raise invalid("seed", engine_seed, "an integer >= 0")
    z = (engine_seed + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
