"""A checkpoint's tokenizer: ``tokenizer.json`` through the `tokenizers` library, plus what its config files say.

Encoding is exactly what Hugging Face transformers does with the same files: the tokenizer's own post-processor adds the
begin token where the model wants one, and ``add_bos_token`` of tokenizer_config.json overrides it when it is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from cupyinfer.errors import CheckpointError, RequestError
from cupyinfer.text.token_bytes import token_bytes_of


class Tokenizer:
    """Text <-> token ids of one checkpoint.

    ``special_tokens`` maps bos_token, eos_token, ... to their text; ``eos_token_ids`` holds the ids that end a text
    according to tokenizer_config.json and generation_config.json; ``token_bytes[id]`` gives a token's bytes where those
    are fixed, and is None for other kinds of tokenizer. Make one with :func:`load_tokenizer`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], eos_token_ids: Sequence[int] = ()):
        backend.no_truncation()  # a tokenizer.json may ask to cut or pad; a prompt is never cut silently
        backend.no_padding()
        self.backend = backend
        self.settings = settings
        self.special_tokens = {k: _content(v) for k, v in settings.items() if k.endswith("_token") and _content(v)}
        eos = self.token_id(self.special_tokens.get("eos_token", ""))
        self.eos_token_ids = tuple(dict.fromkeys([*([] if eos is None else [eos]), *eos_token_ids]))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.token_bytes = token_bytes_of(backend)
        self._apply_add_bos(settings.get("add_bos_token"))

    @property
    def vocab_size(self) -> int:
        """Number of entries, added tokens included. A model's embedding table may be longer (padded)."""
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, or None."""
        return self.backend.token_to_id(token) if token else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with the begin token when the model wants one and ``add_special_tokens`` is True.

        Raises RequestError for text that is not encodable as UTF-8 (a lone surrogate).
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises plain TypeError, UnicodeEncodeError or Exception
            # lone surrogates are how Python keeps bytes of an argument or of standard input that are not UTF-8
            broken = any("\ud800" <= character <= "\udfff" for character in text)
            why = "it is not valid UTF-8" if broken else error
            raise RequestError(f"prompt={text[:40]!r} cannot be tokenized: {why}") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``. Ids that the tokenizer does not know (a padded vocabulary) give nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def word(self, token_id: int) -> str:
        """The text of one token on its own, special tokens included."""
        return self.decode([token_id], skip_special_tokens=False)

    def _apply_add_bos(self, wanted: bool | None) -> None:
        bos = self.special_tokens.get("bos_token", "")
        bos_id = self.token_id(bos)
        if wanted is None or bos_id is None:
            return
        if (self.backend.encode("a").ids[:1] == [bos_id]) is not bool(wanted):
            single = [bos, "$A"] if wanted else ["$A"]
            self.backend.post_processor = TemplateProcessing(single=single, special_tokens=[(bos, bos_id)])


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a model directory, or None when it has none (the model then works with token ids alone).

    Raises CheckpointError naming the file when tokenizer.json or one of the config files beside it is malformed.
    """
    directory = Path(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise CheckpointError(f"{file} is not a tokenizer that `tokenizers` can read: {error}") from None
    settings = read_json(directory / "tokenizer_config.json")
    generation = read_json(directory / "generation_config.json")
    return Tokenizer(backend, settings, _eos_ids(generation, directory / "generation_config.json"))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} when there is no such file. Raises CheckpointError when it is malformed."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _eos_ids(settings: dict[str, Any], file: Path) -> list[int]:
    value = settings.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{file}: eos_token_id={value!r} is not allowed; allowed: an id or a list of ids")
    return ids


def _content(value: Any) -> str:
    """A special token is written as text or as an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
