"""Shapes of well-known models, for benchmarks without a download: ``--model dummy:llama-3.1-8b``."""

from __future__ import annotations

from typing import Any

from cupyinfer.errors import invalid
from cupyinfer.model.config import ModelConfig, resolve_config

PREFIX = "dummy:"

# The fields of the published config.json files that give a shape or a constant.
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "dtype": "bfloat16",
}
PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-14b": _QWEN3
    | {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "dtype": "bfloat16",
    },
}


def dummy_config(name: str) -> ModelConfig:
    """The configuration of a preset: a key of PRESETS, with or without ``dummy:`` in front. Raises ConfigError."""
    key = name.removeprefix(PREFIX)
    if key not in PRESETS:
        raise invalid("model", name, ", ".join(PREFIX + preset for preset in PRESETS))
    return resolve_config(PRESETS[key])
