"""Where the tensors of a Llama-like checkpoint go. One map serves every family that names its tensors as Llama does."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.weights import Source, fused


@dataclass(frozen=True)
class ExpertNames:
    """How a family spells the parts of its MoE block, relative to the layer."""

    block: str  # "mlp" or "block_sparse_moe"
    gate: str
    up: str
    down: str


QWEN_EXPERTS = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL_EXPERTS = ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def llama_sources(
    config: ModelConfig, present: Collection[str], experts: ExpertNames = QWEN_EXPERTS
) -> Iterator[Source]:
    """Every tensor that a checkpoint of ``config`` must hold. ``present``: the names it does hold."""
    yield Source("model.embed_tokens.weight", "embed")
    for index in range(config.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        yield from _norms(config, theirs, ours)
        yield from _attention(config, theirs, ours)
        if config.is_sparse(index):
            yield from _experts(config, theirs, ours, experts, present)
        else:
            yield from _mlp(config, theirs, ours)
    yield Source("model.norm.weight", "final_norm")
    if not config.tie_embeddings:
        yield Source("lm_head.weight", "lm_head")


def _norms(config: ModelConfig, theirs: str, ours: str) -> Iterator[Source]:
    yield Source(f"{theirs}input_layernorm.weight", f"{ours}attn_norm")
    if config.post_norms:
        yield Source(f"{theirs}post_attention_layernorm.weight", f"{ours}post_attn_norm")
        yield Source(f"{theirs}pre_feedforward_layernorm.weight", f"{ours}mlp_norm")
        yield Source(f"{theirs}post_feedforward_layernorm.weight", f"{ours}post_mlp_norm")
    else:
        yield Source(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm")


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[Source]:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = (("q", q), ("k", kv), ("v", kv))
    yield from fused(f"{ours}qkv", [(f"{theirs}self_attn.{x}_proj.weight", n) for x, n in rows])
    yield Source(f"{theirs}self_attn.o_proj.weight", f"{ours}out")
    if config.qkv_bias:
        yield from fused(f"{ours}qkv_bias", [(f"{theirs}self_attn.{x}_proj.bias", n) for x, n in rows])
    if config.out_bias:
        yield Source(f"{theirs}self_attn.o_proj.bias", f"{ours}out_bias")
    if config.qk_norm:
        yield Source(f"{theirs}self_attn.q_norm.weight", f"{ours}q_norm")
        yield Source(f"{theirs}self_attn.k_norm.weight", f"{ours}k_norm")


def _mlp(config: ModelConfig, theirs: str, ours: str) -> Iterator[Source]:
    F = config.intermediate_size
    for kind, suffix in (("weight", ""), ("bias", "_bias")) if config.mlp_bias else (("weight", ""),):
        yield from fused(f"{ours}up{suffix}", [(f"{theirs}mlp.{x}_proj.{kind}", F) for x in ("gate", "up")])
        yield Source(f"{theirs}mlp.down_proj.{kind}", f"{ours}down{suffix}")


def _experts(
    config: ModelConfig, theirs: str, ours: str, names: ExpertNames, present: Collection[str]
) -> Iterator[Source]:
    """Per-expert matrices, as hubs store them, or already stacked, as transformers 5 holds them in memory."""
    F = config.moe_intermediate_size
    stacked = f"{theirs}mlp.experts.gate_up_proj"
    if stacked in present:
        yield Source(f"{theirs}mlp.gate.weight", f"{ours}router")
        yield Source(stacked, f"{ours}experts_gate_up")
        yield Source(f"{theirs}mlp.experts.down_proj", f"{ours}experts_down")
        return
    yield Source(f"{theirs}{names.block}.gate.weight", f"{ours}router")
    for x in range(config.num_experts):
        expert = f"{theirs}{names.block}.experts.{x}."
        parts = [(f"{expert}{names.gate}.weight", F), (f"{expert}{names.up}.weight", F)]
        yield from fused(f"{ours}experts_gate_up", parts, expert=x)
        yield Source(f"{expert}{names.down}.weight", f"{ours}experts_down", expert=x)
