"""Token ids -> text, a few tokens at a time, never half a character.

A token need not be a whole character (an emoji is often three tokens), and for some tokenizers a token's text depends
on its neighbours (a leading space is dropped at the start of a text). Two ways, chosen by the tokenizer:

* where a token is a fixed string of bytes, an incremental UTF-8 decoder is all that is needed;
* else: decode a short window that starts before the new tokens, and hand out what it has more than last time.

What is handed out never changes: the pieces joined are the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from cupyinfer.text.token_bytes import TokenBytes
from cupyinfer.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8  # of the prompt: enough to tell whether the first new token starts a word
WINDOW_TOKENS = 64  # a window this long means garbage that never becomes a character


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text as they come."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens (may be empty)."""
        ...

    def flush(self) -> str:
        """What was held back, at the end of the sequence: an unfinished character as U+FFFD."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
) -> Detokenizer:
    """The fastest detokenizer that is exact for this tokenizer.

    The prompt's last tokens serve as context: after "Hello" the token "▁world" gives " world", not "world".
    """
    table = tokenizer.token_bytes
    if table is None:
        return WindowDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens)
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
    has_context = any(i not in skipped for i in prompt_token_ids[-CONTEXT_TOKENS:])
    return ByteDetokenizer(table, skipped, strip_first_space=table.strips_first_space and not has_context)


class ByteDetokenizer:
    """For tokens that are fixed strings of bytes: about a microsecond a token."""

    def __init__(self, table: TokenBytes, skipped: frozenset[int], strip_first_space: bool) -> None:
        self._table = table
        self._skipped = skipped
        self._strip_first_space = strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        text = self._utf8.decode(b"".join([self._table[i] for i in token_ids if i not in self._skipped]))
        if self._strip_first_space and text:
            self._strip_first_space = False
            text = text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any tokenizer: decodes a window of tokens; ``_given`` is the part of its text that was handed out already."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._clean = len(self._window)  # what lies before this index was handed out and ends with a whole character
        self._given = self._decode().rstrip(REPLACEMENT)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._step([i], final=False) for i in token_ids])

    def flush(self) -> str:
        return self._step([], final=True)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special)

    def _step(self, token_ids: list[int], final: bool) -> str:
        self._window += token_ids
        text = self._decode()
        if not text.startswith(self._given):  # broken bytes made the decoder rewrite the characters before them
            self._drop(self._clean, given="")
            text = self._decode()
        held = 0 if final else _unfinished(text)
        stable = text[: len(text) - held]
        new = stable[len(self._given) :]
        self._given = stable
        if new and not held:
            self._drop(self._clean)  # the tokens since the last whole character stay, as context for spacing
        elif len(self._window) > WINDOW_TOKENS:
            self._drop(len(self._window) - CONTEXT_TOKENS, held=held)
        return new

    def _drop(self, count: int, given: str | None = None, held: int = 0) -> None:
        """Forget the first ``count`` tokens of the window."""
        del self._window[:count]
        self._clean = len(self._window) if given is None else 0
        if given is None:
            text = self._decode()
            given = text[: len(text) - held]
        self._given = given


def _unfinished(text: str) -> int:
    """How many characters at the end may still turn into another one.

    An incomplete UTF-8 sequence decodes to U+FFFD, in byte-fallback tokenizers one for each byte: at most three.
    """
    return min(len(text) - len(text.rstrip(REPLACEMENT)), 3)
