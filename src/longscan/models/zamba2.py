"""The Zamba2 Suite: a few blocks of attention, each shared by many layers.

Paolo Glorioso and others, 2024, arXiv 2411.15242.

Parent: Hybrid, a stack of Mamba-2 with some attention.
Kept: Mamba-2 in every layer, and attention in a few.
Changed: the weights of attention and of its feed-forward layer exist once or twice; the layers that use them
take turns, and add low-rank adapters of their own. The shared block sees the embedded token beside the
residual stream, and its result enters the Mamba-2, not the residual stream.

Deviations from the official code: those of Mamba-2. transformers clamps time steps to time_step_min in a
pass, not in steps; here nothing does, as in the mixer of the authors of Mamba-2.

The layers, for a residual stream x of tokens that were embedded as e:

    M    x = x + mamba(norm(x))
    Z    n = norm [x; e]                               of width 2 d_model
         q, k, v = W n + adapter n                     the adapters may be absent
         y = norm(W_o softmax(q k' / sqrt(d_head / 2)) v)
         [g; u] = W_gu y + adapter y
         x = x + mamba(norm(x + W_linear W_down (gelu(g) * u)))
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.attention import Attention, AttentionLayer, AttentionPlan, empty_cache
from longscan.models.common.backbone import Backbone
from longscan.models.common.entry import ModelEntry
from longscan.models.common.growable import KV
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import GatedRMSNorm, RMSNorm, normal_linear
from longscan.models.common.mixer import Block, Mixer
from longscan.models.common.native_decode import matrix, plain
from longscan.models.hybrid import ParallelState
from longscan.models.hybrid_config import PatternConfig
from longscan.models.mamba2 import Mamba2Layer, Mamba2Mixer

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"d_model": 64, "pattern": "MZ", "n_layers": 4, "vocab_size": 257, "n_heads": 4, "d_ff": 128},
        **{"d_state": 16, "d_ssm_head": 16, "adapter_rank": 4},
    },
    "tiny-lm": {  # as large as Mamba's
        **{"d_model": 256, "pattern": "MMZMZ", "n_layers": 5, "vocab_size": 4096, "n_heads": 4, "d_ff": 256},
        **{"d_state": 64, "adapter_rank": 16},
    },
    "zamba2-1.2b": {
        **{"d_model": 2048, "pattern": "MMMMMZ" * 6 + "MM", "vocab_size": 32000, "n_heads": 32, "d_ff": 8192},
        **{"d_state": 128, "rope_theta": 1e4, "attention_adapters": True, "max_positions": 4096},
    },
    "zamba2-2.7b": {
        **{"d_model": 2560, "pattern": "M" + "MMMMMZ" * 7 + "MMMMZMMMZMM", "vocab_size": 32000},
        **{"n_heads": 32, "d_ff": 10240, "n_shared": 2, "d_state": 64, "max_positions": 4096},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba2Config(PatternConfig):
    """The configuration of a Zamba2.

    Raises:
        LongscanError: a value is out of range.
    """

    letters: ClassVar = "MZ"

    n_heads: int  # of attention; their widths add up to 2 d_model
    n_kv_heads: int | None = None  # None is n_heads
    rope_theta: float | None = None  # None: attention has no positions
    max_positions: int = 4096  # the context length; longer sequences work, with a warning
    d_ff: int  # width inside the shared feed-forward layer
    n_shared: int = 1  # blocks, which the layers Z take in turn
    adapter_rank: int = 128
    attention_adapters: bool = False  # beside those of the feed-forward layer
    d_ssm: int | None = None  # channels of the recurrence; None is 2 d_model
    d_ssm_head: int = 64  # P
    n_ssm_groups: int = 1  # G
    d_state: int = 64  # N
    d_conv: int = 4  # K
    bias: bool = False  # of all matrices but those of attention and adapters

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("n_heads", "n_kv_heads", "max_positions", "d_ff", "n_shared", "adapter_rank")
        self.check("d_ssm", "d_ssm_head", "n_ssm_groups", "d_state", "d_conv")
        self.check("rope_theta", above=0)
        if (2 * self.d_model) % self.n_heads:
            got = f"{self.d_model} and {self.n_heads}"
            raise LongscanError(f"n_heads: expected a divisor of 2 d_model, got {got}.")
        if "Z" not in self.pattern:
            raise LongscanError(f"pattern: expected a Z, a layer with attention, got {self.pattern!r}.")
        if self.n_shared > self.pattern.count("Z"):
            raise LongscanError(
                f"n_shared: expected at most {self.pattern.count('Z')}, one for each 'Z' of the pattern, got "
                f"{self.n_shared}."
            )
        self.attention, self.mamba2  # noqa: B018 which check that heads and groups divide

    @property
    def channels(self) -> int:
        """Channels of the recurrence: d_ssm or its default."""
        return 2 * self.d_model if self.d_ssm is None else self.d_ssm

    @property
    def attention(self) -> AttentionLayer:
        """The sizes and options of the shared attention."""
        d_head = 2 * self.d_model // self.n_heads
        return AttentionLayer(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads if self.n_kv_heads is None else self.n_kv_heads,
            d_head=d_head,
            d_input=2 * self.d_model,
            rope_theta=self.rope_theta,
            scale=(d_head / 2) ** -0.5,
            max_positions=self.max_positions,
        )

    @property
    def mamba2(self) -> Mamba2Layer:
        """The sizes and options of each Mamba-2; the epsilon of its norm is the same in all sizes."""
        return Mamba2Layer(
            d_model=self.d_model,
            d_ssm=self.channels,
            d_head=self.d_ssm_head,
            d_state=self.d_state,
            n_groups=self.n_ssm_groups,
            d_conv=self.d_conv,
            norm_eps=1e-5,
            in_bias=self.bias,
            out_bias=self.bias,
            depth=self.n_layers,
        )


class SharedBlock(nn.Module):
    """Attention and a feed-forward layer that several layers share, without residual connections.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: Zamba2Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        d_model, d_ff = config.d_model, config.d_ff
        self.input_layernorm = RMSNorm(2 * d_model, config.norm_eps)
        self.self_attn = Attention(config.attention, generator)
        self.pre_ff_layernorm = RMSNorm(d_model, config.norm_eps)
        self.gate_up_proj = normal_linear(d_model, 2 * d_ff, generator, bias=config.bias)
        self.down_proj = normal_linear(d_ff, d_model, generator, bias=config.bias)

    def read(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Return the input of attention (..., 2 d_model) of residual stream and embedded tokens."""
        return cast(Tensor, self.input_layernorm(torch.cat([x, embedded], -1)))

    def write(self, y: Tensor, adapter: nn.Module) -> Tensor:
        """Return the result (..., d_model) of the output of attention (..., d_model)."""
        y = self.pre_ff_layernorm(y)
        gate, up = (self.gate_up_proj(y) + adapter(y)).chunk(2, -1)
        return cast(Tensor, self.down_proj(F.gelu(gate) * up))


class SharedPlan(NamedTuple):
    """What a layer with a shared block knows of all tokens.

    Attributes:
        seq_idx: see `Mixer.plan`.
        attention: the plan of attention.
        embedded: (batch, seq_len, d_model) the tokens; without seq_len in a step.
        shared: the block.
    """

    seq_idx: Tensor | None
    attention: AttentionPlan
    embedded: Tensor
    shared: SharedBlock


class SharedMixer(Mixer[ParallelState]):
    """The layer's own part of a shared block: adapters, the way into its Mamba-2, and that.

    Its block calls the parts, since the norm of the block stands between them.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: Zamba2Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        rank, attention = config.adapter_rank, config.attention
        wide = attention.d_head * attention.n_heads, *(attention.d_head * attention.n_kv_heads,) * 2
        self.attention = attention
        self.adapters = nn.ModuleList(
            _adapter(2 * config.d_model, rank, width, generator) for width in wide * config.attention_adapters
        )
        self.gate_up_adapter = _adapter(config.d_model, rank, 2 * config.d_ff, generator)
        self.linear = normal_linear(config.d_model, config.d_model, generator)
        self.mamba = Mamba2Mixer(config.mamba2, generator)

    def init_state(self, batch_size: int) -> ParallelState:
        """Return the initial states of Mamba-2 and attention; see `Mixer.init_state`."""
        kv = empty_cache(self.attention, self.linear, batch_size)
        return ParallelState(*self.mamba.init_state(batch_size), *kv)


class Zamba2Block(Block):
    """A Mamba-2 whose input a shared block adds to.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    mixer: SharedMixer

    def __init__(self, config: Zamba2Config, generator: torch.Generator | None = None) -> None:
        super().__init__(config, SharedMixer(config, generator))

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the layer's output to the residual stream x (batch, seq_len, d_model); see `Mixer.forward`."""
        recurrent, kv = (None, None) if state is None else state.parts
        mixer, shared = self.mixer, plan.shared
        y, kv = shared.self_attn(shared.read(x, plan.embedded), kv, plan.attention, mixer.adapters)
        u = self.norm(x + mixer.linear(shared.write(y, mixer.gate_up_adapter)))
        y, recurrent = mixer.mamba(u, recurrent, plan.seq_idx)
        return x + y, ParallelState(*recurrent, *kv)

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Add the layer's output for one token per row, x (batch, d_model); see `Mixer.step`."""
        (recurrent, kv), mixer, shared = state.parts, self.mixer, plan.shared
        y = shared.self_attn.step(shared.read(x, plan.embedded), kv, plan.attention, mixer.adapters)
        u = self.norm(x + mixer.linear(shared.write(y, mixer.gate_up_adapter)))
        return x + mixer.mamba.step(u, recurrent)

    def sublayers(self, layer: int, shared: SharedBlock) -> list[ops.Sublayer] | None:
        """Return attention, MLP and Mamba-2 for the native decoder; None if it cannot run the block.

        Args:
            layer: index of the block, and of its state.
            shared: the block of attention and MLP.
        """
        first, second, mixer = shared.input_layernorm, shared.pre_ff_layernorm, self.mixer
        attention = shared.self_attn.native(layer, first.weight)
        mamba = mixer.mamba.native(layer, self.norm.weight)
        both, down, after = map(matrix, (shared.gate_up_proj, shared.down_proj, mixer.linear))
        low = [_pair(adapter) for adapter in (*mixer.adapters, mixer.gate_up_adapter)]
        adapters = [pair for pair in low if pair is not None]
        if attention is None or mamba is None or both is None or down is None or after is None:
            return None
        width = self.norm.weight.numel()
        norms = first.eps == second.eps == self.norm.eps and plain(first.weight, second.weight)
        widths = first.weight.shape, second.weight.shape
        if not norms or widths != ((2 * width,), (width,)) or len(adapters) < len(low):
            return None
        gate, up = both.halves
        attends = attention[0].weights
        assert isinstance(attends, ops.AttentionWeights)
        attends = dataclasses.replace(attends, adapters=tuple(adapters[:-1]))
        mlp = ops.MLPWeights(gate, up, down, "gelu", adapter=adapters[-1], after=after)
        return [
            ops.Sublayer(attends, layer, first.weight, reads="joined", writes="side"),
            ops.Sublayer(mlp, layer, second.weight, reads="side", writes="sum"),
            *(sublayer._replace(reads="side") for sublayer in mamba),
        ]


class Zamba2Backbone(Backbone):
    """Holds the shared blocks, and gives them to the layers in turn."""

    def __init__(
        self, config: Zamba2Config, blocks: Iterable[Block], generator: torch.Generator | None
    ) -> None:
        super().__init__(config, blocks, generator)
        self.shared = nn.ModuleList(SharedBlock(config, generator) for _ in range(config.n_shared))

    def native(self) -> list[list[ops.Sublayer] | None]:
        """Return the sublayers, with the shared block of each layer; see `Backbone.native`."""
        blocks, turn = [cast(SharedBlock, block) for block in self.shared], 0
        found: list[list[ops.Sublayer] | None] = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Zamba2Block):
                found.append(layer.sublayers(index, blocks[turn % len(blocks)]))
                turn += 1
            else:
                found.append(layer.native(index))
        return found

    def plans(self, x: Tensor, states: Sequence[Any], seq_idx: Tensor | None) -> list[Any]:
        """Return the plans, with the embedded tokens and the shared block; see `Backbone.plans`."""
        users = [number for number, layer in enumerate(self.layers) if isinstance(layer, Zamba2Block)]
        plans: list[Any] = [seq_idx] * len(states)
        kv: KV | None = None if states[users[0]] is None else states[users[0]].parts[1]
        shared = [cast(SharedBlock, block) for block in self.shared]
        attention = shared[0].self_attn.plan(x[..., 0], kv, seq_idx)
        for turn, number in enumerate(users):
            plans[number] = SharedPlan(seq_idx, attention, x, shared[turn % len(shared)])
        return plans


