"""The decoder of every family: embedding, layers, final norm, output projection, over the ops."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.inputs import StepInputs
from cupyinfer.model.layers import DecoderLayer, Norm
from cupyinfer.model.rope import rope_table
from cupyinfer.model.weights import Weights
from cupyinfer.ops.activation import softcap
from cupyinfer.ops.embedding import embed, gather_rows, resolve_tokens
from cupyinfer.ops.gemm import linear
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.threads import blas_threads, wants_all_threads
from cupyinfer.types import Array, DType


class Decoder:
    """A model ready to run on one device.

    ``weights``: the arrays of ``parameter_shapes(config)``, all of ``dtype`` on the device. ``max_positions``: how many
    positions the rotary tables cover (default: the config's max_position_embeddings). A step allocates nothing outside
    the arena, so it can be captured into a graph; the arrays returned live in the arena until the next step.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, device: Device, dtype: DType, max_positions: int | None = None
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.weights = weights
        self._embed, self._positions = weights["embed"], weights.get("position_embed")
        self._embed_scale = float(np.asarray(config.embed_scale, dtype.numpy))  # as Hugging Face rounds it
        self._head = weights["embed" if config.tie_embeddings else "lm_head"]
        self._rope_tables = {
            rope: device.xp.asarray(rope_table(rope, max_positions or config.max_position_embeddings))
            for rope in set(config.ropes)
        }
        self._largest = max(w.size for name, w in weights.items() if name.startswith("layers."))
        self._layers = [self._layer(index) for index in range(config.num_layers)]
        # the norm after layer i is the first one of layer i + 1, fused with layer i's residual addition
        self._next_norms = [layer.attn_norm for layer in self._layers[1:]] + [Norm(config, weights, "final_norm")]

    def _layer(self, index: int) -> DecoderLayer:
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}
        table = self._rope_tables[self.config.ropes[index]] if self.config.ropes else None
        return DecoderLayer(self.config, own, index, table)

    def _threads(self, rows: int, weight_values: int) -> AbstractContextManager[None]:
        """On the CPU, one BLAS thread where more would only get in each other's way."""
        if self.device.is_cuda or wants_all_threads(rows, weight_values):
            return nullcontext()
        return blas_threads(1)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and rotary tables."""
        tables = sum(table.nbytes for table in self._rope_tables.values())
        return tables + sum(array.nbytes for array in self.weights.values())

    def forward(self, step: StepInputs, kv_caches: Sequence[Array], arena: Arena) -> Array:
        """Logits [N, V] float32 of the rows ``step.logits_indices``; ``kv_caches`` holds one cache a layer."""
        return self.logits(self.hidden(step, kv_caches, arena), step.logits_indices, arena)

    def hidden(self, step: StepInputs, kv_caches: Sequence[Array], arena: Arena) -> Array:
        """Run every layer: the hidden state [T, E] of each token after the final norm."""
        with self._threads(step.num_tokens, self._largest):
            return self._hidden(step, kv_caches, arena)

    def _hidden(self, step: StepInputs, kv_caches: Sequence[Array], arena: Arena) -> Array:
        tokens = step.num_tokens
        shape = (tokens, self.config.hidden_size)
        ids = arena.take("tokens", (tokens,), "int32")
        resolve_tokens(step.token_ids, step.token_rows, step.last_tokens, out=ids)
        residual = arena.take("residual", shape, self.dtype.numpy)
        learned = step.positions if self._positions is not None else None
        embed(
            ids,
            self._embed,
            scale=self._embed_scale,
            positions=learned,
            position_table=self._positions,
            out=residual,
        )
        normed = self._layers[0].attn_norm(residual, arena.take("normed", shape, self.dtype.numpy))
        for layer, norm, kv_cache in zip(self._layers, self._next_norms, kv_caches, strict=True):
            branch = layer(normed, residual, step, kv_cache, arena)
            norm.add(branch, residual, normed)
        return normed

    def logits(self, hidden: Array, indices: Array, arena: Arena) -> Array:
        """Logits [N, V] float32 of the rows ``indices`` [N] of ``hidden`` [T, E], soft-capped where the model asks."""
        rows = indices.shape[0]
        picked = arena.take("picked", (rows, hidden.shape[1]), hidden.dtype)
        gather_rows(hidden, indices, out=picked)
        logits = arena.take("logits", (rows, self.config.vocab_size), "float32")
        with self._threads(rows, self._head.size):
            linear(picked, self._head, out=logits, arena=arena)
        if self.config.logit_softcap:
            softcap(logits, self.config.logit_softcap, out=logits)
        return logits
