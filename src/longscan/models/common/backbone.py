"""The body of a language model: embedding -> [x + mixer(norm(x))] -> norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from longscan.models.common.layers import RMSNorm, blank
from longscan.models.common.mixer import Block, Blocks, LanguageModelConfig, Mixer
from longscan.models.common.state import State

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """Maps token ids to the final hidden states, which the head turns into logits."""

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
    ) -> tuple[Tensor, State]:
        """Return the final hidden states of token ids.

        Args:
            ids: (batch, seq_len) integers.
            state: before the first token; the initial state if None.
            seq_idx: (batch, seq_len), see `Mixer.plan`.
            streams: a list that receives the residual stream before each block, (batch, seq_len, d_model).

        Returns:
            hidden: (batch, seq_len, d_model) in the dtype of the weights.
            state: after the last token.

        Raises:
            ValueError: ids are empty, or not of two axes.
        """
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")
        return self.mix(self._embed(ids), state, seq_idx, streams)

    def mix(
        self,
        x: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        streams: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """Return the final hidden states of vectors that stand in for embedded tokens.

        Args:
            x: (batch, seq_len, d_model).
            state: see `forward`.
            seq_idx: likewise.
            streams: likewise.

        Returns:
            hidden: (batch, seq_len, d_model).
            state: after the last vector.
        """
        before = [None] * len(self.layers) if state is None else state.layers
        plan, after = self._first.plan(x[..., 0], before[0], seq_idx), []
        for layer, layer_state in zip(self.layers, before, strict=True):
            if streams is not None:
                streams.append(x)
            x, layer_state = layer(x, layer_state, plan)
            after.append(layer_state)
        return self.norm_f(x), State(after, None if state is None else state.model)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """Decode one token per row, ids (batch,), updating the state; return hidden (batch, d_model)."""
        state.reserve(1)
        x, plan = self._embed(ids), self._first.plan(ids, state.layers[0], None)
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x = layer.step(x, layer_state, plan)
        return cast(Tensor, self.norm_f(x))

    @property
    def _first(self) -> Mixer[Any]:
        """The first mixer, whose plan serves all layers."""
        return next(iter(self.layers)).mixer

    def _embed(self, ids: Tensor) -> Tensor:
        """Return the initial residual stream, in float32 so that many small additions are not lost."""
        x: Tensor = self.embedding(ids)
        return x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x
