"""Make tests/golden/: tiny random checkpoints saved by transformers, with its float32 outputs beside them.

    python tests/model/make_goldens.py [name ...]

Needs torch and transformers. Every parameter is random, norm weights and biases too, so that a forgotten one shows.
A seed is kept only if the greedy continuations are varied and every choice in them is clear: the two best logits are
MARGIN apart (and the last chosen expert and the first one left out), so that another order of float32 sums cannot
change a token; and if bfloat16 changes transformers' own logits little, so that a test of 16-bit kernels measures
the kernels. golden.npz of each model holds, for prompts of p tokens: ``prompt_p``, ``tokens_p`` (the greedy
continuation), ``rows_p`` (positions in the prompt) and ``logits_p`` (the logits there).
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PROMPTS = (1, 17, 300)
NEW_TOKENS = 64
MARGIN = 1e-3
EXPERT_MARGIN = 1e-4
DISTINCT = 16  # different tokens that a continuation must have
ROUNDING = 0.013  # relative change of the logits when transformers computes in bfloat16
ROWS = (0, 5, 70, 150)  # prompt positions whose logits are kept, besides the last

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2_SIZES = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "eos_token_id": 2}
GPT2_SIZES |= {"bos_token_id": 1}


@dataclass(frozen=True)
class Golden:
    """One checkpoint: transformers' classes, the fields that differ from ``sizes``, type and size of its files."""

    family: str  # LlamaForCausalLM and LlamaConfig: "Llama"
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard: str = "10MB"
    config_class: str = ""
    model_class: str = ""
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)

    def build(self, seed: int, **overrides: Any) -> Any:
        """A random float32 model."""
        config_class = getattr(transformers, self.config_class or f"{self.family}Config")
        model_class = getattr(transformers, self.model_class or f"{self.family}ForCausalLM")
        config = config_class(**copy.deepcopy({**self.sizes, **self.fields, **overrides}))
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        randomize(model, seed)
        return model


def rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = rope("llama3", 5e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
GOLDENS = {
    "llama": Golden("Llama", {"num_key_value_heads": 2, "num_attention_heads": 2}, torch.bfloat16),
    "llama3": Golden("Llama", {**LLAMA3, "tie_word_embeddings": True}, torch.bfloat16, shard="60KB"),
    "llama-linear": Golden("Llama", rope("linear", factor=2.0), torch.float16),
    "llama-yarn": Golden("Llama", {**YARN, "attention_bias": True, "mlp_bias": True}, torch.bfloat16),
    "mistral": Golden("Mistral", {"sliding_window": 40}, shard="80KB"),
    "qwen2": Golden("Qwen2", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}, torch.float16),
    "qwen3": Golden("Qwen3", {"tie_word_embeddings": True}, torch.bfloat16),
    "gemma2": Golden(
        "Gemma2",
        {
            "sliding_window": 48,
            "query_pre_attn_scalar": 20,
            "hidden_size": 48,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": Golden(
        "Gemma3",
        {
            "sliding_window": 33,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
            "hidden_size": 48,
            "intermediate_size": 64,
        },
        torch.bfloat16,
        config_class="Gemma3TextConfig",
    ),
    "gpt2": Golden("GPT2", shard="150KB", model_class="GPT2LMHeadModel", sizes=GPT2_SIZES),
    "mixtral": Golden(
        "Mixtral",
        {"num_experts_per_tok": 2, "intermediate_size": 64, "num_local_experts": 4},
        torch.bfloat16,
        shard="60KB",
    ),
    "qwen3-moe": Golden(
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "hidden_size": 48,
        },
        torch.bfloat16,
    ),
}


def randomize(model: Any, seed: int) -> None:
    """Draw every parameter: matrices of gain 1 or 1.6, norm weights around the identity, biases."""
    draw = torch.Generator().manual_seed(seed)
    gemma, gpt2 = "Gemma" in type(model).__name__, "GPT2" in type(model).__name__
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=draw)
        if "norm" in name or ".ln_" in name:
            values = 0.3 * values + (0.0 if gemma or name.endswith("bias") else 1.0)
            values += 15.0 if gemma and name == "model.norm.weight" else 0.0  # undoes the small embeddings in logits
        elif name.endswith("bias"):
            values *= 0.3
        elif "embed" in name or "wte" in name or "wpe" in name:
            values *= 0.03 if gemma else 0.5  # large tied embeddings would make each token predict itself
        else:
            fan_in = parameter.shape[0] if gpt2 else parameter.shape[-1]
            sharp = "q_proj" in name or "k_proj" in name  # steep softmaxes would blow up 16-bit rounding errors
            values *= (1.0 if sharp else 1.6) * fan_in**-0.5
        with torch.no_grad():
            parameter.copy_(values)


