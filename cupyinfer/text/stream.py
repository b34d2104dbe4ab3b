"""The text of one sequence as it grows: detokenizer and stop strings together."""

from __future__ import annotations

from collections.abc import Sequence

from cupyinfer.text.detokenizer import make_detokenizer
from cupyinfer.text.stop import StopChecker
from cupyinfer.text.tokenizer import Tokenizer


class TextStream:
    """Give it tokens, get the text that is certain. ``text`` is all that was handed out so far.

    ``min_tokens``: a stop string counts only when the token that completes it comes after that many tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = make_detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._stop = StopChecker(stop, include_stop)
        self._watching = bool(stop)
        self._free_tokens = min_tokens
        self._pieces: list[str] = []
        self.stopped: str | None = None  # the stop string that ended the text
        self.tokens_used = 0  # tokens consumed; those after the one that completed a stop string are not

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, token_ids: Sequence[int]) -> str:
        """New text from new tokens. After a stop string nothing more comes; see ``stopped``."""
        if not self._watching:
            self.tokens_used += len(token_ids)
            return self._keep(self._detokenizer.push(token_ids))
        new = ""
        for token in token_ids:
            if self.stopped is not None:
                break
            self.tokens_used += 1
            armed = self.tokens_used > self._free_tokens
            piece, self.stopped = self._stop.push(self._detokenizer.push([token]), armed)
            new += piece
        return self._keep(new)

    def finish(self) -> str:
        """The rest, when the sequence ended for any other reason than a stop string."""
        if self.stopped is not None:
            return ""
        piece, self.stopped = self._stop.push(self._detokenizer.flush(), armed=False)
        return self._keep(piece + self._stop.flush())

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
