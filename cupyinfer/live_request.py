"""A request between the engine and its user: tokens come in, outputs with text go out."""

from __future__ import annotations

from typing import Any

from cupyinfer.engine.update import RequestUpdate
from cupyinfer.outputs import CompletionOutput, RequestMetrics, RequestOutput
from cupyinfer.sampling_params import SamplingParams
from cupyinfer.text.completion import Completion, with_words
from cupyinfer.text.tokenizer import Tokenizer


class LiveRequest:
    """A request that the engine works on: what came of it so far, and what nobody has read yet."""

    def __init__(
        self,
        request_id: str,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        lazy: bool,
    ) -> None:
        self.request_id = request_id
        self.completions = [Completion(i, token_ids, params, tokenizer, lazy) for i in range(params.n)]
        self._news: dict[int, CompletionOutput] = {}
        self._text, self._token_ids = text, token_ids
        self._tokenizer = tokenizer
        self._lazy = lazy
        self._max_tokens = params.max_tokens
        self._updates: dict[int, RequestUpdate] = {}  # the latest one of each sequence: it carries the timing
        self._prompt_logprobs: Any = None

    @property
    def finished(self) -> bool:
        return all(c.output.finish_reason is not None for c in self.completions)

    def share_done(self, max_model_len: int) -> float:
        """Between 0 and 1: how far it is if it goes on to max_tokens or the end of the context."""
        most = max(1, min(self._max_tokens, max_model_len - len(self._token_ids)))
        shares = [1.0 if c.output.finished else min(1.0, len(c.output.token_ids) / most) for c in self.completions]
        return sum(shares) / len(shares)

    def take(self, update: RequestUpdate) -> bool:
        """Add what a step made; True when the text just reached a stop string, of which the engine must be told."""
        completion = self.completions[update.index]
        if completion.output.finish_reason is not None:
            return False
        self._updates[update.index] = update
        if update.prompt_logprobs is not None:
            self._prompt_logprobs = [p and with_words([p], self._tokenizer)[0] for p in update.prompt_logprobs]
        if update.finish_reason is None and update.logprobs is None and completion.defer(update.token_ids):
            return False
        new = completion.add(update.token_ids, update.logprobs, update.finish_reason, update.stop_reason)
        if not self._lazy:
            unread = self._news.get(update.index)
            self._news[update.index] = new if unread is None else joined(unread, new)
        return completion.stop_string is not None and update.finish_reason is None

    def result(self) -> RequestOutput:
        """Everything so far."""
        return self._output([c.output for c in self.completions])

    def news(self) -> RequestOutput | None:
        """What is new since the last call, or None when nothing is: one delta for each sequence that has grown."""
        if not self._news:
            return None
        deltas, self._news = list(self._news.values()), {}
        return self._output(deltas)

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            self.request_id,
            self._text,
            self._token_ids,
            outputs,
            self.finished,
            self._prompt_logprobs,
            self._metrics(),
        )

    def _metrics(self) -> RequestMetrics:
        sizes = [len(c.output.token_ids) for c in self.completions]
        timings = {i: u.timing for i, u in self._updates.items()}
        if not timings:
            return RequestMetrics(prompt_tokens=len(self._token_ids))
        first = list(timings.values())
        return RequestMetrics(
            queue=min(t.queue for t in first),
            ttft=min(t.ttft for t in first),
            tpot=sum(t.tpot(sizes[i]) for i, t in timings.items()) / len(timings),
            e2e=max(0.0, *(t.finished - t.arrival for t in first)),
            prompt_tokens=len(self._token_ids),
            cached_tokens=max(u.cached_tokens for u in self._updates.values()),
            output_tokens=sum(sizes),
        )


def joined(a: CompletionOutput, b: CompletionOutput) -> CompletionOutput:
    """Two deltas of one sequence, one after the other, as one."""
    return CompletionOutput(
        a.index,
        None if a.text is None or b.text is None else a.text + b.text,
        a.token_ids + b.token_ids,
        None if a.logprobs is None and b.logprobs is None else (a.logprobs or []) + (b.logprobs or []),
        b.cumulative_logprob,
        b.finish_reason,
        b.stop_reason,
    )
