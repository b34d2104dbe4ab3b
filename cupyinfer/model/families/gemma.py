"""Gemma 2 and Gemma 3 (text)."""

from __future__ import annotations

import math
from typing import Any

from cupyinfer.model.architecture import RopeConfig
from cupyinfer.model.families.common import (
    FULL,
    GATED_ACTIVATIONS,
    SLIDING,
    read_rope,
    read_sizes,
    read_windows,
    resolve_rope,
)
from cupyinfer.model.fields import Fields


def read_gemma2(fields: Fields) -> dict[str, Any]:
    """Gemma2ForCausalLM: soft caps on attention scores and logits, every second layer windowed, norms on both sides."""
    sizes = read_sizes(fields, head_dim=256, kv_heads=4)
    layers = sizes["num_layers"]
    kinds = [FULL if i % 2 else SLIDING for i in range(layers)]
    return {
        **sizes,
        **_shared(fields, sizes),
        "windows": read_windows(fields, kinds, fields.integer_or_none("sliding_window", 4096)),
        "ropes": (read_rope(fields, sizes["head_dim"]),) * layers,
        "attention_softcap": fields.number_or_none("attn_logit_softcapping", 50.0) or 0.0,
        "logit_softcap": fields.number_or_none("final_logit_softcapping", 30.0) or 0.0,
    }


def read_gemma3(fields: Fields) -> dict[str, Any]:
    """Gemma3ForCausalLM: QK norm, and a layer with full attention and its own theta after every five windowed ones."""
    sizes = read_sizes(fields, head_dim=256, kv_heads=4)
    layers = sizes["num_layers"]
    period = fields.integer("sliding_window_pattern", 6)
    kinds = [SLIDING if (i + 1) % period else FULL for i in range(layers)]
    windows = read_windows(fields, kinds, fields.integer_or_none("sliding_window", 4096))
    full, sliding = _gemma3_ropes(fields, sizes["head_dim"])
    fields.must_be("attn_logit_softcapping", None)
    return {
        **sizes,
        **_shared(fields, sizes),
        "qk_norm": True,
        "windows": windows,
        "ropes": tuple(sliding if window else full for window in windows),
        "logit_softcap": fields.number_or_none("final_logit_softcapping") or 0.0,
    }


def _shared(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    fields.must_be("use_bidirectional_attention", False)
    fields.skip("hidden_act", "sliding_window_size")  # older files carry them beside the fields that count
    return {
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": fields.choice("hidden_activation", GATED_ACTIVATIONS, "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": math.sqrt(sizes["hidden_size"]),
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
    }


def _gemma3_ropes(fields: Fields, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Rotary parameters of (full, sliding) layers: ``rope_parameters`` by layer type, or the older flat fields."""
    theta = fields.number("rope_theta", 1_000_000.0)
    local = fields.number("rope_local_base_freq", 10_000.0)
    nested = fields.part("rope_parameters") if fields.get("rope_parameters") else Fields({}, fields.where)
    parts = {kind: nested.part(kind) if nested.has(kind) else Fields({}, fields.where) for kind in (FULL, SLIDING)}
    nested.skip(FULL, SLIDING)
    nested.finish()
    if fields.get("rope_scaling"):
        parts[FULL] = fields.part("rope_scaling")
    for part in parts.values():
        part.must_be("truncate", True)  # transformers does not look at it here, whatever it says
    return resolve_rope(parts[FULL], fields, head_dim, theta), resolve_rope(parts[SLIDING], fields, head_dim, local)
