"""The text of one sequence as it grows: detokenizer and stop strings together."""

from __future__ import annotations

from collections.abc import Sequence

from cupyinfer.sampling_params import SamplingParams
from cupyinfer.text.detokenizer import make_detokenizer
from cupyinfer.text.stop import StopChecker
from cupyinfer.text.tokenizer import Tokenizer


class TextStream:
    """Give it tokens, get the text that is certain.

    Of ``params`` it heeds stop, include_stop_str_in_output, skip_special_tokens and min_tokens: a stop string counts
    only when the token that completes it comes after that many tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        skip = params.skip_special_tokens
        self._detokenizer = make_detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=skip)
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output)
        self._watching = bool(params.stop)
        self._free_tokens = params.min_tokens
        self.stopped: str | None = None  # the stop string that ended the text
        self.tokens_used = 0  # tokens consumed; those after the one that completed a stop string are not

    def push(self, token_ids: Sequence[int]) -> str:
        """New text from new tokens. After a stop string nothing more comes; see ``stopped``."""
        if not self._watching:
            self.tokens_used += len(token_ids)
            return self._detokenizer.push(token_ids)
        new = ""
        for token in token_ids:
            if self.stopped is not None:
                break
            self.tokens_used += 1
            armed = self.tokens_used > self._free_tokens
            piece, self.stopped = self._stop.push(self._detokenizer.push([token]), armed)
            new += piece
        return new

    def finish(self) -> str:
        """The rest, when the sequence ended for any other reason than a stop string."""
        if self.stopped is not None:
            return ""
        piece, self.stopped = self._stop.push(self._detokenizer.flush(), armed=False)
        return piece + self._stop.flush()
