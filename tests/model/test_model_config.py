"""config.json -> ModelConfig: both spellings, every family's particulars, and everything that must be refused."""

from __future__ import annotations

import json

import pytest

from cupyinfer.errors import CheckpointError, ConfigError
from cupyinfer.model.config import read_config, resolve_config
from cupyinfer.model.presets import PRESETS, dummy_config
from cupyinfer.model.weights import parameter_count

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
GEMMA3 |= {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 64}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 99, "n_embd": 64, "n_layer": 1, "n_head": 2}
GPT2 |= {"n_positions": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def family(architecture: str, **fields) -> dict:
    return LLAMA | {"architectures": [architecture], "model_type": None} | fields


def test_llama():
    config = resolve_config(LLAMA | {"torch_dtype": "bfloat16"}, {"eos_token_id": [3, 2]})
    assert (config.head_dim, config.num_kv_heads, config.qkv_heads) == (32, 2, 8)
    assert config.attention_scale == pytest.approx(32**-0.5)
    assert config.windows == (0, 0, 0, 0) and config.ropes[0].theta == 10000.0
    assert config.eos_token_ids == (3, 2) and config.bos_token_id == 1 and config.dtype == "bfloat16"
    assert not config.tie_embeddings and config.kv_cache_shape(7, 16) == (7, 2, 2, 16, 32)


@pytest.mark.parametrize(
    "rope", [LLAMA3 | {"original_max_position_embeddings": 64}, YARN, {"rope_type": "linear", "factor": 2.0}]
)
def test_both_spellings_of_rope_agree(rope):
    old_scaling = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    old = resolve_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": old_scaling, "torch_dtype": "float16"})
    new = resolve_config(LLAMA | {"rope_parameters": rope | {"rope_theta": 5e5}, "dtype": "float16"})
    assert old == new and new.ropes[0].theta == 5e5 and new.ropes[0].kind == rope["rope_type"]


def test_yarn_defaults():
    rope = resolve_config(LLAMA | {"rope_scaling": YARN}).ropes[0]
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)
    assert rope.attention_factor == pytest.approx(0.1 * 1.3862943611 + 1.0)
    scaled = resolve_config(LLAMA | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}).ropes[0]
    assert scaled.attention_factor == 1.0
    unset = resolve_config(LLAMA | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0}}).ropes[0]
    assert unset.attention_factor == rope.attention_factor


def test_original_context_defaults_to_the_context():
    assert resolve_config(LLAMA | {"rope_scaling": LLAMA3}).ropes[0].original_max_positions == 1024


def test_mistral_windows():
    assert resolve_config(family("MistralForCausalLM", sliding_window=100)).windows == (100,) * 4
    assert resolve_config(family("MistralForCausalLM", sliding_window=None)).windows == (0,) * 4
    assert resolve_config(family("MistralForCausalLM")).windows == (4096,) * 4


def test_qwen2_windows_start_above_max_window_layers():
    windowed = family("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=50, max_window_layers=3)
    assert resolve_config(windowed).windows == (0, 0, 0, 50)
    assert resolve_config(windowed | {"use_sliding_window": False}).windows == (0,) * 4
    assert resolve_config(windowed).qkv_bias and not resolve_config(windowed).out_bias


def test_qwen3_moe_layers():
    fields = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 64}
    sparse = family("Qwen3MoeForCausalLM", **fields, decoder_sparse_step=2, mlp_only_layers=[3])
    config = resolve_config(sparse)
    assert config.sparse_layers == (False, True, False, False) and config.qk_norm and config.head_dim == 64
    assert not config.renormalize_experts
    renamed = {key: value for key, value in sparse.items() if key != "num_experts"} | {"num_local_experts": 8}
    assert resolve_config(renamed) == config


