"""Parameters of a decoder by name and shape, and how tensors of a checkpoint fill them.

Fused on purpose: q, k and v are one matrix, gate and up are one, an MoE layer's experts are stacked. A checkpoint's
tensors are copied straight into their rows of these, so nothing is concatenated in host memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from cupyinfer.model.architecture import ModelConfig
from cupyinfer.types import Array

Shape = tuple[int, ...]
Weights = dict[str, Array]


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint and the rows of a parameter that it fills."""

    tensor: str  # name in the checkpoint
    target: str  # name of the parameter
    start: int = 0  # first row filled
    rows: int | None = None  # rows filled; None: all
    expert: int | None = None  # which matrix of stacked experts; rows count inside it
    transpose: bool = False  # stored [in, out] (GPT-2's Conv1D), wanted [out, in]

    def shape(self, parameter: Shape) -> Shape:
        """The shape that the tensor must have in the checkpoint."""
        inner = parameter if self.expert is None else parameter[1:]
        inner = inner if self.rows is None else (self.rows, *inner[1:])
        return inner[::-1] if self.transpose else inner

    def place(self, parameter: Array) -> Array:
        """The C-contiguous view of ``parameter`` that the tensor fills."""
        inner = parameter if self.expert is None else parameter[self.expert]
        return inner if self.rows is None else inner[self.start : self.start + self.rows]


def fused(target: str, parts: list[tuple[str, int]], expert: int | None = None) -> list[Source]:
    """Tensors (name, rows) stacked along axis 0 of one parameter, in order."""
    sources, start = [], 0
    for tensor, rows in parts:
        sources.append(Source(tensor, target, start, rows, expert))
        start += rows
    return sources


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the decoder: name -> shape. Layer i's names start with ``layers.i.``; biases end in _bias."""
    E = config.hidden_size
    shapes: dict[str, Shape] = {"embed": (config.vocab_size, E)}
    if config.positions == "learned":
        shapes["position_embed"] = (config.max_position_embeddings, E)
    for index in range(config.num_layers):
        layer = _attention_shapes(config) | _mlp_shapes(config, config.is_sparse(index))
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= _norm_shapes(config, "final_norm")
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, E)
    return shapes


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {name: (config.hidden_size,)}
    if config.norm == "layer":
        shapes[f"{name}_bias"] = (config.hidden_size,)
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    E, D, H = config.hidden_size, config.head_dim, config.num_heads
    shapes = _norm_shapes(config, "attn_norm") | {"qkv": (config.qkv_heads * D, E), "out": (E, H * D)}
    if config.qkv_bias:
        shapes["qkv_bias"] = (config.qkv_heads * D,)
    if config.out_bias:
        shapes["out_bias"] = (E,)
    if config.qk_norm:
        shapes |= {"q_norm": (D,), "k_norm": (D,)}
    if config.post_norms:
        shapes["post_attn_norm"] = (E,)
    return shapes


def _mlp_shapes(config: ModelConfig, sparse: bool) -> dict[str, Shape]:
    E, F, X = config.hidden_size, config.intermediate_size, config.num_experts
    shapes = _norm_shapes(config, "mlp_norm")
    if sparse:
        F = config.moe_intermediate_size
        shapes |= {"router": (X, E), "experts_gate_up": (X, 2 * F, E), "experts_down": (X, E, F)}
    else:
        width = 2 * F if config.gated_mlp else F
        shapes |= {"up": (width, E), "down": (E, F)}
        if config.mlp_bias:
            shapes |= {"up_bias": (width,), "down_bias": (E,)}
    if config.post_norms:
        shapes["post_mlp_norm"] = (E,)
    return shapes


def is_norm(name: str) -> bool:
    """True for the weight (not the bias) of a norm."""
    return name.endswith("norm")


def parameter_count(config: ModelConfig) -> int:
    """Numbers in all parameters."""
    total = 0
    for shape in parameter_shapes(config).values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total
