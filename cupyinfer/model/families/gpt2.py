"""GPT-2: LayerNorm with biases everywhere, learned positions, matrices stored [in, out]."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.fields import Fields
from cupyinfer.model.weights import Source

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
_LAYER = (  # tensor, parameter, stored transposed (transformers' Conv1D)
    ("ln_1.weight", "attn_norm", False),
    ("ln_1.bias", "attn_norm_bias", False),
    ("attn.c_attn.weight", "qkv", True),
    ("attn.c_attn.bias", "qkv_bias", False),
    ("attn.c_proj.weight", "out", True),
    ("attn.c_proj.bias", "out_bias", False),
    ("ln_2.weight", "mlp_norm", False),
    ("ln_2.bias", "mlp_norm_bias", False),
    ("mlp.c_fc.weight", "up", True),
    ("mlp.c_fc.bias", "up_bias", False),
    ("mlp.c_proj.weight", "down", True),
    ("mlp.c_proj.bias", "down_bias", False),
)


def read_gpt2(fields: Fields) -> dict[str, Any]:
    """GPT2LMHeadModel."""
    hidden, heads, layers = fields.integer("n_embd"), fields.integer("n_head"), fields.integer("n_layer")
    if hidden % heads:
        raise fields.error("n_embd", hidden, f"a multiple of n_head={heads}")
    head_dim = hidden // heads
    fields.must_be("add_cross_attention", False)
    fields.skip("reorder_and_upcast_attn")  # float32 attention scores, which is what we always compute
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": fields.integer_or_none("n_inner") or 4 * hidden,
        "max_position_embeddings": fields.integer("n_positions"),
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "activation": fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "gated_mlp": False,
        "mlp_bias": True,
        "qkv_bias": True,
        "out_bias": True,
        "attention_scale": head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0,
        "scale_by_layer": fields.flag("scale_attn_by_inverse_layer_idx", False),
        "windows": (0,) * layers,
        "positions": "learned",
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
    }


def gpt2_sources(config: ModelConfig, present: Collection[str]) -> Iterator[Source]:
    """Tensors of a GPT-2 checkpoint; the original release's names lack the ``transformer.`` in front."""
    base = "" if "wte.weight" in present else "transformer."
    yield Source(f"{base}wte.weight", "embed")
    yield Source(f"{base}wpe.weight", "position_embed")
    for index in range(config.num_layers):
        for tensor, parameter, transpose in _LAYER:
            yield Source(f"{base}h.{index}.{tensor}", f"layers.{index}.{parameter}", transpose=transpose)
    yield Source(f"{base}ln_f.weight", "final_norm")
    yield Source(f"{base}ln_f.bias", "final_norm_bias")
    if not config.tie_embeddings:
        yield Source("lm_head.weight", "lm_head")