def test_gemma2():
    config = resolve_config(family("Gemma2ForCausalLM", head_dim=64, query_pre_attn_scalar=100, sliding_window=64))
    assert config.windows == (64, 0, 64, 0) and config.norm_offset == 1.0 and config.post_norms
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert config.attention_scale == pytest.approx(0.1) and config.embed_scale == pytest.approx(128**0.5)
    assert config.activation == "gelu_tanh" and config.tie_embeddings
    uncapped = family("Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert resolve_config(uncapped).attention_softcap == resolve_config(uncapped).logit_softcap == 0.0


def test_gemma3_old_and_new_spelling_agree():
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = GEMMA3 | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": scaling,
        "sliding_window_pattern": 6,
    }
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    ropes = {"full_attention": scaling | {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    new = GEMMA3 | {"rope_parameters": ropes, "layer_types": kinds}
    config = resolve_config(old)
    assert config == resolve_config(new)
    assert config.windows == (64,) * 5 + (0, 64)
    assert [rope.theta for rope in config.ropes] == [1e4] * 5 + [1e6, 1e4]
    assert [rope.factor for rope in config.ropes] == [1.0] * 5 + [8.0, 1.0]


def test_gpt2():
    config = resolve_config(GPT2)
    assert config.intermediate_size == 256 and config.positions == "learned" and not config.gated_mlp
    assert config.tie_embeddings and config.norm == "layer" and config.activation == "gelu_tanh"
    medium = GPT2 | {"n_special": 0, "predict_special_tokens": True, "output_past": True}  # as on the hub
    assert resolve_config(medium) == config


def test_model_type_serves_where_architectures_are_missing():
    fields = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert resolve_config(fields) == resolve_config(LLAMA)


def test_end_tokens_beyond_the_vocabulary_are_dropped():
    config = resolve_config(GPT2 | {"eos_token_id": 50256, "bos_token_id": 50256})
    assert config.eos_token_ids == () and config.bos_token_id is None


def test_fields_of_other_tools_do_no_harm():
    extra = {"use_cache": True, "_name_or_path": "x", "unsloth_version": "1", "quirk": None, "rope_interleaved": False}
    extra |= {"max_sequence_length": 2048}  # the first Llama conversions
    assert resolve_config(LLAMA | extra) == resolve_config(LLAMA)


REFUSED = [
    (LLAMA | {"architectures": ["T5ForConditionalGeneration"]}, "architectures.*LlamaForCausalLM"),
    (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures"),
    (LLAMA | {"model_type": "mistral"}, "model_type='mistral'.*llama with architectures"),
    ({"model_type": "bert"}, "model_type='bert'.*gemma3_text"),
    ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden_size is missing"),
    (LLAMA | {"hidden_size": "128"}, "hidden_size='128'.*integer"),
    (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers=True"),
    (LLAMA | {"rms_norm_eps": -1.0}, "rms_norm_eps"),
    (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3.*divisor"),
    (LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size=128.*multiple"),
    (LLAMA | {"head_dim": 15}, "head_dim=15.*even"),
    (LLAMA | {"hidden_act": "xielu"}, "hidden_act='xielu'.*silu"),
    (LLAMA | {"attention_bias": "yes"}, "attention_bias"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: type='dynamic'.*yarn"),
    (LLAMA | {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type='longrope'"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling: field factor is missing"),
    (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
    (LLAMA | {"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast"),
    (LLAMA | {"rope_scaling": YARN, "rope_theta": 1}, "rope_theta=1.0.*> 1"),
    (LLAMA | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    (LLAMA | {"rope_scaling": [1]}, "rope_scaling must hold a JSON object"),
    (LLAMA | {"layer_types": ["full_attention"]}, "layer_types.*4 entries"),
    (LLAMA | {"layer_types": ["sliding_attention"] * 4}, "layer_types.*no sliding window"),
    (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*unquantized"),
    (LLAMA | {"dtype": "float8"}, "dtype='float8'.*bfloat16"),
    (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id"),
    (LLAMA | {"logit_scale": 0.25}, "logit_scale=0.25 is a field that cupyinfer does not know"),
    (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder"),
    (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (family("MistralForCausalLM", attention_bias=True), "attention_bias=True"),
    (
        family("MistralForCausalLM", sliding_window=9, layer_types=["full_attention", "sliding_attention"] * 2),
        "layer_types.*one kind",
    ),
    (family("Qwen2ForCausalLM", max_window_layers=-1), "max_window_layers"),
    (family("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=8), "num_experts_per_tok=8.*num_experts=4"),
    (family("Qwen3MoeForCausalLM", mlp_only_layers=[9]), "mlp_only_layers"),
    (family("MixtralForCausalLM", hidden_act="gelu"), "hidden_act='gelu'"),
    (family("MixtralForCausalLM", num_local_experts=1), "num_experts_per_tok=2"),
    (family("Gemma2ForCausalLM", use_bidirectional_attention=True), "use_bidirectional_attention"),
    (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (GEMMA3 | {"rope_parameters": {"rope_type": "default"}}, "rope_parameters: rope_type"),
    (GEMMA3 | {"rope_scaling": YARN | {"truncate": False}}, "rope_scaling: truncate=False"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx"),
    (family("Qwen3ForCausalLM", use_qk_norm=False), "use_qk_norm=False"),
    (GPT2 | {"n_head": 3}, "n_embd=64"),
    (GPT2 | {"activation_function": "mish"}, "activation_function"),
    ([1, 2], "must hold a JSON object"),
]


@pytest.mark.parametrize("config, message", REFUSED)
def test_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(config)


def test_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 3,')
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
    assert read_config(tmp_path).eos_token_ids == (5, 2)


def test_presets():
    billions = {name: parameter_count(dummy_config(f"dummy:{name}")) / 1e9 for name in PRESETS}
    assert billions["qwen3-0.6b"] == pytest.approx(0.596, abs=0.002)
    assert billions["llama-3.1-8b"] == pytest.approx(8.03, abs=0.01)
    assert billions["qwen3-14b"] == pytest.approx(14.77, abs=0.02)
    with pytest.raises(ConfigError, match="dummy:qwen3-0.6b"):
        dummy_config("dummy:gpt-5")
