"""The Llama architecture in PyTorch, as small as it can be written and still train well.

Parameter names and arithmetic are those of transformers' LlamaForCausalLM: RMSNorm, half-split RoPE, grouped-query
attention, SwiGLU, tied embeddings. The state dict of `Llama` is therefore a Hugging Face model file as it stands.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

# The two special tokens; prepare.py gives them the first ids.
BEGIN, END = 0, 1


@dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face LlamaConfig that decide shapes and arithmetic."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 7
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


def rope_tables(config, device):
    """cos and sin of each position's angles, [max_position_embeddings, head_dim], both halves alike."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_position_embeddings, device=device).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Half-split RoPE: dimension d is rotated together with d + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention in which num_attention_heads / num_key_value_heads query heads share each key/value head."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        queries, pairs = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, pairs, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, pairs, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then MLP, each added to the residual stream. Dropout exists in training only; Llama has none."""

    def __init__(self, config, dropout):
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(config), Attention(config)
        self.post_attention_layernorm, self.mlp = Norm(config), MLP(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cos, sin):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Token ids [B, T] to logits [B, T, V]; the embedding matrix is the output matrix too."""

    def __init__(self, config, dropout=0.0):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_hidden_layers))
        self.model.norm = Norm(config)
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Each of the 2 L residual branches adds variance, so each starts smaller by its square root.
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.num_hidden_layers) if residual else 1))

    def set_rope(self, device):
        """Place the RoPE tables (plain attributes: they are computed, not saved)."""
        self.cos, self.sin = rope_tables(self.config, device)
        return self.to(device)

    def forward(self, ids):
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.dropout(self.model.embed_tokens(ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)
