"""Typed, counted access to a config.json: wrong types raise, and so does a field that nobody has looked at.

A field that changes the computation and is ignored gives wrong text without any error, so every key must be known:
read by the family, listed as harmless, or empty (null, false, [], {}, "").
"""

from __future__ import annotations

import re
from typing import Any

from cupyinfer.errors import ConfigError

# Training, bookkeeping, generation defaults and other back ends' hints: none changes a forward pass.
_HARMLESS_NAMES = """
    architectures model_type transformers_version torch_dtype dtype auto_map initializer_range use_cache
    attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop classifier_dropout dropout pretraining_tp
    output_router_logits router_aux_loss_coef router_jitter_noise pad_token_id sep_token_id cls_token_id
    decoder_start_token_id unk_token_id bos_token_id eos_token_id forced_bos_token_id forced_eos_token_id
    task_specific_params id2label label2id num_labels problem_type finetuning_task return_dict output_hidden_states
    output_attentions torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward tokenizer_class prefix
    cache_implementation n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout is_llama_config transformers.js_config attn_implementation experts_implementation
    max_sequence_length n_special predict_special_tokens output_past gradient_checkpointing max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size num_return_sequences encoder_no_repeat_ngram_size
    bad_words_ids remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    return_dict_in_generate output_scores neftune_noise_alpha
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
_HARMLESS_PATTERN = re.compile(r"_.*|unsloth.*")  # private keys and a fine-tuning tool's marks


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Fields:
    """The object of one config.json (or of a part of it, named by ``where``)."""

    def __init__(self, values: Any, where: str = "config.json") -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must hold a JSON object, not {type(values).__name__}")
        self.where = where
        self._values = values
        self._seen: set[str] = set()

    def error(self, name: str, value: Any, allowed: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name}={value!r} is not allowed; allowed: {allowed}")

    def has(self, name: str) -> bool:
        """True when the field is there and not null."""
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; ``default`` when it is missing or null."""
        self._seen.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def skip(self, *names: str) -> None:
        """Mark fields as looked at: the family does not use them."""
        self._seen.update(names)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer >= ``least``; without a default the field is required."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, value, f"an integer >= {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number > 0."""
        value = self._required(name, default)
        if not is_number(value) or not 0 < value < float("inf"):
            raise self.error(name, value, "a number > 0")
        return float(value)

    def number_or_none(self, name: str, default: float | None = None) -> float | None:
        """A number > 0, or None for null; ``default`` is for a field that is missing."""
        return self.number(name) if self.has(name) else self._absent(name, default)

    def integer_or_none(self, name: str, default: int | None = None) -> int | None:
        """An integer > 0, or None for null; ``default`` is for a field that is missing."""
        return self.integer(name) if self.has(name) else self._absent(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true, false")
        return value

    def choice(self, name: str, table: dict[str, Any], default: str | None = None) -> Any:
        """The entry of ``table`` that the field names."""
        value = self._required(name, default)
        if not isinstance(value, str) or value not in table:
            raise self.error(name, value, ", ".join(sorted(table)))
        return table[value]

    def must_be(self, name: str, *allowed: Any) -> None:
        """A feature that is not implemented: the field must be missing, null or one of ``allowed``."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.error(name, value, " or ".join(repr(a) for a in allowed))

    def part(self, name: str) -> Fields:
        """The object in field ``name``."""
        return Fields(self.get(name), f"{self.where}: {name}")

    def finish(self) -> None:
        """Raise ConfigError when a field is left that nobody looked at."""
        for name, value in self._values.items():
            known = name in self._seen or name in _HARMLESS or _HARMLESS_PATTERN.fullmatch(name)
            if not known and value not in (None, False, "", [], {}):
                raise ConfigError(
                    f"{self.where}: {name}={value!r} is a field that cupyinfer does not know for this architecture; "
                    f"allowed: remove it if it does not change the computation"
                )

    def _absent(self, name: str, default: Any) -> Any:
        self._seen.add(name)
        return None if name in self._values else default

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise ConfigError(f"{self.where}: field {name} is missing")
        return value
