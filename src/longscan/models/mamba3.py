"""Mamba-3: Improved Sequence Modeling using State Space Principles.

Aakash Lahoti, Kevin Y. Li, Berlin Chen, Caitlin Wang, Aviv Bick, J. Zico Kolter, Tri Dao and Albert Gu, 2026,
arXiv 2603.15569.

Parent: Mamba-2.
Kept: one decay per head, whose recurrence is a product of matrices within chunks (`ops.ssd`); z, x, B, C and
dt from one projection of the block's input; a gate after the recurrence.
Changed: the input of a step is a mean of two tokens, this one and the one before (exponential-trapezoidal
instead of exponential-Euler), which replaces the convolution; B and C rotate by angles that depend on the
text, so that the state acts like a complex one and can track parity; B and C are normalised and have biases;
A depends on the input; a step may take in several vectors for each head (MIMO), more work for a state that
decoding must load anyway; an MLP may follow each mixer.

Deviations from the official code: the model takes an initial state and returns the final one, both with
gradients; padding and packed sequences are supported; angles are sums in float64; the state and the
parameters of the recurrence are float32 whatever the dtype of the other weights.

The block, for a token u of width d_model:

    [z; x; B; C; dt; A; trap; rate] = in_proj u
    B, C = norm(B) + B_bias, norm(C) + C_bias          of each group, with biases of each head
    A    = -f(A), at most -A_floor                     f(a) = 1 + a for a >= 0, 1 / (1 - a) below
    dt   = softplus(dt + dt_bias)                      lambda = sigmoid(trap)
    theta = theta + pi tanh(rate) dt                   and B and C are rotated by theta, in pairs of channels
    S    = exp(dt A) (S + (1 - lambda) dt x_before B_before') + lambda dt x B'
    y    = S C + D x                                   S is a matrix (d_head, d_state) for each head
    out  = out_proj(y silu(z))

With mimo_rank R there are R vectors B_r and C_r, x_r = mimo_x_r x and z_r = mimo_z_r z, elementwise; the
input is the sum of x_r B_r', and out_proj takes the sum of mimo_o_r y_r silu(z_r).

Glossary: B, L, D (sizes) = batch, seq_len, d_model; H, P = n_heads, d_head; G = n_groups; N = d_state;
R = mimo_rank; S (size) = n_angles; Δ = dt; A, B, C, D (matrices) as above; S = ssm. In `trapezoid` they have
their names in attention: C is q, B is k, x is v.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.gated_mlp import GatedMLP, MLPBlock, rounded
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import GatedRMSNorm, RMSNorm, linear
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.native_decode import matrix, plain
from longscan.models.common.trapezoid import Past, Tokens, advance, last, trapezoid

PUBLISHED = {"vocab_size": 128256}  # Llama-3.1's tokenizer
SMALL, LARGE = {"d_model": 768, "n_layers": 12}, {"d_model": 2048, "n_layers": 24}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16, "d_head": 16},
    "tiny-lm": {"d_model": 256, "n_layers": 4, "vocab_size": 4096, "d_state": 64, "d_intermediate": 512},
    "siso-187m": {**SMALL, **PUBLISHED, "d_intermediate": 1536},
    "mimo-187m": {**SMALL, **PUBLISHED, "d_intermediate": 1264, "mimo_rank": 4},
    "siso-1.5b": {**LARGE, **PUBLISHED, "d_intermediate": 4096},
    "mimo-1.5b": {**LARGE, **PUBLISHED, "d_intermediate": 3824, "mimo_rank": 4},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba3Config(LanguageModelConfig):
    """The configuration of a Mamba-3; the paper's symbols are in the comments.

    Weights do not show their activation of A: the published ones need "heavy-tail", but code that was written
    before it trains with "softplus".

    Raises:
        LongscanError: a value is out of range.
    """

    d_state: int = 128  # N
    d_head: int = 64  # P
    n_groups: int = 1  # G
    expand: int = 2  # E
    mimo_rank: int | None = None  # R; None is one input and one output (SISO)
    rope_fraction: float = 0.5  # of the channels of B and C that rotate
    A_activation: Literal["heavy-tail", "softplus"] = "heavy-tail"
    A_floor: float = 1e-4  # A is at most -A_floor
    outproj_norm: bool = False  # out is out_proj(norm(y) silu(z)), with a norm of each head
    d_intermediate: int = 0  # width of an MLP after each mixer, rounded up to a multiple of 128; 0 is none
    dt_min: float = 1e-3  # time steps are initialised log-uniformly in [dt_min, dt_max]
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_state", "d_head", "n_groups", "expand", "mimo_rank")
        self.check("A_floor", "d_intermediate", least=0)
        self.check("dt_init_floor", above=0)
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            got = f"{self.dt_min} and {self.dt_max}"
            raise LongscanError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {got}.")
        if self.rope_fraction not in (0.5, 1.0):
            raise LongscanError(f"rope_fraction: expected 0.5 or 1.0, got {self.rope_fraction}.")
        if not self.n_angles:
            least = int(2 / self.rope_fraction)
            raise LongscanError(
                f"d_state: expected at least {least}, for a pair to rotate; got {self.d_state}."
            )
        if self.d_inner % self.d_head:
            raise LongscanError(
                f"d_head: expected a divisor of expand d_model = {self.d_inner}, got {self.d_head}."
            )
        if self.n_heads % self.n_groups:
            raise LongscanError(f"n_groups: expected a divisor of {self.n_heads} heads, got {self.n_groups}.")

    @property
    def d_inner(self) -> int:
        """Channels of the recurrence, E D in the paper."""
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        """Heads of the recurrence, H."""
        return self.d_inner // self.d_head

    @property
    def n_angles(self) -> int:
        """Pairs of channels of B and C that rotate."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def rank(self) -> int:
        """Vectors B of a head at each step."""
        return 1 if self.mimo_rank is None else self.mimo_rank

    @property
    def splits(self) -> tuple[int, ...]:
        """Widths of z, x, B, C, dt, A, trap and rate, the rows of in_proj."""
        d_groups = self.rank * self.n_groups * self.d_state
        return self.d_inner, self.d_inner, d_groups, d_groups, *(3 * [self.n_heads]), self.n_angles


