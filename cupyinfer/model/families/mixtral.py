"""Mixtral."""

from __future__ import annotations

from typing import Any

from cupyinfer.model.families.common import EXPERT_ACTIVATIONS, FULL, SLIDING, read_rope, read_sizes, read_windows
from cupyinfer.model.fields import Fields


def read_mixtral(fields: Fields) -> dict[str, Any]:
    """MixtralForCausalLM: Mistral with experts on every layer, the weights of the chosen ones made to sum to 1."""
    sizes = read_sizes(fields, kv_heads=8)
    layers = sizes["num_layers"]
    window = fields.integer_or_none("sliding_window")
    experts = fields.integer("num_local_experts", 8)
    chosen = fields.integer("num_experts_per_tok", 2)
    if chosen > experts:
        raise fields.error("num_experts_per_tok", chosen, f"1 to num_local_experts={experts}")
    return sizes | {
        "norm_eps": fields.number("rms_norm_eps", 1e-5),
        "activation": fields.choice("hidden_act", EXPERT_ACTIVATIONS, "silu"),
        "windows": read_windows(fields, [FULL if window is None else SLIDING] * layers, window),
        "ropes": (read_rope(fields, sizes["head_dim"], 1_000_000.0),) * layers,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "num_experts": experts,
        "experts_per_token": chosen,
        "moe_intermediate_size": sizes["intermediate_size"],
        "sparse_layers": (True,) * layers,
    }
