"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from cupyinfer.model.families.common import (
    EXPERT_ACTIVATIONS,
    FULL,
    GATED_ACTIVATIONS,
    SLIDING,
    read_rope,
    read_sizes,
    read_windows,
)
from cupyinfer.model.fields import Fields


def read_qwen2(fields: Fields) -> dict[str, Any]:
    """Qwen2ForCausalLM (Qwen2, Qwen2.5): Llama with biases on q, k and v; windows above ``max_window_layers``."""
    sizes = read_sizes(fields, kv_heads=32)
    return {
        **sizes,
        **_shared(fields, sizes),
        "qkv_bias": True,
        "windows": _layer_windows(fields, sizes["num_layers"]),
    }


def read_qwen3(fields: Fields) -> dict[str, Any]:
    """Qwen3ForCausalLM: RMSNorm on every query and key head instead of the biases."""
    sizes = read_sizes(fields, head_dim=128, kv_heads=32)
    bias = fields.flag("attention_bias", False)
    fields.must_be("use_qk_norm", True)
    return {
        **sizes,
        **_shared(fields, sizes),
        "qk_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "windows": _layer_windows(fields, sizes["num_layers"]),
    }


def read_qwen3_moe(fields: Fields) -> dict[str, Any]:
    """Qwen3MoeForCausalLM: Qwen3 with experts on every ``decoder_sparse_step``-th layer but ``mlp_only_layers``."""
    sizes = read_sizes(fields, kv_heads=4)
    layers = sizes["num_layers"]
    bias = fields.flag("attention_bias", False)
    fields.must_be("use_qk_norm", True)
    window = _window(fields)
    fields.skip("max_window_layers")  # this architecture windows all layers or none
    count = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    fields.skip("num_experts", "num_local_experts")
    experts = fields.integer(count, 128)
    chosen = fields.integer("num_experts_per_tok", 8)
    if chosen > experts:
        raise fields.error("num_experts_per_tok", chosen, f"1 to {count}={experts}")
    return {
        **sizes,
        **_shared(fields, sizes),
        "activation": fields.choice("hidden_act", EXPERT_ACTIVATIONS, "silu"),
        "qk_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "windows": read_windows(fields, [FULL if window is None else SLIDING] * layers, window),
        "num_experts": experts,
        "experts_per_token": chosen,
        "moe_intermediate_size": fields.integer("moe_intermediate_size", 768),
        "renormalize_experts": fields.flag("norm_topk_prob", False),
        "sparse_layers": _sparse_layers(fields, layers),
    }


def _shared(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "activation": fields.choice("hidden_act", GATED_ACTIVATIONS, "silu"),
        "ropes": (read_rope(fields, sizes["head_dim"]),) * sizes["num_layers"],
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
    }


def _window(fields: Fields) -> int | None:
    """The window's length, or None: ``sliding_window`` counts only where ``use_sliding_window`` is true."""
    window = fields.integer_or_none("sliding_window", 4096)
    return window if fields.flag("use_sliding_window", False) else None


def _layer_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    window = _window(fields)
    first = fields.integer("max_window_layers", 28, least=0)
    return read_windows(fields, [FULL if window is None or i < first else SLIDING for i in range(layers)], window)


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(i, int) and 0 <= i < layers for i in dense):
        raise fields.error("mlp_only_layers", dense, f"a list of layer numbers from 0 to {layers - 1}")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
