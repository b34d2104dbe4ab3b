"""The parts of a decoder layer: norm, attention, MLP and mixture of experts, with their weights bound.

Each call reads and writes arrays of the arena, [T, E] at its edges; none allocates. Calls of one kind share their
buffers across layers, so a result is valid until the next layer's call.
"""

from __future__ import annotations

import numpy as np

from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.inputs import StepInputs
from cupyinfer.model.weights import Weights
from cupyinfer.ops.activation import activate, gate_mul
from cupyinfer.ops.attention import paged_decode, paged_prefill
from cupyinfer.ops.gated_linear import fits, gated_linear
from cupyinfer.ops.gemm import linear
from cupyinfer.ops.moe import moe_mlp, route
from cupyinfer.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from cupyinfer.ops.rope import rope_append
from cupyinfer.runtime.arena import Arena
from cupyinfer.types import Array


class Norm:
    """RMSNorm or LayerNorm, as the config says, alone or after a residual addition."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        self.weight = weights[name]
        self.bias = weights.get(f"{name}_bias")  # LayerNorm has one
        self.eps = config.norm_eps
        self.offset = config.norm_offset

    def __call__(self, x: Array, out: Array) -> Array:
        """``out = norm(x)``."""
        if self.bias is not None:
            return layer_norm(x, self.weight, self.bias, self.eps, out=out)
        return rms_norm(x, self.weight, self.eps, self.offset, out=out)

    def add(self, x: Array, residual: Array, out: Array) -> Array:
        """``residual += x``, then ``out = norm(residual)``."""
        if self.bias is not None:
            return add_layer_norm(x, residual, self.weight, self.bias, self.eps, out=out)
        return add_rms_norm(x, residual, self.weight, self.eps, self.offset, out=out)


class Attention:
    """QKV projection, rotary positions and cache append, paged attention, output projection."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, rope_table: Array | None) -> None:
        self.heads, self.qkv_heads, self.head_dim = config.num_heads, config.qkv_heads, config.head_dim
        self.qkv, self.qkv_bias = weights["qkv"], weights.get("qkv_bias")
        self.out, self.out_bias = weights["out"], weights.get("out_bias")
        self.q_norm, self.k_norm = weights.get("q_norm"), weights.get("k_norm")
        self.norm_eps, self.norm_offset = config.norm_eps, config.norm_offset
        self.rope_table = rope_table
        self.scale = config.attention_scale / (layer + 1 if config.scale_by_layer else 1)
        self.window = config.windows[layer]
        self.softcap = config.attention_softcap

    def __call__(self, x: Array, step: StepInputs, kv_cache: Array, arena: Arena) -> Array:
        """x [T, E] -> [T, E]; keys and values of the step's tokens are appended to kv_cache [P, 2, K, S, D]."""
        tokens, dtype = x.shape[0], x.dtype
        N, H, D = self.qkv_heads, self.heads, self.head_dim
        linear(x, self.qkv, self.qkv_bias, out=arena.take("qkv", (tokens, N * D), dtype), arena=arena)
        q = rope_append(
            arena.take("qkv", (tokens, N, D), dtype),
            step.positions,
            step.slot_mapping,
            self.rope_table,
            kv_cache,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            norm_eps=self.norm_eps,
            norm_offset=self.norm_offset,
            q_out=arena.take("q", (tokens, H, D), dtype),
        )
        self._attend(q, step, kv_cache, arena.take("attended", (tokens, H, D), dtype), arena)
        attended = arena.take("attended", (tokens, H * D), dtype)
        return linear(attended, self.out, self.out_bias, out=arena.take("branch", x.shape, dtype), arena=arena)

    def _attend(self, q: Array, step: StepInputs, kv_cache: Array, out: Array, arena: Arena) -> None:
        """Decode kernels for the sequences with one query token (they come first), prefill kernels for the rest."""
        if step.decodes:
            n = step.num_decodes
            tables, lens = step.decodes
            paged_decode(
                q[:n],
                kv_cache,
                tables,
                lens,
                self.scale,
                window=self.window,
                softcap=self.softcap,
                out=out[:n],
                arena=arena,
            )
        if step.prefills:
            tables, starts, lens, longest = step.prefills
            paged_prefill(
                q,
                kv_cache,
                tables,
                starts,
                lens,
                self.scale,
                longest,
                window=self.window,
                softcap=self.softcap,
                out=out,
            )