def save(model: Any, directory: Path, dtype: torch.dtype, shard: str) -> None:
    """Save as transformers does, rounded to ``dtype``."""
    if directory.exists():
        shutil.rmtree(directory)
    copy.deepcopy(model).to(dtype).save_pretrained(directory, max_shard_size=shard)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers makes of the files."""
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def make_prompt(length: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, vocab, length).astype(np.int32)


@torch.no_grad()
def continue_greedily(model: Any, prompt: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(logits of every prompt position [p, V], greedy tokens [steps], smallest gap between the two best logits)."""
    cache = transformers.DynamicCache(config=model.config)
    out = model(torch.from_numpy(prompt.astype(np.int64))[None], past_key_values=cache, use_cache=True)
    prompt_logits = out.logits[0].float().numpy()
    tokens, gap = [], np.inf
    for _ in range(steps):
        best = torch.topk(out.logits[0, -1].float(), 2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        out = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
    return prompt_logits, np.array(tokens, np.int32), gap


@contextmanager
def expert_gaps(model: Any) -> Iterator[list[float]]:
    """Collects, for each call of a router, the smallest gap between a chosen and a rejected expert's logit."""
    gaps: list[float] = []

    def hook(module: Any, _: Any, output: Any) -> None:
        ordered = output[0].sort(dim=-1, descending=True).values
        gaps.append(float((ordered[:, module.top_k - 1] - ordered[:, module.top_k]).min()))

    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    handles = [router.register_forward_hook(hook) for router in routers]
    yield gaps
    for handle in handles:
        handle.remove()


def outputs(model: Any) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of golden.npz, and why this model will not do (or an empty string)."""
    arrays: dict[str, np.ndarray] = {}
    why = ""
    with expert_gaps(model) as gaps:
        for length in PROMPTS:
            prompt = make_prompt(length, model.config.vocab_size)
            logits, tokens, gap = continue_greedily(model, prompt, NEW_TOKENS)
            rows = np.array([row for row in ROWS if row < length - 1] + [length - 1], np.int32)
            arrays |= {f"prompt_{length}": prompt, f"tokens_{length}": tokens}
            arrays |= {f"rows_{length}": rows, f"logits_{length}": logits[rows]}
            if gap < MARGIN:
                why = why or f"prompt {length}: gap {gap:.1e}"
            if len(set(tokens.tolist())) < DISTINCT:
                why = why or f"prompt {length}: only {len(set(tokens.tolist()))} different tokens"
    if min(gaps, default=1.0) < EXPERT_MARGIN:
        why = why or f"experts: gap {min(gaps):.1e}"
    return arrays, why


@torch.no_grad()
def rounding_error(model: Any, arrays: dict[str, np.ndarray]) -> float:
    """Relative change of the kept logits when ``model`` (16 bits) computes them."""
    error = norm = 0.0
    for length in PROMPTS:
        ids = torch.from_numpy(arrays[f"prompt_{length}"].astype(np.int64))[None]
        want = arrays[f"logits_{length}"]
        error += float(((model(ids).logits[0].float().numpy()[arrays[f"rows_{length}"]] - want) ** 2).sum())
        norm += float((want**2).sum())
    return (error / norm) ** 0.5


def make(name: str) -> None:
    golden, directory = GOLDENS[name], GOLDEN / name
    for seed in range(200):
        save(golden.build(seed), directory, golden.dtype, golden.shard)
        arrays, why = outputs(load(directory))
        if not why and (rounding := rounding_error(load(directory, torch.bfloat16), arrays)) > ROUNDING:
            why = f"bfloat16: error {rounding:.1e}"
        if not why:
            np.savez_compressed(directory / "golden.npz", **arrays)
            size = sum(file.stat().st_size for file in directory.iterdir())
            print(f"{name}: seed {seed}, {size / 1024:.0f} KiB")
            return
        print(f"{name}: seed {seed} rejected, {why}")
    raise SystemExit(f"{name}: no seed will do")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or GOLDENS:
        make(chosen)