class Zamba2(LanguageModel):
    """A language model of Mamba-2 and shared blocks of attention.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: Zamba2Config
    decodable = (
        *(Zamba2Backbone, Zamba2Block, SharedMixer, SharedBlock, Attention),
        *(Mamba2Mixer, GatedRMSNorm, nn.Sequential),
    )
    body = Zamba2Backbone

    @classmethod
    def blocks(cls, config: Zamba2Config, generator: torch.Generator | None = None) -> list[Block]:
        """Return the layers of the pattern."""
        return [
            Zamba2Block(config, generator)
            if letter == "Z"
            else Block(config, Mamba2Mixer(config.mamba2, generator))
            for letter in config.pattern
        ]

    @property
    def max_positions(self) -> int | None:
        """The context length that the model was trained for."""
        return self.config.max_positions


def _pair(adapter: nn.Module) -> tuple[ops.Matrix, ops.Matrix] | None:
    """Return the two matrices of an adapter for the native decoder, if they are no more than that."""
    found = [matrix(layer) for layer in adapter.children()]
    if len(found) != 2 or found[0] is None or found[1] is None or found[0].bias is not None:
        return None
    return found[0], found[1]


def _adapter(d_in: int, rank: int, d_out: int, generator: torch.Generator | None) -> nn.Sequential:
    """Return a map of low rank."""
    return nn.Sequential(normal_linear(d_in, rank, generator), normal_linear(rank, d_out, generator))


ENTRY = ModelEntry(
    name="zamba2",
    kind="language",
    year=2024,
    paper="The Zamba2 Suite: Technical Report",
    arxiv="2411.15242",
    idea="a state, and one attention for all layers",
    parents=("hybrid",),
    cls=Zamba2,
    config=Zamba2Config,
    presets=PRESETS,
    verbs=("train", "generate", "evaluate"),
)
