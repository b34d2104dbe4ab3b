"""What the families' config maps share: sizes, activations, windows and rotary parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cupyinfer.errors import ConfigError
from cupyinfer.model.architecture import RopeConfig
from cupyinfer.model.fields import Fields

EXPERT_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
GATED_ACTIVATIONS = EXPERT_ACTIVATIONS | {"gelu": "gelu"}
FULL, SLIDING = "full_attention", "sliding_attention"
_ROPE_KINDS = {kind: kind for kind in ("default", "linear", "llama3", "yarn")}


def read_sizes(fields: Fields, head_dim: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
    """The sizes of a Llama-like config. ``head_dim`` and ``kv_heads`` are the family's values for a missing field."""
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    kv = fields.integer_or_none("num_key_value_heads", kv_heads) or heads
    if heads % kv:
        raise fields.error("num_key_value_heads", kv, f"a divisor of num_attention_heads={heads}")
    dim = fields.integer_or_none("head_dim", head_dim)
    if dim is None:
        if hidden % heads:
            raise fields.error("hidden_size", hidden, f"a multiple of num_attention_heads={heads}")
        dim = hidden // heads
    if dim % 2:
        raise fields.error("head_dim", dim, "an even number: rotary positions turn pairs")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_dim": dim,
        "intermediate_size": fields.integer("intermediate_size"),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "attention_scale": dim**-0.5,
    }


def read_windows(fields: Fields, kinds: Sequence[str], window: int | None) -> tuple[int, ...]:
    """Window of every layer; ``layer_types`` of the config, where present, overrides ``kinds``."""
    listed = fields.get("layer_types", list(kinds))
    if not isinstance(listed, list) or len(listed) != len(kinds) or not set(listed) <= {FULL, SLIDING}:
        raise fields.error("layer_types", listed, f"a list of {len(kinds)} entries, each {FULL} or {SLIDING}")
    if SLIDING in listed and window is None:
        raise fields.error("layer_types", listed, f"no {SLIDING}, since the config gives no sliding window")
    return tuple(window or 0 if kind == SLIDING else 0 for kind in listed)


def read_rope(fields: Fields, head_dim: int, default_theta: float = 10000.0) -> RopeConfig:
    """Rotary parameters that all layers share.

    Both spellings: transformers 5's ``rope_parameters`` and the older ``rope_theta`` with ``rope_scaling``.
    """
    theta = fields.number("rope_theta", default_theta)
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    fields.must_be("partial_rotary_factor", 1.0)
    part = fields.part(name) if fields.get(name) else Fields({}, fields.where)
    return resolve_rope(part, fields, head_dim, theta)


def resolve_rope(part: Fields, fields: Fields, head_dim: int, theta: float) -> RopeConfig:
    """One rotary parameter object ``part`` of the config ``fields``, with Hugging Face's defaults filled in."""
    spelled = "type" if part.has("type") and not part.has("rope_type") else "rope_type"
    part.skip("type")
    kind = part.choice(spelled, _ROPE_KINDS, "default")
    part.must_be("partial_rotary_factor", 1.0)
    common = {"theta": part.number("rope_theta", theta), "rotary_dim": head_dim, "kind": kind}
    if kind == "linear":
        common["factor"] = part.number("factor")
    elif kind in ("llama3", "yarn"):
        if common["theta"] <= 1:  # their ramps need waves of growing length
            raise part.error("rope_theta", common["theta"], "a number > 1")
        longest = fields.integer("max_position_embeddings")
        common["original_max_positions"] = fields.integer(
            "original_max_position_embeddings", part.integer("original_max_position_embeddings", longest)
        )
        common |= _llama3(part) if kind == "llama3" else _yarn(part, longest / common["original_max_positions"])
    part.finish()
    return RopeConfig(**common)


def _llama3(part: Fields) -> dict[str, Any]:
    low, high = part.number("low_freq_factor"), part.number("high_freq_factor")
    if low >= high:
        raise part.error("high_freq_factor", high, f"a number above low_freq_factor={low}")
    return {"factor": part.number("factor"), "low_freq_factor": low, "high_freq_factor": high}


def _yarn(part: Fields, length_ratio: float) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071). The attention factor defaults to 0.1 ln(factor) + 1, or a ratio of two such terms."""
    factor = part.number("factor", length_ratio)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = _weight(part, "mscale"), _weight(part, "mscale_all_dim")
    default = mscale(over) / mscale(under) if over and under else mscale(1.0)
    fast, slow = part.number("beta_fast", 32.0), part.number("beta_slow", 1.0)
    if fast < slow:
        raise part.error("beta_fast", fast, f"a number >= beta_slow={slow}")
    return {
        "factor": factor,
        "attention_factor": part.number("attention_factor", default),
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": part.flag("truncate", True),
    }


def _weight(part: Fields, name: str) -> float | None:
    """A number > 0, or None; 0 says the same as a missing field."""
    return part.number_or_none(name) if part.get(name) != 0 else None


def read_token_ids(where: str, value: Any) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ConfigError(f"{where}={value!r} is not allowed; allowed: a token id, a list of token ids, null")
    return tuple(listed)
