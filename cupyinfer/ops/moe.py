"""Mixture of experts: choosing experts for each token, and the experts' gated MLP as grouped matrix products."""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError, invalid
from cupyinfer.types import Array

KINDS = ("silu", "gelu_tanh")


# --- NumPy reference ------------------------------------------------------------------------------------------------
def _route_reference(logits, weights, experts, renormalise):
    wide = logits.astype(np.float32)
    chosen = np.argsort(-wide, axis=1, kind="stable")[:, : experts.shape[1]]
    probabilities = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    picked = np.take_along_axis(probabilities, chosen, axis=1)
    experts[...] = chosen
    weights[...] = picked / picked.sum(axis=1, keepdims=True) if renormalise else picked


def _activate(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "silu":
        return x / (1.0 + np.exp(-x))
    return 0.5 * x * (1.0 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)))


def _moe_mlp_reference(x, weights, experts, gate_up, down, out, kind, arena=None):
    (T, k), E, F = experts.shape, x.shape[1], down.shape[2]
    wide = x.astype(np.float32, copy=False)
    pairs = np.zeros((T, k, E), np.float32)
    for expert in np.unique(experts):
        if not 0 <= expert < len(down):
            continue
        token, choice = np.nonzero(experts == expert)
        both = wide[token] @ gate_up[expert].astype(np.float32, copy=False).T
        hidden = _activate(both[:, :F], kind) * both[:, F:]
        pairs[token, choice] = hidden @ down[expert].astype(np.float32, copy=False).T
    out[...] = np.einsum("tke,tk->te", pairs, weights)


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _route_launch(logits, weights, experts, renormalise):
    raise NotImplementedError


def _moe_mlp_launch(x, weights, experts, gate_up, down, out, kind, arena):
    raise NotImplementedError


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample_route(rng, dtype, T, X, k, renormalise=True):
    logits = rng.standard_normal((T, X)).astype(dtype)
    return {
        "logits": logits,
        "weights": np.full((T, k), np.nan, np.float32),
        "experts": np.full((T, k), -1, np.int32),
        "renormalise": renormalise,
    }


def _sample_mlp(rng, dtype, T, X, k, E, F, kind="silu"):
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    experts = np.argsort(draw(T, X), axis=1)[:, :k].astype(np.int32)
    weights = np.abs(draw(T, k))
    return {
        "x": draw(T, E).astype(dtype),
        "weights": weights / weights.sum(axis=1, keepdims=True),
        "experts": np.ascontiguousarray(experts),
        "gate_up": (draw(X, 2 * F, E) / np.sqrt(E)).astype(dtype),
        "down": (draw(X, E, F) / np.sqrt(F)).astype(dtype),
        "out": np.full((T, E), np.nan, dtype),
        "kind": kind,
        "arena": None,
    }


def _cost_mlp(x, experts, gate_up, down, out, **_):
    hit = min(down.shape[0], experts.size)  # the most experts that this many choices can hit
    weights = hit * (gate_up[:1].nbytes + down[:1].nbytes)
    return x.nbytes + out.nbytes + weights, 2 * experts.size * (gate_up[0].size + down[0].size)


ROUTE = Op(
    name="moe_route",
    formula="p = softmax(logits); experts = the k largest (ties: lower index); weights = p[experts] (/ their sum)",
    args=(Arg("logits", "T X"), Arg("weights", "T k", "float32", "out"), Arg("experts", "T k", "int32", "out")),
    scalars={"renormalise": "divide the chosen probabilities by their sum"},
    reference=_route_reference,
    launch=_route_launch,
    sample=_sample_route,
    sizes=({"T": 1, "X": 8, "k": 2}, {"T": 17, "X": 128, "k": 8, "renormalise": False}, {"T": 0, "X": 8, "k": 2}),
    cost=lambda logits, weights, experts, **_: (logits.nbytes + weights.nbytes + experts.nbytes, 4 * logits.size),
    tolerance={"float32": 5e-6, "float16": 5e-6, "bfloat16": 5e-6},
)

MOE_MLP = Op(
    name="moe_mlp",
    formula="out_t = sum_j weights_tj * down_e (act(gate_e x_t) * up_e x_t), e = experts_tj",
    args=(
        Arg("x", "T E"),
        Arg("weights", "T k", "float32"),
        Arg("experts", "T k", "int32"),
        Arg("gate_up", "X 2*F E", doc="rows 0..F-1 are the gate, F..2F-1 the up projection"),
        Arg("down", "X E F"),
        Arg("out", "T E", role="out"),
    ),
    scalars={"kind": "activation of the gate: silu or gelu_tanh"},
    reference=_moe_mlp_reference,
    launch=_moe_mlp_launch,
    sample=_sample_mlp,
    sizes=({"T": 1, "X": 8, "k": 2, "E": 16, "F": 24}, {"T": 33, "X": 8, "k": 2, "E": 64, "F": 96}),
    cost=_cost_mlp,
    tolerance={"float32": 5e-6, "float16": 2e-3, "bfloat16": 1e-2},
)


# --- public functions -----------------------------------------------------------------------------------------------
def route(logits: Array, top_k: int, renormalise: bool, *, weights: Array, experts: Array) -> tuple[Array, Array]:
    """Choose ``top_k`` experts for each token.

    logits [T, X]; weights [T, k] float32 and experts [T, k] int32 are written, largest first. The softmax is over all X
    experts in float32; ``renormalise`` divides the chosen probabilities by their sum. Equal logits: lower index first.
    Raises ContractError. Source: Hugging Face MixtralTopKRouter, Qwen3MoeTopKRouter (norm_topk_prob).
    """
    if experts.shape[-1] != top_k or not 1 <= top_k <= logits.shape[-1]:
        raise ContractError(f"route: top_k={top_k} must be experts.shape[1]={experts.shape[-1]} and at most X")
    ROUTE(logits=logits, weights=weights, experts=experts, renormalise=renormalise)
    return weights, experts


def moe_mlp(
    x: Array, weights: Array, experts: Array, gate_up: Array, down: Array, kind: str = "silu", *, out: Array, arena=None
) -> Array:
    """The weighted sum of the chosen experts' gated MLPs for each token; x and out [T, E].

    weights [T, k] float32, experts [T, k] int32 (an index outside 0..X-1 adds nothing), gate_up [X, 2F, E] (gate rows
    first), down [X, E, F], kind ``silu`` or ``gelu_tanh``. ``arena`` gives the scratch memory on a GPU. Raises
    ContractError. Source: Hugging Face MixtralExperts, Qwen3MoeExperts.
    """
    if kind not in KINDS:
        raise invalid("kind", kind, ", ".join(KINDS))
    MOE_MLP(
        x=x, weights=weights, experts=experts, gate_up=gate_up, down=down, out=out, kind=kind, arena=arena
    )
    return out
