"""How one request wants its tokens chosen and when it ends. Names and meanings follow vLLM's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from cupyinfer.errors import RequestError

MAX_LOGPROBS = 20
_INTEGERS = {  # field: (smallest, largest)
    "n": (1, 1 << 16),
    "top_k": (-1, (1 << 31) - 1),
    "seed": (0, (1 << 64) - 1),
    "max_tokens": (1, (1 << 31) - 1),
    "min_tokens": (0, (1 << 31) - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_MAY_BE_NONE = ("seed", "logprobs", "prompt_logprobs")
_FLOATS = {  # field: (test of a finite value, what is allowed)
    "temperature": (lambda v: v >= 0, "a finite number >= 0 (0: always the most likely token)"),
    "top_p": (lambda v: 0 < v <= 1, "a number in (0, 1] (1: off)"),
    "min_p": (lambda v: 0 <= v <= 1, "a number in [0, 1] (0: off)"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "a number in [-2, 2] (0: off)"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "a number in [-2, 2] (0: off)"),
    "repetition_penalty": (lambda v: 0 < v <= 100, "a number in (0, 100] (1: off)"),
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


def _refuse(field: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"{field}={value!r} is not allowed; allowed: {allowed}")


@dataclass(frozen=True)
class SamplingParams:
    """Checked at construction: a value that is not allowed raises RequestError naming field, value and what is allowed.

    The order on the device is: repetition, presence and frequency penalty, logit bias, temperature, top-k, top-p,
    min-p, draw (Hugging Face's order). Log-probabilities are those of the model, before all of this.
    """

    n: int = 1  # completions of the prompt
    temperature: float = 1.0  # below 1e-5: greedy
    top_p: float = 1.0  # smallest set of tokens whose probability reaches this
    top_k: int = 0  # the k most likely tokens; 0 or -1: all
    min_p: float = 0.0  # tokens at least this fraction as likely as the most likely one
    seed: int | None = None  # None: drawn by the engine
    max_tokens: int = 16
    min_tokens: int = 0  # no end-of-sequence and no stop token before this many
    stop: Any = ()  # a string or several: generation ends when one appears; kept as a tuple
    stop_token_ids: Any = ()  # kept as a tuple
    ignore_eos: bool = False
    presence_penalty: float = 0.0  # subtracted once from every token that was generated
    frequency_penalty: float = 0.0  # subtracted for each time a token was generated
    repetition_penalty: float = 1.0  # divides (multiplies, below 0) logits of tokens in prompt or output
    logit_bias: Any = None  # {token id: number added to its logit, -inf forbids it}
    logprobs: int | None = None  # per generated token: its own log-probability and those of this many best tokens
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _INTEGERS:
                put(field.name, _integer(field.name, value))
            elif field.name in _FLOATS:
                put(field.name, _float(field.name, value))
            elif field.name in _FLAGS and not isinstance(value, bool):
                raise _refuse(field.name, value, "True or False")
        put("stop", _stop(self.stop))
        put("stop_token_ids", _token_ids(self.stop_token_ids))
        put("logit_bias", _logit_bias(self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", self.min_tokens, f"0 to max_tokens={self.max_tokens}")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature < 1e-5

    @property
    def filtered(self) -> bool:
        """True when top-k, top-p or min-p may drop tokens before the draw."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalized(self) -> bool:
        """True when the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def validate_for(self, vocab_size: int) -> None:
        """Raise RequestError for a token id outside the vocabulary, or more log-probabilities than there are tokens."""
        allowed = f"token ids from 0 to {vocab_size - 1} (the model's vocabulary)"
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            for token in ids:
                if token >= vocab_size:
                    raise _refuse(name, token, allowed)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise _refuse(name, getattr(self, name), f"0 to {vocab_size} (the size of the vocabulary)")


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _integer(field: str, value: Any) -> int | None:
    low, high = _INTEGERS[field]
    if value is None and field in _MAY_BE_NONE:
        return None
    if not _is_int(value) or not low <= value <= high:
        raise _refuse(field, value, f"an integer from {low} to {high}" + (" or None" if field in _MAY_BE_NONE else ""))
    return int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _float(field: str, value: Any) -> float:
    test, allowed = _FLOATS[field]
    if not _is_number(value) or not math.isfinite(value) or not test(value):
        raise _refuse(field, value, allowed)
    return float(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else () if value is None else value
    good = isinstance(texts, Iterable) and not isinstance(texts, (bytes, Mapping))
    result = tuple(texts) if good else ()
    if not good or not all(isinstance(text, str) and text for text in result):
        raise _refuse("stop", value, "a non-empty string or a list of non-empty strings")
    return result


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else value
    good = isinstance(ids, Iterable) and not isinstance(ids, (str, bytes, Mapping))
    result = tuple(ids) if good else ()
    if not good or not all(_is_int(token) and token >= 0 for token in result):
        raise _refuse("stop_token_ids", value, "a list of token ids >= 0")
    return tuple(int(token) for token in result)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    allowed = "a dict of token id (integer >= 0) to a number from -100 to 100, or -inf to forbid the token"
    if not isinstance(value, Mapping):
        raise _refuse("logit_bias", value, allowed)
    for token, bias in value.items():
        if not _is_int(token) or token < 0:
            raise _refuse("logit_bias", {token: bias}, allowed)
        if not _is_number(bias) or not (-100 <= bias <= 100 or bias == -math.inf):
            raise _refuse("logit_bias", {token: bias}, allowed)
    return {int(token): float(bias) for token, bias in value.items()} or None
