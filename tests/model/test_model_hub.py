"""config.json files as the hub has them, written by transformers 4: every key of theirs, the sizes shrunk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from paged_driver import PagedDriver, Sequence

from cupyinfer.model.config import resolve_config
from cupyinfer.model.loader import load_model
from cupyinfer.runtime.device import choose_device

BASE = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 320,
}


def of(architecture: str, model_type: str, context: int, **fields) -> dict:
    return (
        BASE | {"architectures": [architecture], "model_type": model_type, "max_position_embeddings": context} | fields
    )


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA3 |= {"original_max_position_embeddings": 8192}
GEMMA = {"attention_bias": False, "cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA |= {"head_dim": 64, "pad_token_id": 0, "query_pre_attn_scalar": 64, "sliding_window": 64, "rms_norm_eps": 1e-06}
QWEN = {"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": False}
CONFIGS = {
    "Llama-2-7b": of(
        *("LlamaForCausalLM", "llama", 4096),
        num_key_value_heads=4,
        pretraining_tp=1,
        rope_scaling=None,
        torch_dtype="float16",
    ),
    "Llama-3.1-8B": of(
        *("LlamaForCausalLM", "llama", 131072),
        attention_bias=False,
        eos_token_id=[2, 5, 7],
        mlp_bias=False,
        rope_scaling=LLAMA3,
        rope_theta=500000.0,
    ),
    "Llama-3.2-1B": of(
        *("LlamaForCausalLM", "llama", 131072),
        head_dim=64,
        rope_scaling=LLAMA3 | {"factor": 32.0},
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "SmolLM2-135M": of(
        *("LlamaForCausalLM", "llama", 8192),
        is_llama_config=True,
        rope_interleaved=False,
        rope_theta=100000,
        **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    ),
    "deepseek-coder-1.3b": of(
        "LlamaForCausalLM", "llama", 16384, rope_scaling={"factor": 4.0, "type": "linear"}, rope_theta=100000
    ),
    "Mistral-7B-v0.1": of("MistralForCausalLM", "mistral", 32768, rope_theta=10000.0, sliding_window=40),
    "Mistral-7B-v0.3": of("MistralForCausalLM", "mistral", 32768, rope_theta=1000000.0, sliding_window=None),
    "Mistral-Nemo": of("MistralForCausalLM", "mistral", 131072, head_dim=32, hidden_size=80, sliding_window=None),
    "Qwen2.5-0.5B": of(
        *("Qwen2ForCausalLM", "qwen2", 32768),
        max_window_layers=24,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_mrope=False,
        **QWEN,
    ),
    "Qwen2.5-7B with YaRN": of(
        *("Qwen2ForCausalLM", "qwen2", 32768),
        max_window_layers=28,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        sliding_window=131072,
        **QWEN,
    ),
    "Qwen3-0.6B": of(
        *("Qwen3ForCausalLM", "qwen3", 40960),
        attention_bias=False,
        head_dim=128,
        max_window_layers=28,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=True,
        **QWEN,
    ),
    "Qwen3-Coder-30B-A3B": of(
        *("Qwen3MoeForCausalLM", "qwen3_moe", 262144),
        decoder_sparse_step=1,
        head_dim=128,
        max_window_layers=28,
        mlp_only_layers=[],
        moe_intermediate_size=24,
        norm_topk_prob=True,
        num_experts=16,
        num_experts_per_tok=8,
        output_router_logits=False,
        qkv_bias=False,
        router_aux_loss_coef=0.001,
        shared_expert_intermediate_size=0,
        sliding_window=None,
        use_qk_norm=True,
        **QWEN,
    ),
    "Mixtral-8x7B": of(
        *("MixtralForCausalLM", "mixtral", 32768),
        num_experts_per_tok=2,
        num_local_experts=8,
        output_router_logits=False,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
    ),
    "gemma-2-2b": of(
        *("Gemma2ForCausalLM", "gemma2", 8192),
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        **GEMMA,
    ),
    "gemma-3-1b-it": of(
        *("Gemma3ForCausalLM", "gemma3_text", 32768),
        attn_logit_softcapping=None,
        eos_token_id=[1, 106],
        final_logit_softcapping=None,
        num_hidden_layers=7,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window_pattern=6,
        tie_word_embeddings=True,
        **GEMMA,
    ),
    "gpt2-medium": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 1,
        "embd_pdrop": 0.1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 512,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "n_special": 0,
        "predict_special_tokens": True,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 320,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_is_understood(name):
    config = resolve_config(CONFIGS[name])
    assert config.architecture == CONFIGS[name]["architectures"][0] and config.eos_token_ids
    assert config.dtype == CONFIGS[name].get("torch_dtype", "")


@pytest.mark.hf
@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_as_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    import make_goldens  # needs both

    fields = {key: value for key, value in CONFIGS[name].items() if key not in ("architectures", "model_type")}
    model_class = getattr(transformers, CONFIGS[name]["architectures"][0])
    model = model_class(model_class.config_class(**json.loads(json.dumps(fields)))).eval()
    make_goldens.randomize(model, 5)
    make_goldens.save(model, tmp_path / "m", torch.bfloat16, "100KB")
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIGS[name]))
    prompt = make_goldens.make_prompt(100, 320)
    want = make_goldens.continue_greedily(make_goldens.load(tmp_path / "m"), prompt, 1)[0]
    _, ours = load_model(tmp_path / "m", choose_device("cpu"), max_positions=512)
    got = PagedDriver(ours).step([(Sequence(prompt.tolist()), 100)], every_row=True)
    assert (np.linalg.norm(got - want, axis=1) <= 2e-4 * np.linalg.norm(want, axis=1)).all()
