"""Mamba-2: Transformers are SSMs, generalized models and efficient algorithms through state space duality.

Tri Dao and Albert Gu, 2024, arXiv 2405.21060.

Parents: Mamba, and linear attention, of which the new recurrence is the case with decay.
Kept: a recurrence whose step size and matrices B and C depend on the input; the convolution before it, the
gate after it.
Changed: channels form heads, and all states of a head decay alike (A is a number per head), so that the
recurrence is a product of matrices within chunks (`ops.ssd`) and the state can be eight times as large; B, C
and dt come from the block's input, beside x, in one projection, and B and C pass through the convolution too;
a norm follows the gate.

Deviations from the official code: the model takes an initial state and returns the final one, both with
gradients; padding and packed sequences are supported; dt_limit holds in every path, also in a step; the state
and the parameters of the recurrence (A_log, D, dt_bias) are float32 whatever the dtype of the other weights.

The block, for a token u of width d_model:

    [z; x; B; C; dt] = in_proj u           widths d_ssm, d_ssm, n_groups d_state (twice), n_heads
    [x; B; C] = silu(conv1d [x; B; C])     over the last d_conv tokens
    dt  = softplus(dt + dt_bias)           clamped to dt_limit
    S   = exp(dt A) S + dt x B',           A = -exp(A_log); a matrix (d_head, d_state) for each head
    y   = S C + D x                        a head reads the B and C of its group
    out = out_proj norm(y silu(z))         over the channels of each group

Where d_ssm is less than d_inner = expand d_model, the other channels are a gated MLP beside the recurrence:
in_proj yields [z0; x0] before z, and out_proj takes [x0 silu(z0); norm(y silu(z))].

Glossary: B, L, D (sizes) = batch, seq_len, d_model; H, P = n_heads, d_head; G = n_groups; N = d_state;
K = d_conv; Δ = dt; A, B, C, D (matrices) as above; S = ssm.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import GatedRMSNorm, blank, linear
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.native_decode import matrix, plain
from longscan.ops import causal_conv1d, causal_conv1d_step, ssd, ssd_step

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16, "d_head": 16},
    "tiny-lm": {"d_model": 256, "n_layers": 8, "vocab_size": 4096, "d_state": 64},  # as large as Mamba's
    "130m": {"d_model": 768, "n_layers": 24, "vocab_size": 50277, "pad_vocab_size_multiple": 16},
    "370m": {"d_model": 1024, "n_layers": 48, "vocab_size": 50277, "pad_vocab_size_multiple": 16},
    "780m": {"d_model": 1536, "n_layers": 48, "vocab_size": 50277, "pad_vocab_size_multiple": 16},
    "1.3b": {"d_model": 2048, "n_layers": 48, "vocab_size": 50277, "pad_vocab_size_multiple": 16},
    "2.7b": {"d_model": 2560, "n_layers": 64, "vocab_size": 50277, "pad_vocab_size_multiple": 16},
}

GateOrder: TypeAlias = Literal["gate-first", "norm-first", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Layer:
    """The sizes and options of one mixer, for the models that have it among others.

    Attributes:
        d_model: width of the residual stream.
        d_ssm: channels of the recurrence, n_heads d_head.
        d_head: channels of a head.
        d_state: N.
        n_groups: of B and C.
        d_conv: taps of the convolution.
        d_mlp: channels of the gated MLP beside the recurrence.
        norm: "gate-first" is norm(y silu(z)), "norm-first" norm(y) silu(z), "none" y silu(z).
        norm_eps: epsilon of that norm.
        conv_bias: whether the convolution has a bias.
        in_bias: whether in_proj has one.
        out_bias: whether out_proj has one.
        D_per_channel: whether D is a number per channel, not per head.
        dt_limit: least and largest dt, None if there is no largest; None: no limit.
        multipliers: constant factors of z, x, B, C and dt; None: all are 1.
        A_init_range: A is initialised uniformly in it.
        dt_init_range: time steps are initialised log-uniformly in it.
        dt_init_floor: the least initial time step.
        depth: terms that add up in the residual stream, for the initialisation of out_proj.
    """

    d_model: int
    d_ssm: int
    d_head: int
    d_state: int
    n_groups: int = 1
    d_conv: int = 4
    d_mlp: int = 0
    norm: GateOrder = "gate-first"
    norm_eps: float = 1e-5
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    D_per_channel: bool = False
    dt_limit: tuple[float, float | None] | None = None
    multipliers: tuple[float, float, float, float, float] | None = None
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_init_range: tuple[float, float] = (1e-3, 0.1)
    dt_init_floor: float = 1e-4
    depth: int = 1

    def __post_init__(self) -> None:
        """Check that heads and groups divide.

        Raises:
            LongscanError: they do not.
        """
        if self.d_ssm % self.d_head:
            raise LongscanError(
                f"d_head: expected a divisor of {self.d_ssm} recurrent channels, got {self.d_head}."
            )
        if self.n_heads % self.n_groups:
            raise LongscanError(
                f"n_groups: expected a divisor of {self.n_heads} recurrent heads, got {self.n_groups}."
            )

    @property
    def n_heads(self) -> int:
        """Heads of the recurrence, H."""
        return self.d_ssm // self.d_head

    @property
    def widths(self) -> tuple[int, int, int]:
        """Widths of x, B and C, the channels of the convolution."""
        return self.d_ssm, self.n_groups * self.d_state, self.n_groups * self.d_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(LanguageModelConfig):
    """The configuration of a Mamba-2; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_state: int = 128  # N
    d_head: int = 64  # P
    n_groups: int = 1  # G
    d_conv: int = 4  # K
    expand: int = 2  # E
    d_ssm: int | None = None  # channels of the recurrence; None is d_inner
    gated_norm: GateOrder = "gate-first"
    conv_bias: bool = True
    bias: bool = False  # of in_proj and out_proj
    D_per_channel: bool = False
    dt_limit: tuple[float, float | None] | None = None  # of dt: least and largest
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_min: float = 1e-3  # time steps are initialised log-uniformly in [dt_min, dt_max]
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_state", "d_head", "n_groups", "d_conv", "expand", "d_ssm")
        self.check("dt_init_floor", above=0)
        times = (self.dt_min, self.dt_max)
        for names, (low, high) in {"dt_min, dt_max": times, "A_init_range": self.A_init_range}.items():
            if not 0 < low <= high < math.inf:
                raise LongscanError(f"{names}: expected 0 < least <= largest, got {low} and {high}.")
        if self.dt_limit is not None:
            low, high = self.dt_limit[0], math.inf if self.dt_limit[1] is None else self.dt_limit[1]
            if not 0 <= low < high:
                raise LongscanError(f"dt_limit: expected 0 <= least < largest, got {low} and {high}.")
        if self.channels > self.d_inner:
            raise LongscanError(f"d_ssm: expected at most d_inner = {self.d_inner}, got {self.channels}.")
        self.layer  # noqa: B018 which checks that heads and groups divide

    @property
    def d_inner(self) -> int:
        """Channels of the block, E D in the paper."""
        return self.expand * self.d_model

    @property
    def channels(self) -> int:
        """Channels of the recurrence: d_ssm or its default."""
        return self.d_inner if self.d_ssm is None else self.d_ssm

    @property
    def layer(self) -> Mamba2Layer:
        """The sizes and options of each mixer."""
        return Mamba2Layer(
            d_model=self.d_model,
            d_ssm=self.channels,
            d_head=self.d_head,
            d_state=self.d_state,
            n_groups=self.n_groups,
            d_conv=self.d_conv,
            d_mlp=self.d_inner - self.channels,
            norm=self.gated_norm,
            norm_eps=self.norm_eps,
            conv_bias=self.conv_bias,
            in_bias=self.bias,
            out_bias=self.bias,
            D_per_channel=self.D_per_channel,
            dt_limit=self.dt_limit,
            A_init_range=self.A_init_range,
            dt_init_range=(self.dt_min, self.dt_max),
            dt_init_floor=self.dt_init_floor,
            depth=self.n_layers,
        )


