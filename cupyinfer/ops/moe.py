"""Mixture of experts: choosing experts for each token, and the experts' gated MLP as grouped matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError, invalid
from cupyinfer.runtime.activations import activation
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.gemm_plan import ring_bytes, split_warps
from cupyinfer.runtime.kernels import KernelSource, cdiv, get, launch
from cupyinfer.types import Array, dtype_of

KINDS = ("silu", "gelu_tanh")
MAX_EXPERTS, MAX_CHOICES = 256, 32  # as in rawkernels/moe/route.cu and sort.cu
_CTYPES = ("float", "fp16", "bf16")


def _compiles(macros: Any) -> bool:
    """The activation is in the gate product only, and float32 tiles have 8 rows."""
    return (macros["GATE"] or macros["ACTIVATION"] == KINDS[0]) and (macros["DTYPE"] != "float" or macros["ROWS"] == 8)


ROUTE_SOURCE = KernelSource("moe/route.cu", ("route",), {"DTYPE": _CTYPES})
SORT = KernelSource("moe/sort.cu", ("sort_by_expert",))
COMBINE = KernelSource("moe/combine.cu", ("combine",), {"DTYPE": _CTYPES})
FEW = KernelSource(
    "moe/experts_few.cu",
    ("experts_few",),
    {"DTYPE": _CTYPES, "GATE": (0, 1), "ACTIVATION": KINDS, "ROWS": (8, 16)},
    only=_compiles,
)
TILED = KernelSource(
    "moe/experts_tiled.cu",
    ("experts_tiled",),
    {"DTYPE": _CTYPES[1:], "GATE": (0, 1), "ACTIVATION": KINDS, "ROWS": (64, 128)},
    only=_compiles,
)


# --- NumPy reference ------------------------------------------------------------------------------------------------
def _route_reference(logits, weights, experts, renormalise):
    wide = logits.astype(np.float32)
    chosen = np.argsort(-wide, axis=1, kind="stable")[:, : experts.shape[1]]
    probabilities = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    picked = np.take_along_axis(probabilities, chosen, axis=1)
    experts[...] = chosen
    weights[...] = picked / picked.sum(axis=1, keepdims=True) if renormalise else picked


def _moe_mlp_reference(x, weights, experts, gate_up, down, out, kind, arena=None):
    (T, k), E, F = experts.shape, x.shape[1], down.shape[2]
    wide = x.astype(np.float32, copy=False)
    pairs = np.zeros((T, k, E), np.float32)
    for expert in np.unique(experts):
        if not 0 <= expert < len(down):
            continue
        token, choice = np.nonzero(experts == expert)
        both = wide[token] @ gate_up[expert].astype(np.float32, copy=False).T
        hidden = activation(both[:, :F], kind) * both[:, F:]
        pairs[token, choice] = hidden @ down[expert].astype(np.float32, copy=False).T
    out[...] = np.einsum("tke,tk->te", pairs, weights)


# --- CUDA launchers -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MoePlan:
    """Which product kernel a call takes, and its tiles: rows of one, how many there are at most, warps of a block."""

    entry: str
    rows: int
    max_tiles: int
    gate_warps: int
    down_warps: int


def moe_plan(T: int, k: int, X: int, E: int, F: int, itemsize: int) -> MoePlan:
    """Few rows for each expert (and float32) stream the weights; many rows take tensor-core tiles.

    The number of tiles is the most that T * k choices can need however they fall on X experts, so the launch shape does
    not depend on the routing and a graph can replay it.
    """
    pairs = T * k
    few = itemsize == 4 or pairs <= 8 * X
    if few:
        rows = 8 if itemsize == 4 or T <= 8 else 16
        warps = split_warps(E * itemsize, 8), split_warps(F * itemsize, 8)
    else:
        rows, warps = 64 if pairs <= 96 * X else 128, (8, 8)
    max_tiles = (pairs + min(pairs, X) * (rows - 1)) // rows
    return MoePlan("experts_few" if few else "experts_tiled", rows, max_tiles, *warps)


def _route_launch(logits, weights, experts, renormalise):
    (T, X), k = logits.shape, experts.shape[1]
    kernel = get(ROUTE_SOURCE, "route", DTYPE=dtype_of(logits).ctype)
    args = (logits, weights, experts, np.int32(T), np.int32(X), np.int32(k), np.int32(renormalise))
    launch(kernel, (cdiv(T, 4),), (128,), args)


def _products(
    plan: MoePlan, gate: int, kind: str, x: Array, w: Array, sorted_: Array, tiles: Array, out: Array, k: int
):
    """Start one of the two grouped products (rawkernels/moe/experts_few.cu, experts_tiled.cu)."""
    N, I = out.shape[1], x.shape[1]
    macros = {"DTYPE": dtype_of(x).ctype, "GATE": gate, "ACTIVATION": kind if gate else KINDS[0], "ROWS": plan.rows}
    args = (x, w, sorted_, tiles, out, np.int32(k), np.int32(N), np.int32(I))
    if plan.entry == "experts_few":
        warps = plan.gate_warps if gate else plan.down_warps
        grid = (cdiv(N, 8 if gate else 16), plan.max_tiles)
        launch(get(FEW, plan.entry, **macros), grid, (32 * warps,), args, shared=warps * ring_bytes(2))
    else:
        grid, stage = (plan.max_tiles, cdiv(N, 64 if gate else 128)), (plan.rows + 128) * 128
        launch(get(TILED, plan.entry, **macros), grid, (256,), args, shared=3 * stage)


def _moe_mlp_launch(x, weights, experts, gate_up, down, out, kind, arena):
    (T, k), (X, E, F) = experts.shape, down.shape
    if out.size == 0:
        return
    if arena is None:
        raise ContractError("moe_mlp: argument arena is missing; a GPU needs it for scratch memory")
    for name, array in (("x", x), ("gate_up", gate_up), ("down", down)):
        if array.data.ptr % 16:
            raise ContractError(f"moe_mlp: {name} must start at a multiple of 16 bytes")
    plan, pairs, dtype = moe_plan(T, k, X, E, F, x.itemsize), T * k, x.dtype
    order = arena.take("moe.order", (pairs,), np.int32)
    tiles = arena.take("moe.tiles", (plan.max_tiles, 4), np.int32)
    hidden = arena.take("moe.hidden", (pairs, F), dtype)
    results = arena.take("moe.results", (pairs, E), dtype)
    args = (experts, order, tiles, np.int32(pairs), np.int32(X), np.int32(plan.rows), np.int32(plan.max_tiles))
    launch(get(SORT, "sort_by_expert"), (X,), (256 if pairs <= 2048 else 1024,), args)
    _products(plan, 1, kind, x, gate_up, order, tiles, hidden, k)
    _products(plan, 0, kind, hidden, down, order, tiles, results, k)
    args = (results, weights, experts, out, np.int32(X), np.int32(E), np.int32(k))
    launch(get(COMBINE, "combine", DTYPE=dtype_of(x).ctype), (T, cdiv(E * x.itemsize, 16 * 128)), (128,), args)


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
    skew = np.linspace(0, 1, X, dtype=np.float32)  # later experts are hit more often, some of them never
    experts = np.argsort(draw(T, X) - skew, axis=1)[:, :k].astype(np.int32)
    weights = np.abs(draw(T, k))
    return {
        "x": draw(T, E).astype(dtype),
        "weights": weights / weights.sum(axis=1, keepdims=True),
        "experts": np.ascontiguousarray(experts),
        "gate_up": (draw(X, 2 * F, E) / np.sqrt(E)).astype(dtype),
        "down": (draw(X, E, F) / np.sqrt(F)).astype(dtype),
        "out": np.full((T, E), np.nan, dtype),
        "kind": kind,
        "arena": Arena(np),
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
    sizes=(
        *({"T": t, "X": x, "k": k} for t in (1, 3, 17) for x, k in ((8, 2), (128, 8), (60, 4), (2, 2), (256, 16))),
        *({"T": t, "X": 128, "k": 8, "renormalise": False} for t in (1, 33, 256)),
        {"T": 5, "X": 1, "k": 1},
        {"T": 0, "X": 8, "k": 2},
    ),
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
    sizes=(
        *({"T": t, "X": 8, "k": 2, "E": 64, "F": 96} for t in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 100, 256, 800)),
        *({"T": t, "X": 32, "k": 8, "E": 72, "F": 40, "kind": "gelu_tanh"} for t in (1, 7, 33, 150)),
        {"T": 1, "X": 16, "k": 4, "E": 2048, "F": 768},
        {"T": 40, "X": 4, "k": 2, "E": 264, "F": 520},
        {"T": 3, "X": 1, "k": 1, "E": 8, "F": 8},
        {"T": 0, "X": 8, "k": 2, "E": 16, "F": 24},
    ),
    cost=_cost_mlp,
    tolerance={"float32": 5e-6, "float16": 2e-3, "bfloat16": 1e-2},
)


# --- public functions -----------------------------------------------------------------------------------------------
def _check_sizes(X: int, E: int, F: int) -> None:
    """What the kernels ask for beyond the contract. Raises ContractError."""
    if X > MAX_EXPERTS or E % 8 or F % 8:
        raise ContractError(f"moe_mlp: X={X}, E={E}, F={F}; allowed: X <= {MAX_EXPERTS}, E and F multiples of 8")


def route(logits: Array, top_k: int, renormalise: bool, *, weights: Array, experts: Array) -> tuple[Array, Array]:
    """Choose ``top_k`` experts for each token.

    logits [T, X]; weights [T, k] float32 and experts [T, k] int32 are written, largest first. The softmax is over all X
    experts in float32; ``renormalise`` divides the chosen probabilities by their sum. Equal logits: lower index first.
    Raises ContractError. Source: Hugging Face MixtralTopKRouter, Qwen3MoeTopKRouter (norm_topk_prob).
    """
    X = logits.shape[-1]
    if not 1 <= top_k <= min(X, MAX_CHOICES) or experts.shape[-1] != top_k:
        allowed = f"1 to {min(X, MAX_CHOICES)} (X={X}), and the columns of experts, which has shape {experts.shape}"
        raise ContractError(f"route: top_k={top_k} is not allowed; allowed: {allowed}")
    if X > MAX_EXPERTS:
        raise ContractError(f"route: {X} experts; allowed: at most {MAX_EXPERTS}")
    ROUTE(logits=logits, weights=weights, experts=experts, renormalise=renormalise)
    return weights, experts


def moe_mlp(
    x: Array,
    weights: Array,
    experts: Array,
    gate_up: Array,
    down: Array,
    kind: str = "silu",
    *,
    out: Array,
    arena: Arena | None = None,
) -> Array:
    """The weighted sum of the chosen experts' gated MLPs for each token; x and out [T, E].

    weights [T, k] float32, experts [T, k] int32 (an index outside 0..X-1 adds nothing), gate_up [X, 2F, E] (gate rows
    first), down [X, E, F], kind ``silu`` or ``gelu_tanh``; on a GPU X <= 256, E and F multiples of 8. Sums are float32;
    the choices are added in their order, so the same bits every time. ``arena`` gives the scratch memory on a GPU.
    Raises ContractError. Source: Hugging Face MixtralExperts, Qwen3MoeExperts.
    """
    if kind not in KINDS:
        raise invalid("kind", kind, ", ".join(KINDS))
    if not isinstance(down, np.ndarray):
        _check_sizes(*down.shape)
    MOE_MLP(x=x, weights=weights, experts=experts, gate_up=gate_up, down=down, out=out, kind=kind, arena=arena)
    return out
