"""Llama 2, 3, 3.1, 3.2 and Mistral."""

from __future__ import annotations

from typing import Any

from cupyinfer.model.families.common import FULL, GATED_ACTIVATIONS, SLIDING, read_rope, read_sizes, read_windows
from cupyinfer.model.fields import Fields


def read_llama(fields: Fields) -> dict[str, Any]:
    """LlamaForCausalLM: RMSNorm, rotary positions, gated MLP; biases only when the config asks for them."""
    sizes = read_sizes(fields)
    layers = sizes["num_layers"]
    bias = fields.flag("attention_bias", False)
    return sizes | {
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "activation": fields.choice("hidden_act", GATED_ACTIVATIONS, "silu"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
        "windows": read_windows(fields, [FULL] * layers, None),
        "ropes": (read_rope(fields, sizes["head_dim"]),) * layers,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
    }


def read_mistral(fields: Fields) -> dict[str, Any]:
    """MistralForCausalLM: Llama with a sliding window on every layer (``sliding_window`` null: none)."""
    sizes = read_sizes(fields, kv_heads=8)
    layers = sizes["num_layers"]
    window = fields.integer_or_none("sliding_window", 4096)
    windows = read_windows(fields, [FULL if window is None else SLIDING] * layers, window)
    if len(set(windows)) > 1:
        raise fields.error("layer_types", fields.get("layer_types"), "one kind for all layers of this architecture")
    return sizes | {
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "activation": fields.choice("hidden_act", GATED_ACTIVATIONS, "silu"),
        "windows": windows,
        "ropes": (read_rope(fields, sizes["head_dim"]),) * layers,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
    }