class Mamba2State(NamedTuple):
    """The state of one layer.

    Attributes:
        conv: (batch, d_conv - 1, d_ssm + 2 n_groups d_state) last inputs of the convolution, oldest first.
        ssm: (batch, n_heads, d_head, d_state) the hidden state S.
    """

    conv: Tensor
    ssm: Tensor


class Mamba2Mixer(Mixer[Mamba2State]):
    """The state space block with one decay per head.

    Args:
        layer: sizes and options.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    recurrence = ("A_log", "D", "dt_bias")
    copied = ("A_log", "conv1d.weight")

    def __init__(self, layer: Mamba2Layer, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layer = layer
        d_conv_in = sum(layer.widths)
        self.splits = [layer.d_mlp, layer.d_mlp, layer.d_ssm, d_conv_in, layer.n_heads]
        self.in_proj = linear(layer.d_model, sum(self.splits), layer.in_bias, generator)
        self.conv1d = blank(
            nn.Conv1d, d_conv_in, d_conv_in, layer.d_conv, groups=d_conv_in, bias=layer.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(layer.n_heads))
        self.A_log = nn.Parameter(torch.empty(layer.n_heads))
        self.D = nn.Parameter(torch.ones(layer.d_ssm if layer.D_per_channel else layer.n_heads))
        self.norm = None
        if layer.norm != "none":
            first = layer.norm == "norm-first"
            self.norm = GatedRMSNorm(layer.d_ssm, layer.norm_eps, layer.n_groups, norm_first=first)
        self.out_proj = linear(layer.d_ssm + layer.d_mlp, layer.d_model, layer.out_bias, generator)
        if not self.A_log.is_meta:  # which only needs shapes
            self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        """Initialise everything but the Linears, and scale the output projection for the residual stream."""
        layer = self.layer
        self.A_log.uniform_(*layer.A_init_range, generator=generator).log_()
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5), generator=generator)
        if self.conv1d.bias is not None:
            bound = layer.d_conv**-0.5
            nn.init.uniform_(self.conv1d.bias, -bound, bound, generator=generator)
        dt = self.dt_bias.uniform_(*map(math.log, layer.dt_init_range), generator=generator)
        dt.exp_().clamp_(min=layer.dt_init_floor)
        dt += torch.log(-torch.expm1(-dt))  # the inverse of softplus
        self.out_proj.weight /= math.sqrt(layer.depth)  # so many terms add up in the residual stream

    def forward(
        self, u: Tensor, state: Mamba2State | None = None, seq_idx: Tensor | None = None, /
    ) -> tuple[Tensor, Mamba2State]:
        """Mix along time; see `Mixer.forward`."""
        mlp, z, xbc, dt = self._project(u)
        conv, ssm = (None, None) if state is None else state
        xbc, conv = causal_conv1d(xbc, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", conv, seq_idx)
        x, B, C = self._heads(xbc)
        y, ssm = ssd(x, dt, dt * -torch.exp(self.A_log), B, C, self._skip(), ssm, seq_idx)
        return self._out(mlp, y.flatten(2), z), Mamba2State(conv, ssm)

    def init_state(self, batch_size: int) -> Mamba2State:
        """Return zeros in float32, or in float64 in a float64 model; see `Mixer.init_state`."""
        layer, zeros = self.layer, self.A_log.new_zeros
        return Mamba2State(
            zeros(batch_size, layer.d_conv - 1, sum(layer.widths)),
            zeros(batch_size, layer.n_heads, layer.d_head, layer.d_state),
        )

    def step(self, u: Tensor, state: Mamba2State, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        mlp, z, xbc, dt = self._project(u)
        xbc = causal_conv1d_step(state.conv, xbc, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        x, B, C = self._heads(xbc)
        y = ssd_step(state.ssm, x, dt, dt * -torch.exp(self.A_log), B, C, self._skip())
        return self._out(mlp, y.flatten(1), z)

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        sizes, weight, bias = self.layer, self.conv1d.weight, self.conv1d.bias
        in_proj, out_proj = matrix(self.in_proj), matrix(self.out_proj)
        gated = None if self.norm is None else self.norm.weight
        if in_proj is None or out_proj is None or sizes.d_mlp:
            return None
        if not plain(weight, bias, self.dt_bias, self.A_log, self.D, gated):
            return None
        least, most = sizes.dt_limit or (0.0, None)
        factors = None
        if sizes.multipliers is not None:
            counts = torch.tensor([sizes.d_ssm, *sizes.widths, sizes.n_heads])
            factors = torch.tensor(sizes.multipliers).repeat_interleave(counts)
        weights = ops.Mamba2Weights(
            in_proj=in_proj,
            out_proj=out_proj,
            factors=factors,
            conv_weight=weight.detach().squeeze(1).T.contiguous(),
            conv_bias=bias,
            dt_bias=self.dt_bias,
            A=self.A_log.detach().exp() * -math.log2(math.e),
            D=self.D,
            norm=gated,
            norm_first=sizes.norm == "norm-first",
            eps=sizes.norm_eps,
            d_head=sizes.d_head,
            n_groups=sizes.n_groups,
            dt_limit=(least, math.inf if most is None else most),
        )
        return [ops.Sublayer(weights, layer, norm)]

    def _project(self, u: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Return the gated MLP beside the recurrence, if any, z, [x; B; C] and dt of u (..., d_model)."""
        projected: Tensor = self.in_proj(u)
        if self.layer.multipliers is not None:
            widths = [self.layer.d_ssm, *self.layer.widths, self.layer.n_heads]
            parts = zip(torch.split(projected, widths, -1), self.layer.multipliers, strict=True)
            projected = torch.cat([part * factor for part, factor in parts], -1)
        z0, x0, z, xbc, dt = torch.split(projected, self.splits, -1)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        if self.layer.dt_limit is not None:
            dt = dt.clamp(*self.layer.dt_limit)
        return (x0 * F.silu(z0) if self.layer.d_mlp else None), z, xbc, dt

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (..., n_heads, d_head), B and C (..., n_groups, d_state)."""
        x, B, C = torch.split(xbc, list(self.layer.widths), -1)
        p, n = (-1, self.layer.d_head), (-1, self.layer.d_state)
        return torch.unflatten(x, -1, p), torch.unflatten(B, -1, n), torch.unflatten(C, -1, n)

    def _skip(self) -> Tensor:
        """Return D as `ssd` takes it."""
        return self.D.view(-1, self.layer.d_head) if self.layer.D_per_channel else self.D

    def _out(self, mlp: Tensor | None, y: Tensor, z: Tensor) -> Tensor:
        """Return the output of y and its gate z (..., d_ssm)."""
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        return cast(Tensor, self.out_proj(y if mlp is None else torch.cat([mlp, y], -1)))


class Mamba2(LanguageModel):
    """A language model of Mamba-2 blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: Mamba2Config
    decodable = (Mamba2Mixer, GatedRMSNorm)

    @staticmethod
    def block(config: Mamba2Config, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        return Block(config, Mamba2Mixer(config.layer, generator))


ENTRY = ModelEntry(
    name="mamba2",
    kind="language",
    year=2024,
    paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
    "Duality",
    arxiv="2405.21060",
    idea="a state that is attention",
    parents=("mamba", "linear_attention"),
    cls=Mamba2,
    config=Mamba2Config,
    presets=PRESETS,
    verbs=LANGUAGE,
)
