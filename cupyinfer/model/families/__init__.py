"""The supported architectures. A family is a config map and a weight-name map; the decoder is the same for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.families.gemma import read_gemma2, read_gemma3
from cupyinfer.model.families.gpt2 import gpt2_sources, read_gpt2
from cupyinfer.model.families.llama import read_llama, read_mistral
from cupyinfer.model.families.mixtral import read_mixtral
from cupyinfer.model.families.names import MIXTRAL_EXPERTS, llama_sources
from cupyinfer.model.families.qwen import read_qwen2, read_qwen3, read_qwen3_moe
from cupyinfer.model.fields import Fields
from cupyinfer.model.weights import Source

# Buffers that some checkpoints carry and that are computed here: rotary frequencies, GPT-2's causal masks.
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*attn\.masked_bias|(.*\.)?h\.\d+\.attn\.bias")


@dataclass(frozen=True)
class Family:
    """One architecture: config.json -> keywords of ModelConfig, and config -> the tensors a checkpoint must hold."""

    architecture: str  # in config.json's ``architectures``
    model_type: str  # in config.json's ``model_type``
    read: Callable[[Fields], dict[str, Any]]
    sources: Callable[[ModelConfig, Collection[str]], Iterable[Source]] = llama_sources


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", read_llama),
        Family("MistralForCausalLM", "mistral", read_mistral),
        Family("Qwen2ForCausalLM", "qwen2", read_qwen2),
        Family("Qwen3ForCausalLM", "qwen3", read_qwen3),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe),
        Family("Gemma2ForCausalLM", "gemma2", read_gemma2),
        Family("Gemma3ForCausalLM", "gemma3_text", read_gemma3),
        Family("GPT2LMHeadModel", "gpt2", read_gpt2, gpt2_sources),
        Family("MixtralForCausalLM", "mixtral", read_mixtral, partial(llama_sources, experts=MIXTRAL_EXPERTS)),
    )
}


def is_harmless(tensor: str, config: ModelConfig) -> bool:
    """True for a tensor of a checkpoint that may be left unread: a buffer, or the head of a model that ties it."""
    return bool(_BUFFERS.fullmatch(tensor)) or (config.tie_embeddings and tensor == "lm_head.weight")
