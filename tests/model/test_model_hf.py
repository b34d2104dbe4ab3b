"""Live comparison with Hugging Face transformers: other seeds and other shapes than the goldens have.

Needs torch and transformers (marker ``hf``); skipped where they are missing.
"""

from __future__ import annotations

import numpy as np
import pytest
from paged_driver import PagedDriver, Sequence

from cupyinfer.model.config import resolve_config
from cupyinfer.model.loader import load_model
from cupyinfer.model.rope import rope_frequencies, rope_table
from cupyinfer.runtime.device import choose_device

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import make_goldens  # noqa: E402  (needs torch)

pytestmark = pytest.mark.hf
transformers.logging.set_verbosity_error()

WIDE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 211}
CASES = [  # golden, fields that differ from it
    ("llama", WIDE | {"num_key_value_heads": 1, "attention_bias": True}),
    ("llama", {"head_dim": None, "hidden_size": 128, "hidden_act": "gelu"}),
    ("llama", {"head_dim": 6}),
    ("llama3", WIDE),
    ("llama-linear", WIDE | {"num_hidden_layers": 1}),
    (
        "llama-yarn",
        WIDE | {"rope_parameters": make_goldens.rope("yarn", 1e5, factor=3.0, truncate=False)["rope_parameters"]},
    ),
    ("mistral", WIDE | {"sliding_window": None}),
    ("mistral", {"sliding_window": 2}),
    ("qwen2", WIDE | {"num_hidden_layers": 3, "max_window_layers": 2, "sliding_window": 17}),
    ("qwen3", WIDE | {"attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", WIDE | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "num_hidden_layers": 3}),
    ("gemma3", WIDE | {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3", {"final_logit_softcapping": 5.0, "attention_bias": True}),
    ("gemma3", {"head_dim": 24}),
    ("gpt2", {"n_embd": 36, "n_head": 4}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3}),
    ("gpt2", {"n_inner": 80, "n_head": 1, "scale_attn_weights": False, "activation_function": "relu"}),
    ("mixtral", WIDE | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 29}),
    ("qwen3-moe", WIDE | {"decoder_sparse_step": 2, "norm_topk_prob": True, "mlp_only_layers": []}),
    ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 31}),
]
LENGTHS = (1, 23, 140)
STEPS = 24


@pytest.mark.parametrize("name, fields", CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_same_logits_and_tokens(name, fields, tmp_path):
    golden = make_goldens.GOLDENS[name]
    make_goldens.save(golden.build(1000, **fields), tmp_path / "m", golden.dtype, golden.shard)
    theirs = make_goldens.load(tmp_path / "m")
    _, ours = load_model(tmp_path / "m", choose_device("cpu"))
    for length in LENGTHS:
        prompt = make_goldens.make_prompt(length, theirs.config.vocab_size)
        want, tokens, gap = make_goldens.continue_greedily(theirs, prompt, STEPS)
        got = PagedDriver(ours).step([(Sequence(prompt.tolist()), length)], every_row=True)
        error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() <= 2e-4
        if gap > 1e-4:  # below that, another order of sums may choose the other token
            assert PagedDriver(ours).greedy([prompt], STEPS)[1][0] == tokens.tolist()


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        make_goldens.rope("default", 5e5),
        make_goldens.rope("linear", factor=4.0),
        make_goldens.rope("llama3", 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0),
        make_goldens.rope("yarn", factor=4.0, original_max_position_embeddings=128),
        make_goldens.rope("yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0, beta_slow=2.0),
        make_goldens.rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=32768, truncate=False),
    ],
)
def test_rope_tables(rope, dim):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        **rope,
    )
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.arange(4096)[None])
    ours = resolve_config(config.to_dict() | {"dtype": "float32"}).ropes[0]
    assert np.allclose(rope_frequencies(ours), embedding.inv_freq.numpy(), rtol=2e-7, atol=0)
    want = np.concatenate([cos[0, :, : dim // 2], sin[0, :, : dim // 2]], axis=1)
    assert np.abs(rope_table(ours, 4096) - want).max() < 1e-4  # a float32 ulp of an angle of 4096 radians
