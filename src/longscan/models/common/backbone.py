"""The body of a language model: embedding -> [x + mixer(norm(x))] -> norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longscan import ops
from longscan.models.common.layers import RMSNorm, blank
from longscan.models.common.mixer import Block, Blocks, LanguageModelConfig
from longscan.models.common.state import State

__all__ = ["Backbone", "Border"]


class Border(Protocol):
    """Where a part of a sequence touches those that are computed elsewhere."""

    def receive(self, state: Any) -> Any:
        """Return the state of the next layer before the first token; `state` is the initial one."""

    def send(self, x: Tensor, state: Any) -> Tensor:
        """Hand on the state of the layer after the last token; return its output x."""


class Backbone(nn.Module):
    """Maps token ids to the final hidden states, which the head turns into logits.

    Attributes:
        embedding_multiplier: constant factor of the embeddings.
        hidden_multiplier: constant factor of the final hidden states, and so of the logits.
        checkpointing: whether the backward pass computes each block again, and retains its input only.
    """

    embedding_multiplier = 1.0
    hidden_multiplier = 1.0
    checkpointing = False

    def __init__(
        self, config: LanguageModelConfig, blocks: Iterable[Block], generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.layers = Blocks(blocks)
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.embedding = blank(nn.Embedding, config.padded_vocab_size, config.d_model)
        if not self.embedding.weight.is_meta:
            nn.init.normal_(self.embedding.weight, std=0.02, generator=generator)

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        streams: list[Tensor] | None = None,
        *,
        neighbours: Border | None = None,
    ) -> tuple[Tensor, State]:
        """Return the final hidden states of token ids.

        Args:
            ids: (batch, seq_len) integers.
            state: before the first token; the initial state if None.
            seq_idx: (batch, seq_len), see `Mixer.plan`.
            streams: a list that receives the residual stream before each block, (batch, seq_len, d_model).
            neighbours: what has the tokens before and after, if they are a part of a sequence; `state` is
                then the initial one, and the state of a layer comes from the part before.

        Returns:
            hidden: (batch, seq_len, d_model) in the dtype of the weights.
            state: after the last token.

        Raises:
            ValueError: ids are empty, or not of two axes.
        """
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")
        return self.mix(self.embed(ids), state, seq_idx, streams, neighbours)

    def mix(
        self,
        x: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        streams: list[Tensor] | None = None,
        neighbours: Border | None = None,
    ) -> tuple[Tensor, State]:
        """Return the final hidden states of vectors that stand in for embedded tokens.

        Args:
            x: (batch, seq_len, d_model).
            state: see `forward`.
            seq_idx: likewise.
            streams: likewise.
            neighbours: likewise.

        Returns:
            hidden: (batch, seq_len, d_model).
            state: after the last vector.
        """
        before = [None] * len(self.layers) if state is None else state.layers
        plans, after = self.plans(x, before, seq_idx), []
        for layer, layer_state, plan in zip(self.layers, before, plans, strict=True):
            if streams is not None:
                streams.append(x)
            if neighbours is not None:
                layer_state = neighbours.receive(layer_state)
            if self.checkpointing and torch.is_grad_enabled():
                x, layer_state = checkpoint(layer, x, layer_state, plan, use_reentrant=False)
            else:
                x, layer_state = layer(x, layer_state, plan)
            if neighbours is not None:
                x = neighbours.send(x, layer_state)
            after.append(layer_state)
        return self._last(x), State(after, None if state is None else state.model)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """Decode one token per row, ids (batch,), updating the state; return hidden (batch, d_model)."""
        state.reserve(1)
        x = self.embed(ids)
        plans = self.plans(x, state.layers, None)
        for layer, layer_state, plan in zip(self.layers, state.layers, plans, strict=True):
            x = layer.step(x, layer_state, plan)
        return self._last(x)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the initial residual stream, in float32 so that many small additions are not lost.

        Args:
            ids: (...) integers.

        Returns:
            (..., d_model).
        """
        x: Tensor = self.embedding(ids)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x
        return x if self.embedding_multiplier == 1 else x * self.embedding_multiplier

    def native(self) -> list[list[ops.Sublayer] | None]:
        """Return the sublayers of each block for the native decoder; None for a block it cannot run."""
        return [block.native(index) for index, block in enumerate(self.layers)]

    def plans(self, x: Tensor, states: Sequence[Any], seq_idx: Tensor | None) -> list[Any]:
        """Return what each block needs to know of all tokens: the plan of its mixer.

        Args:
            x: (batch, seq_len, d_model) embedded tokens, or (batch, d_model) before a step.
            states: of each block; None is the initial one.
            seq_idx: (batch, seq_len), see `Mixer.plan`.
        """
        return self.layers.plans(x[..., 0], states, seq_idx)

    def _last(self, x: Tensor) -> Tensor:
        """Return the final hidden states of the residual stream."""
        x = self.norm_f(x)
        return x if self.hidden_multiplier == 1 else x * self.hidden_multiplier