class Mlp:
    """down(act(gate x) * up x), or down(act(up x)) for families without a gate."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.up, self.up_bias = weights["up"], weights.get("up_bias")
        self.down, self.down_bias = weights["down"], weights.get("down_bias")
        self.kind, self.gated = config.activation, config.gated_mlp
        self.fusible = self.gated and self.up_bias is None

    def __call__(self, x: Array, arena: Arena) -> Array:
        """x [T, E] -> [T, E]."""
        tokens, dtype = x.shape[0], x.dtype
        inner = arena.take("inner", (tokens, self.down.shape[1]), dtype)
        if self.fusible and type(x) is not np.ndarray and fits(x, self.up):
            gated_linear(x, self.up, self.kind, out=inner)
        else:
            wide = arena.take("up", (tokens, self.up.shape[0]), dtype)
            linear(x, self.up, self.up_bias, out=wide, arena=arena)
            if self.gated:
                gate_mul(wide, self.kind, out=inner)
            else:
                activate(wide, self.kind, out=inner)
        return linear(inner, self.down, self.down_bias, out=arena.take("branch", x.shape, dtype), arena=arena)


class ExpertMlp:
    """A router that picks a few experts for each token, and their gated MLPs."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.router = weights["router"]
        self.gate_up, self.down = weights["experts_gate_up"], weights["experts_down"]
        self.top_k, self.renormalize = config.experts_per_token, config.renormalize_experts
        self.kind = config.activation

    def __call__(self, x: Array, arena: Arena) -> Array:
        """x [T, E] -> [T, E]. The router's logits and weights stay float32."""
        tokens = x.shape[0]
        logits = arena.take("router_logits", (tokens, self.router.shape[0]), "float32")
        linear(x, self.router, out=logits, arena=arena)
        weights, experts = route(
            logits,
            self.top_k,
            self.renormalize,
            weights=arena.take("expert_weights", (tokens, self.top_k), "float32"),
            experts=arena.take("experts", (tokens, self.top_k), "int32"),
        )
        out = arena.take("branch", x.shape, x.dtype)
        return moe_mlp(x, weights, experts, self.gate_up, self.down, self.kind, out=out, arena=arena)


class DecoderLayer:
    """One layer: attention and MLP, each between a norm and a residual addition.

    The first norm is fused with the addition before it, which belongs to the layer before, so the caller applies it.
    """

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, rope_table: Array | None) -> None:
        self.attn_norm = Norm(config, weights, "attn_norm")
        self.attention = Attention(config, weights, layer, rope_table)
        self.post_attn_norm = Norm(config, weights, "post_attn_norm") if config.post_norms else None
        self.mlp_norm = Norm(config, weights, "mlp_norm")
        self.mlp = ExpertMlp(config, weights) if config.is_sparse(layer) else Mlp(config, weights)
        self.post_mlp_norm = Norm(config, weights, "post_mlp_norm") if config.post_norms else None

    def __call__(self, normed: Array, residual: Array, step: StepInputs, kv_cache: Array, arena: Arena) -> Array:
        """``normed`` [T, E] is attn_norm of ``residual`` [T, E]; returns what is to be added to residual next."""
        branch = self.attention(normed, step, kv_cache, arena)
        if self.post_attn_norm:
            branch = self.post_attn_norm(branch, arena.take("post", branch.shape, branch.dtype))
        self.mlp_norm.add(branch, residual, normed)
        branch = self.mlp(normed, arena)
        if self.post_mlp_norm:
            branch = self.post_mlp_norm(branch, arena.take("post", branch.shape, branch.dtype))
        return branch