class Mamba3State(NamedTuple):
    """The state of one layer.

    Attributes:
        angle: (batch, n_heads, n_angles) theta, between -pi and pi.
        ssm: (batch, n_heads, d_head, d_state) the hidden state S.
        k: (batch, mimo_rank, n_heads, d_state) B of the last token, rotated.
        v: (batch, n_heads, d_head) x of the last token.
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


class Mamba3Mixer(Mixer[Mamba3State]):
    """The state space block of Mamba-3.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    recurrence = ("B_bias", "C_bias", "D", "dt_bias")

    def __init__(self, config: Mamba3Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        n_heads, rank = config.n_heads, config.rank
        self.in_proj = linear(config.d_model, sum(config.splits), False, generator)
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.B_bias = nn.Parameter(torch.ones(n_heads, rank, config.d_state))
        self.C_bias = nn.Parameter(torch.ones(n_heads, rank, config.d_state))
        self.B_norm = RMSNorm(config.d_state, config.norm_eps)
        self.C_norm = RMSNorm(config.d_state, config.norm_eps)
        if config.mimo_rank is not None:
            shape = (n_heads, rank, config.d_head)
            self.mimo_x = nn.Parameter(torch.full(shape, 1 / rank))
            self.mimo_z = nn.Parameter(torch.ones(shape))
            self.mimo_o = nn.Parameter(torch.full(shape, 1 / rank))
        self.D = nn.Parameter(torch.ones(n_heads))
        self.norm = None
        if config.outproj_norm:
            self.norm = GatedRMSNorm(config.d_inner, config.norm_eps, n_heads, norm_first=True)
        self.out_proj = linear(config.d_inner, config.d_model, False, generator)
        if not self.D.is_meta:  # which only needs shapes
            self._init_weights(config, generator)

    @torch.no_grad()
    def _init_weights(self, config: Mamba3Config, generator: torch.Generator | None) -> None:
        """Initialise dt_bias, and scale the output projection for the residual stream."""
        dt = self.dt_bias.uniform_(math.log(config.dt_min), math.log(config.dt_max), generator=generator)
        dt.exp_().clamp_(min=config.dt_init_floor)
        dt += torch.log(-torch.expm1(-dt))  # the inverse of softplus
        self.out_proj.weight /= math.sqrt(config.n_layers)  # n_layers terms add up in the residual stream

    def plan(self, ids: Tensor, state: Mamba3State | None, seq_idx: Tensor | None) -> Past | None:
        """Return the token before each one, found once for all layers; see `Mixer.plan`."""
        return None if seq_idx is None else Past.of(seq_idx)

    def forward(
        self, u: Tensor, state: Mamba3State | None = None, past: Past | None = None, /
    ) -> tuple[Tensor, Mamba3State]:
        """Mix along time; see `Mixer.forward`."""
        if state is not None and len(state.ssm) != len(u):
            raise ValueError(f"state: expected {len(u)} rows, got {len(state.ssm)}")
        state = self.init_state(len(u)) if state is None else state
        seq_idx = None if past is None else past.seq_idx
        z, x, angle, tokens, products = self._project(u, state.angle, seq_idx)
        y, ssm = trapezoid(tokens, state.k, self._values(state.v), self.D, state.ssm, past, products)
        after = Mamba3State(angle, ssm, last(tokens.k, state.k, past), last(x, state.v, past))
        return self._out(y, z), after

    def tokens(self, u: Tensor) -> Tokens:
        """Return what the recurrence takes of a text u (batch, seq_len, d_model)."""
        return self._project(u, self.init_state(len(u)).angle, None)[3]

    def init_state(self, batch_size: int) -> Mamba3State:
        """Return zeros in float32, or in float64 in a float64 model; see `Mixer.init_state`."""
        config, zeros = self.config, self.D.new_zeros
        return Mamba3State(
            zeros(batch_size, config.n_heads, config.n_angles),
            zeros(batch_size, config.n_heads, config.d_head, config.d_state),
            zeros(batch_size, config.rank, config.n_heads, config.d_state),
            zeros(batch_size, config.n_heads, config.d_head),
        )

    def step(self, u: Tensor, state: Mamba3State, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        z, x, angle, tokens, _ = self._project(u[:, None], state.angle, None)
        x, tokens = x[:, 0], Tokens(*(t[:, 0] for t in tokens))
        y = advance(state.ssm, tokens, state.k, self._values(state.v), self.D)
        for old, new in zip((state.angle, state.k, state.v), (angle, tokens.k, x), strict=True):
            old.copy_(new)
        return self._out(y, z[:, 0])

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        config, in_proj, out_proj = self.config, matrix(self.in_proj), matrix(self.out_proj)
        norms, biases = (self.B_norm.weight, self.C_norm.weight), (self.B_bias, self.C_bias)
        mimo = None if config.mimo_rank is None else (self.mimo_x, self.mimo_z, self.mimo_o)
        gated = None if self.norm is None else self.norm.weight
        if in_proj is None or out_proj is None or self.B_norm.eps != self.C_norm.eps:
            return None
        if not plain(self.dt_bias, self.D, *biases, *norms, *(mimo or ()), gated):
            return None
        weights = ops.Mamba3Weights(
            in_proj=in_proj,
            out_proj=out_proj,
            dt_bias=self.dt_bias,
            D=self.D,
            biases=biases,
            norms=norms,
            eps=self.B_norm.eps,
            mimo=mimo,
            norm=gated,
            norm_eps=0.0 if self.norm is None else self.norm.eps,
            d_head=config.d_head,
            n_groups=config.n_groups,
            n_angles=config.n_angles,
            A_softplus=config.A_activation == "softplus",
            A_floor=config.A_floor,
        )
        return [ops.Sublayer(weights, layer, norm)]

    def _project(
        self, u: Tensor, angle: Tensor, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tokens, Tensor]:
        """Return z, x, the angles after the last token, what the recurrence takes, and products of q and k.

        Args:
            u: (batch, seq_len, d_model).
            angle: (batch, n_heads, n_angles) before the first token.
            seq_idx: of packed and padded rows, see `Mixer.plan`.
        """
        config, dtype = self.config, self.D.dtype
        z, x, B, C, dt, A, trap, rate = torch.split(self.in_proj(u), list(config.splits), -1)
        x, dt, A, trap, rate = (t.to(dtype) for t in (x, dt, A, trap, rate))
        dt = F.softplus(dt + self.dt_bias)
        A = F.softplus(A) if config.A_activation == "softplus" else heavy_tail(A)
        late = trap.sigmoid() * dt
        x = torch.unflatten(x, -1, (config.n_heads, config.d_head))
        q, k, products, angle = ops.rotary(
            self.C_norm(self._vectors(C)),
            self.B_norm(self._vectors(B)),
            math.pi * rate.tanh(),
            dt,
            self.C_bias.transpose(0, 1),
            self.B_bias.transpose(0, 1),
            angle,
            seq_idx,
            halves=config.mimo_rank is not None,
        )
        tokens = Tokens(
            q=q,
            k=k,
            v=self._values(x),
            log_decay=-dt * A.clamp(min=config.A_floor),
            early=dt - late,
            late=late,
        )
        return z, x, angle, tokens, products

    def _vectors(self, B: Tensor) -> Tensor:
        """Return B or C (..., rank n_groups d_state) as (..., rank, n_groups, d_state)."""
        return torch.unflatten(B, -1, (self.config.rank, self.config.n_groups, self.config.d_state))

    def _values(self, x: Tensor) -> Tensor:
        """Return the vectors x_r (..., rank, n_heads, d_head) of x (..., n_heads, d_head)."""
        if self.config.mimo_rank is None:
            return x[..., None, :, :]
        return x[..., None, :, :] * self.mimo_x.transpose(0, 1).to(x.dtype)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the output of y (..., rank, n_heads, d_head) and its gate z (..., d_inner)."""
        mimo, dtype = self.config.mimo_rank is not None, z.dtype
        z = torch.unflatten(z.to(y.dtype), -1, (1, *y.shape[-2:]))
        if mimo:
            z = z * self.mimo_z.transpose(0, 1).to(y.dtype)
        y = y * F.silu(z) if self.norm is None else self.norm(y.flatten(-2), z.flatten(-2)).view(y.shape)
        if mimo:
            y = y * self.mimo_o.transpose(0, 1).to(y.dtype)
        return cast(Tensor, self.out_proj(y.sum(-3).flatten(-2).to(dtype)))


def heavy_tail(x: Tensor) -> Tensor:
    """Return 1 + x where x >= 0, else 1 / (1 - x): positive, with a continuous slope.

    Args:
        x: any shape.
    """
    return torch.where(x >= 0, 1 + x, (1 - x.clamp(max=0)).reciprocal())


class Mamba3(LanguageModel):
    """A language model of Mamba-3 blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: Mamba3Config
    decodable = (Mamba3Mixer, GatedRMSNorm, MLPBlock, GatedMLP)

    @staticmethod
    def block(config: Mamba3Config, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        mixer = Mamba3Mixer(config, generator)
        if not config.d_intermediate:
            return Block(config, mixer)
        return MLPBlock(config, mixer, rounded(config.d_intermediate), generator)


ENTRY = ModelEntry(
    name="mamba3",
    kind="language",
    year=2026,
    paper="Mamba-3: Improved Sequence Modeling using State Space Principles",
    arxiv="2603.15569",
    idea="a state that turns",
    parents=("mamba2",),
    cls=Mamba3,
    config=Mamba3Config,
    presets=PRESETS,
    verbs=LANGUAGE,
)
