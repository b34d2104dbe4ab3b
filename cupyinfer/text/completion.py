"""From the tokens of a sequence to its output: text, stop strings, log-probabilities with their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cupyinfer.outputs import CompletionOutput, TokenLogprobs
from cupyinfer.sampling_params import SamplingParams
from cupyinfer.text.stream import TextStream
from cupyinfer.text.tokenizer import Tokenizer


class Completion:
    """One sequence of a request as it grows: ``output`` is all of it, :meth:`add` returns what is new.

    ``lazy``: nobody reads the text before the end, so it is made at once then (unless stop strings need it earlier).
    Without a tokenizer the text is None.
    """

    def __init__(
        self,
        index: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        lazy: bool = False,
    ) -> None:
        self.output = CompletionOutput(index, None if tokenizer is None else "")
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._tokenizer = tokenizer
        self._lazy = lazy and not params.stop
        self._unread: list[int] = []
        self._show_stop_token = params.include_stop_str_in_output
        self._stream = TextStream(tokenizer, prompt_token_ids, params) if tokenizer is not None else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; who makes the tokens does not know of it yet."""
        return self._stream.stopped if self._stream is not None else None

    def defer(self, token_ids: Sequence[int]) -> bool:
        """Append tokens without a look at their text, when it may wait for the end; False when it may not."""
        if self._lazy:
            self.output.token_ids += token_ids
            if self._stream is not None:
                self._unread += token_ids
        return self._lazy

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> CompletionOutput:
        """Append new tokens; with a ``finish_reason`` they are the last ones. Returns the new part.

        An end token or stop token counts as a token but is not part of the text (``include_stop_str_in_output`` puts
        it there). When a stop string appears, tokens after the one that completed it are dropped.
        """
        token_ids, text = list(token_ids), None
        if self._stream is not None:
            token_ids, text = self._read(token_ids, finish_reason)
        if self.stop_string is not None:
            finish_reason, stop_reason = "stop", self.stop_string
        new = CompletionOutput(self.output.index, text, token_ids, None, None, finish_reason, stop_reason)
        if logprobs is not None:
            new.logprobs = with_words(logprobs[: len(token_ids)], self._tokenizer)
        self._append(new)
        return new

    def _append(self, new: CompletionOutput) -> None:
        whole = self.output
        if new.text is not None:
            whole.text = (whole.text or "") + new.text
        whole.token_ids += new.token_ids
        if whole.logprobs is not None and new.logprobs is not None:
            whole.logprobs += new.logprobs
            of_taken = (p[t].logprob for t, p in zip(new.token_ids, new.logprobs, strict=True))
            whole.cumulative_logprob = sum(of_taken, whole.cumulative_logprob or 0.0)
        new.cumulative_logprob = whole.cumulative_logprob
        whole.finish_reason, whole.stop_reason = new.finish_reason, new.stop_reason

    def _read(self, token_ids: list[int], finish_reason: str | None) -> tuple[list[int], str]:
        """(the tokens that count, the text that became certain)."""
        assert self._stream is not None
        if self._lazy and finish_reason is None:
            self._unread += token_ids
            return token_ids, ""
        shown = token_ids[:-1] if finish_reason == "stop" and not self._show_stop_token else token_ids
        done = self._stream.tokens_used + len(self._unread)
        text = self._stream.push(self._unread + shown)
        self._unread = []
        if self._stream.stopped is not None:
            return token_ids[: self._stream.tokens_used - done], text
        return token_ids, text + self._stream.finish() if finish_reason is not None else text


def with_words(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer | None) -> list[TokenLogprobs]:
    """The same log-probabilities, each token with its text."""
    if tokenizer is None:
        return list(logprobs)
    word = tokenizer.word
    return [{t: replace(lp, decoded_token=word(t)) for t, lp in position.items()} for position in logprobs]
