"""An Empirical Study of Mamba-based Language Models: layers of several kinds in one stack.

Roger Waleffe and others, 2024, arXiv 2406.07887. Published hybrids: Falcon-H1 (2507.22448), Granite 4.0,
Bamba, Nemotron-H (2504.03624) and Jamba (2403.19887).

Parents: Mamba2, Mamba and LLaMA, whose layers these are.
Kept: each layer, and its state.
Changed: the order. A few layers of attention recall exactly what the state space model has forgotten; all
others keep a state of constant size.

Deviations from the official codes: those of the parents; every constant factor acts at run time, so that
files round-trip exactly; dt_limit holds in every path; rows of a mixture are grouped by expert.

A model is a string with a letter per layer, and each layer is

    x = x + residual_multiplier f(norm(x))

    M    Mamba-2                            m    Mamba
    *    attention, also after a convolution (attention_conv), as in the hybrids of Mamba-2's paper
    P    Mamba-2 and attention of the same input, added
    -    feed-forward layer                 E    mixture of experts

Glossary: as in Mamba-2 and LLaMA. The multipliers are those of muP (Falcon-H1, Granite): constants beside the
weights, for hyperparameters that fit every size.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from longscan import ops
from longscan.models.common.attention import Attention, AttentionPlan
from longscan.models.common.conv_attention import ConvAttention
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.experts import Experts, Router
from longscan.models.common.feed_forward import Pointwise, SquaredReLU, SwiGLU
from longscan.models.common.growable import KV, GrowableState
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import GatedRMSNorm
from longscan.models.common.mixer import Block, Mixer
from longscan.models.hybrid_config import PRESETS, HybridConfig
from longscan.models.mamba import MambaMixer
from longscan.models.mamba2 import Mamba2Mixer, Mamba2State


class _Parallel(NamedTuple):
    """The fields of `ParallelState`."""

    conv: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor
    length: Tensor


class ParallelState(GrowableState, _Parallel):
    """The state of a Mamba-2 and that of attention.

    Attributes:
        conv: see `Mamba2State`.
        ssm: likewise.
        k: see `KV`.
        v: likewise.
        length: likewise.
    """

    __slots__ = ()
    grows: ClassVar = ("k", "v")

    @property
    def parts(self) -> tuple[Mamba2State, KV]:
        """The two states."""
        return Mamba2State(self.conv, self.ssm), KV(self.k, self.v, self.length)


class Parallel(Mixer[ParallelState]):
    """Mamba-2 and attention of the same input, added.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: HybridConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.mamba = Mamba2Mixer(config.mamba2, generator)
        self.attention = Attention(config.attention, generator)
        self.inward = config.ssm_in_multiplier, config.attention_in_multiplier
        self.outward = config.ssm_out_multiplier, config.attention_out_multiplier

    def plan(
        self, ids: Tensor, state: ParallelState | None, seq_idx: Tensor | None
    ) -> tuple[Tensor | None, AttentionPlan]:
        """Return the plans of both; see `Mixer.plan`."""
        kv = None if state is None else state.parts[1]
        return seq_idx, self.attention.plan(ids, kv, seq_idx)

    def forward(self, x: Tensor, state: ParallelState | None, plan: Any, /) -> tuple[Tensor, ParallelState]:
        """Mix along time in both ways; see `Mixer.forward`."""
        before = (None, None) if state is None else state.parts
        m, recurrent = self.mamba(_scaled(x, self.inward[0]), before[0], plan[0])
        a, kv = self.attention(_scaled(x, self.inward[1]), before[1], plan[1])
        return self._sum(m, a), ParallelState(*recurrent, *kv)

    def init_state(self, batch_size: int) -> ParallelState:
        """Return both initial states; see `Mixer.init_state`."""
        return ParallelState(*self.mamba.init_state(batch_size), *self.attention.init_state(batch_size))

    def step(self, x: Tensor, state: ParallelState, plan: Any, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        recurrent, kv = state.parts
        m = self.mamba.step(_scaled(x, self.inward[0]), recurrent)
        return self._sum(m, self.attention.step(_scaled(x, self.inward[1]), kv, plan[1]))

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return both for the native decoder, the second on the input of the first; see `Mixer.native`."""
        both = self.mamba.native(layer, norm), self.attention.native(layer, None)
        if both[0] is None or both[1] is None:
            return None
        factors = zip((*both[0], *both[1]), self.inward, self.outward, strict=True)
        return [sublayer._replace(in_scale=i, out_scale=o) for sublayer, i, o in factors]

    def _sum(self, m: Tensor, a: Tensor) -> Tensor:
        return _scaled(m, self.outward[0]) + _scaled(a, self.outward[1])


class HybridBlock(Block):
    """x + residual_multiplier mixer(norm(x)), the mixer between constant factors of its own.

    Args:
        config: the configuration.
        mixer: of this layer.
        inward: factor of its input.
        outward: factor of its output.
    """

    def __init__(
        self, config: HybridConfig, mixer: Mixer[Any], inward: float = 1.0, outward: float = 1.0
    ) -> None:
        super().__init__(config, mixer)
        self.inward, self.outward = inward, outward * config.residual_multiplier

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the mixer's output to the residual stream x (batch, seq_len, d_model); see `Mixer.forward`."""
        y, state = self.mixer(_scaled(self.norm(x), self.inward), state, plan)
        return torch.add(x, y, alpha=self.outward), state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Add the mixer's output for one token per row, x (batch, d_model); see `Mixer.step`."""
        y = self.mixer.step(_scaled(self.norm(x), self.inward), state, plan)
        return torch.add(x, y, alpha=self.outward)

    def native(self, layer: int) -> list[ops.Sublayer] | None:
        """Return the sublayers for the native decoder, with all factors; see `Block.native`."""
        return [
            s._replace(in_scale=s.in_scale * self.inward, out_scale=s.out_scale * self.outward)
            for s in super().native(layer) or ()
        ] or None


class Hybrid(LanguageModel):
    """A language model of layers of several kinds.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: HybridConfig
    decodable = (
        *(HybridBlock, MambaMixer, Mamba2Mixer, GatedRMSNorm, Attention, ConvAttention, Parallel),
        *(Pointwise, SwiGLU, SquaredReLU, Experts, Router),
    )

    def __init__(self, config: HybridConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        self.backbone.embedding_multiplier = config.embedding_multiplier
        self.backbone.hidden_multiplier = config.logits_multiplier / config.logits_divisor

    @classmethod
    def blocks(cls, config: HybridConfig, generator: torch.Generator | None = None) -> list[Block]:
        """Return the layers of the pattern."""
        return [_block(config, letter, generator) for letter in config.pattern]

    @property
    def max_positions(self) -> int | None:
        """The context length that the model was trained for; None if no layer has attention."""
        return self.config.max_positions if set(self.config.pattern) & set("*P") else None


def _block(config: HybridConfig, letter: str, generator: torch.Generator | None) -> Block:
    """Return the layer of a letter."""
    if letter in "Mm":
        mixer: Mixer[Any] = (
            Mamba2Mixer(config.mamba2, generator) if letter == "M" else MambaMixer(config.mamba, generator)
        )
        return HybridBlock(config, mixer, config.ssm_in_multiplier, config.ssm_out_multiplier)
    if letter == "*":
        attention: Mixer[Any] = Attention(config.attention, generator)
        if config.attention_conv:
            attention = ConvAttention(config.attention, config.attention_conv, generator)
        return HybridBlock(config, attention, config.attention_in_multiplier, config.attention_out_multiplier)
    if letter == "P":
        return HybridBlock(config, Parallel(config, generator))
    if letter == "E":
        return HybridBlock(config, Pointwise(Experts(config.experts, generator)))
    assert config.d_ff is not None
    sizes, depth = (config.d_model, config.d_ff, generator), config.n_layers
    if config.feed_forward == "relu2":
        return HybridBlock(config, Pointwise(SquaredReLU(*sizes, bias=config.feed_forward_bias, depth=depth)))
    factors = config.gate_multiplier, config.down_multiplier
    mlp = SwiGLU(*sizes, bias=config.feed_forward_bias, depth=depth, multipliers=factors)
    return HybridBlock(config, Pointwise(mlp))


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


ENTRY = ModelEntry(
    name="hybrid",
    kind="language",
    year=2024,
    paper="An Empirical Study of Mamba-based Language Models",
    arxiv="2406.07887",
    idea="mostly a state, now and then every token",
    parents=("llama", "mamba", "mamba2"),
    cls=Hybrid,
    config=HybridConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
