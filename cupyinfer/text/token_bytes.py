"""The bytes of each token, for the tokenizers where a token is a fixed string of bytes whatever stands beside it.

That holds for the two kinds that nearly every language model uses: byte-level BPE (GPT-2, Llama 3, Qwen), where each
character of a token spells one byte, and SentencePiece BPE with byte fallback (Llama 2, Mistral, Gemma), where ``▁`` is
a space and ``<0xE5>`` a byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import tokenizers

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACE = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: itself where printable, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _spelled_bytes(token: str) -> bytes:
    """Of a byte-level token. An added token with characters outside the alphabet stands for itself."""
    if all(c in _BYTE_OF for c in token):
        return bytes(_BYTE_OF[c] for c in token)
    return token.encode()


def _fallback_bytes(token: str) -> bytes:
    """Of a SentencePiece token."""
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace(_SPACE, " ").encode()


class TokenBytes:
    """Looks up ``table[token_id] -> bytes``, filled as ids are asked for; empty for an id without an entry.

    ``strips_first_space``: the decoder drops one space at the very start of a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, convert: Callable[[str], bytes], strips_first_space: bool):
        self.strips_first_space = strips_first_space
        self._token_of = backend.id_to_token
        self._convert = convert
        self._table: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        found = self._table.get(token_id)
        if found is None:
            found = self._table[token_id] = self._convert(self._token_of(token_id) or "")
        return found


def token_bytes_of(backend: tokenizers.Tokenizer) -> TokenBytes | None:
    """The table of a tokenizer, or None when its decoder is of another kind (a token's text depends on others)."""
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return TokenBytes(backend, _spelled_bytes, strips_first_space=False)
    steps = [step for step in decoder.get("decoders", ()) if step["type"] != "Fuse"]
    if steps[:2] == [_REPLACE, {"type": "ByteFallback"}] and steps[2:] in ([], [_STRIP]):
        return TokenBytes(backend, _fallback_bytes, strips_first_space=bool(steps[2:]))
    return None
