"""Attention after a short causal convolution of queries, keys and values, as in the hybrids of Mamba-2."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.models.common.attention import Attention, AttentionLayer, AttentionPlan
from longscan.models.common.growable import KV, GrowableState
from longscan.models.common.layers import blank
from longscan.models.common.mixer import Mixer
from longscan.models.common.native_decode import plain
from longscan.ops import causal_conv1d, causal_conv1d_step

__all__ = ["ConvAttention", "ConvKV"]


class _ConvKV(NamedTuple):
    """The fields of `ConvKV`."""

    conv: Tensor
    k: Tensor
    v: Tensor
    length: Tensor


class ConvKV(GrowableState, _ConvKV):
    """The KV cache of one layer, and the last inputs of its convolution.

    Attributes:
        conv: (batch, d_conv - 1, (n_heads + 2 n_kv_heads) d_head), oldest first.
        k: see `KV`.
        v: likewise.
        length: likewise.
    """

    __slots__ = ()
    grows: ClassVar = ("k", "v")

    @property
    def kv(self) -> KV:
        """The KV cache."""
        return KV(self.k, self.v, self.length)


class ConvAttention(Mixer[ConvKV]):
    """Attention after a convolution.

    Args:
        layer: sizes and options of the attention.
        d_conv: taps of the convolution.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    copied = ("conv1d.weight",)

    def __init__(self, layer: AttentionLayer, d_conv: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.attention = Attention(layer, generator)
        self.widths = [layer.n_heads * layer.d_head, *[layer.n_kv_heads * layer.d_head] * 2]
        channels = sum(self.widths)
        self.conv1d = blank(nn.Conv1d, channels, channels, d_conv, groups=channels)
        if not self.conv1d.weight.is_meta:
            nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5), generator=generator)
            assert self.conv1d.bias is not None
            nn.init.uniform_(self.conv1d.bias, -(d_conv**-0.5), d_conv**-0.5, generator=generator)

    def plan(
        self, ids: Tensor, state: ConvKV | None, seq_idx: Tensor | None
    ) -> tuple[Tensor | None, AttentionPlan]:
        """Return the plans of convolution and attention; see `Mixer.plan`."""
        return seq_idx, self.attention.plan(ids, None if state is None else state.kv, seq_idx)

    def forward(
        self, x: Tensor, state: ConvKV | None, plan: tuple[Tensor | None, AttentionPlan], /
    ) -> tuple[Tensor, ConvKV]:
        """Attend to the past; see `Mixer.forward`."""
        conv, kv = (None, None) if state is None else (state.conv, state.kv)
        qkv, conv = causal_conv1d(
            torch.cat(self.attention.project(x), -1),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            None,
            conv,
            plan[0],
        )
        y, kv = self.attention.attend(torch.split(qkv, self.widths, -1), kv, plan[1])
        return y, ConvKV(conv, *kv)

    def init_state(self, batch_size: int) -> ConvKV:
        """Return an empty KV cache and zeros; see `Mixer.init_state`."""
        weight = self.conv1d.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (batch_size, weight.shape[-1] - 1, sum(self.widths))
        conv = torch.zeros(shape, dtype=dtype, device=weight.device)
        return ConvKV(conv, *self.attention.init_state(batch_size))

    def step(self, x: Tensor, state: ConvKV, plan: tuple[Tensor | None, AttentionPlan], /) -> Tensor:
        """Attend to the past of one more token per row; see `Mixer.step`."""
        qkv = torch.cat(self.attention.project(x), -1)
        qkv = causal_conv1d_step(state.conv, qkv, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        return self.attention.attend_step(torch.split(qkv, self.widths, -1), state.kv, plan[1])

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        weight, bias, found = self.conv1d.weight, self.conv1d.bias, self.attention.native(layer, norm)
        if found is None or not plain(weight, bias):
            return None
        [sublayer] = found
        assert isinstance(sublayer.weights, ops.AttentionWeights)
        taps = weight.detach().squeeze(1).T.contiguous()
        weights = dataclasses.replace(sublayer.weights, conv_weight=taps, conv_bias=bias)
        return [sublayer._replace(weights=weights)]
