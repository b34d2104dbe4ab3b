"""What a decoder-only transformer is made of, as frozen data: every family resolves its config.json into this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position parameters of one kind of layer, every default filled in.

    Names follow Hugging Face's ``rope_parameters``. Equal objects share one table on the device.
    """

    theta: float  # base of the frequencies
    rotary_dim: int  # dims of a head that turn
    kind: str = "default"  # default, linear, llama3 or yarn
    factor: float = 1.0  # context extension: linear, llama3, yarn
    original_max_positions: int = 0  # tokens of the context before the extension: llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dims
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it


@dataclass(frozen=True)
class ModelConfig:
    """One model, resolved: nothing is optional, per-layer facts are tuples of ``num_layers`` entries.

    Sizes count elements, positions and windows count tokens. Made by ``read_config`` or ``dummy_config``.
    """

    architecture: str  # as config.json spells it: "LlamaForCausalLM"
    vocab_size: int  # V
    hidden_size: int  # E
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    intermediate_size: int  # F of the dense MLP
    max_position_embeddings: int  # longest context the model was made for
    # normalisation
    norm: str = "rms"  # "rms" or "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to RMSNorm weights: 1 for Gemma
    qk_norm: bool = False  # RMSNorm over each query and key head
    post_norms: bool = False  # norms after attention and MLP, before the residual addition (Gemma)
    # MLP
    activation: str = "silu"  # silu, gelu, gelu_tanh or relu
    gated_mlp: bool = True  # act(gate) * up, else act(up)
    mlp_bias: bool = False
    # attention
    qkv_bias: bool = False
    out_bias: bool = False
    attention_scale: float = 0.0  # multiplies q k^T
    scale_by_layer: bool = False  # layer i divides attention_scale by i + 1
    attention_softcap: float = 0.0  # 0: none
    windows: tuple[int, ...] = ()  # per layer: tokens a query sees, itself included; 0: all
    # positions
    positions: str = "rope"  # "rope" or "learned"
    ropes: tuple[RopeConfig, ...] = ()  # per layer; empty for learned positions
    # ends
    embed_scale: float = 1.0  # multiplies embeddings (rounded to the model's dtype): sqrt(E) for Gemma
    logit_softcap: float = 0.0  # 0: none
    tie_embeddings: bool = False  # the output projection is the embedding table
    # mixture of experts
    num_experts: int = 0  # X; 0: dense
    experts_per_token: int = 0
    moe_intermediate_size: int = 0  # F of one expert
    renormalize_experts: bool = True  # the chosen experts' weights are made to sum to 1
    sparse_layers: tuple[bool, ...] = ()  # per layer: experts instead of the dense MLP
    # tokens and files
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = ""  # of the checkpoint as its config names it; empty when it does not

    @property
    def qkv_heads(self) -> int:
        """H + 2K: heads in the fused QKV projection."""
        return self.num_heads + 2 * self.num_kv_heads

    def is_sparse(self, layer: int) -> bool:
        """True when the layer has experts instead of the dense MLP."""
        return bool(self.sparse_layers) and self.sparse_layers[layer]

    def kv_cache_shape(self, num_pages: int, block_size: int) -> tuple[int, int, int, int, int]:
        """Shape [P, 2, K, S, D] of one layer's cache with ``num_pages`` pages of ``block_size`` tokens."""
        return (num_pages, 2, self.num_kv_heads, block_size, self.head_dim)
