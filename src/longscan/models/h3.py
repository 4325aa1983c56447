"""Hungry Hungry Hippos: Towards Language Modeling with State Space Models.

Daniel Y. Fu, Tri Dao, Khaled K. Saab, Armin W. Thomas, Atri Rudra, Christopher Ré, 2022, arXiv 2212.14052.

Parents: linear attention, whose q, k and v it keeps, and S4D, which replaces its sum over the past.
Changed: k passes through a shift SSM, a short memory of the preceding tokens, so that what enters the state
can depend on the neighbouring token; and the state decays as a state space does. Content enters through the
two products, but the state space between them is the same for every input: Mamba makes that depend on the
token too.

Deviations: the shift is a short convolution, with fewer taps than the 64 of the official code, whose direct
path is its first tap; norms are RMSNorms. The projections of the mixer have no biases; the official ones
have.

The block, for tokens x of width d_model:

    q, k, v = W x                                  after a norm; in heads of width d_head
    y       = SSM(shift(k) v')                     each entry of the product through the S4D of its head
    x       = x + W_o (q' y)
    x       = x + W_2 gelu(W_1 x)                  after a norm

Glossary: N = d_state; d_shift = taps of the shift; d_head = 1 multiplies k and v as they are.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import linear
from longscan.models.common.lti import SSMState
from longscan.models.common.mixer import Block, Mixer
from longscan.models.linear_attention import FeedForwardBlock
from longscan.models.s4d import DiagonalSSM, S4DConfig
from longscan.ops import causal_conv1d, causal_conv1d_step

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16},
    "tiny-lm": {"d_model": 256, "n_layers": 4, "vocab_size": 4096, "d_ff": 1088},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class H3Config(S4DConfig):
    """The configuration of an H3.

    Raises:
        LongscanError: a value is out of range.
    """

    d_shift: int = 4
    d_head: int = 1
    d_ff: int | None = None  # width inside the feed-forward layer; None is 4 d_model

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_shift", "d_head", "d_ff")
        if self.d_model % self.d_head:
            raise LongscanError(f"d_head: expected a divisor of d_model {self.d_model}, got {self.d_head}.")

    @property
    def ff_width(self) -> int:
        """Width inside the feed-forward layer: d_ff or its default."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


class H3State(NamedTuple):
    """The state of one layer.

    Attributes:
        shift: (batch, d_shift - 1, d_model) the last keys, oldest first.
        ssm: (batch, d_head^2, n_heads, ...) the hidden state for each product of k and v.
    """

    shift: Tensor
    ssm: Tensor


class H3Mixer(Mixer[H3State]):
    """A shift SSM and a diagonal SSM between two products.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: H3Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.d_head = config.d_head
        self.in_proj = linear(config.d_model, 3 * config.d_model, False, generator)  # q, k, v
        self.shift = nn.Parameter(torch.empty(config.d_model, config.d_shift))
        self.ssm = DiagonalSSM(config, config.d_model // config.d_head, generator)
        self.out_proj = linear(config.d_model, config.d_model, False, generator)
        self.recurrence = self.slow = tuple(f"ssm.{name}" for name in self.ssm.recurrence)
        if not self.shift.is_meta:
            with torch.no_grad():
                nn.init.kaiming_uniform_(self.shift, a=math.sqrt(5), generator=generator)
                self.out_proj.weight /= math.sqrt(2 * config.n_layers)

    def forward(
        self, x: Tensor, state: H3State | None = None, seq_idx: Tensor | None = None, /
    ) -> tuple[Tensor, H3State]:
        """Mix along time; see `Mixer.forward`."""
        shift, ssm = (None, None) if state is None else state
        q, k, v = self.in_proj(x).chunk(3, -1)
        k, shift = causal_conv1d(k, self.shift, initial_state=shift, seq_idx=seq_idx)
        pairs = self.d_head**2
        if seq_idx is not None:
            seq_idx = seq_idx.repeat_interleave(pairs, 0)
        before = None if ssm is None else SSMState(ssm.flatten(0, 1))
        y, after = self.ssm(self._products(k, v), before, seq_idx)
        after = H3State(shift, after.ssm.view(-1, pairs, *after.ssm.shape[1:]))
        return self.out_proj(self._query(q, y)), after

    def init_state(self, batch_size: int) -> H3State:
        """Return zeros in float32, or in float64 in a float64 model; see `Mixer.init_state`."""
        pairs = self.d_head**2
        ssm = self.ssm.init_state(batch_size * pairs).ssm
        shift = ssm.new_zeros(batch_size, self.shift.shape[1] - 1, len(self.shift))
        return H3State(shift, ssm.view(batch_size, pairs, *ssm.shape[1:]))

    def step(self, x: Tensor, state: H3State, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        q, k, v = self.in_proj(x).chunk(3, -1)  # (batch, d_model) each
        k = causal_conv1d_step(state.shift, k, self.shift)
        ssm = SSMState(state.ssm.view(-1, *state.ssm.shape[2:]))  # a view: the step updates the state
        y = self.ssm.step(self._products(k[:, None], v[:, None])[:, 0], ssm)
        return cast(Tensor, self.out_proj(self._query(q[:, None], y[:, None])[:, 0]))

    def rescale_time(self, factor: float) -> None:
        """Scale the time steps of the diagonal SSM; the shift still counts tokens."""
        self.ssm.rescale_time(factor)

    def _products(self, k: Tensor, v: Tensor) -> Tensor:
        """Return the products of k and v (batch, seq_len, d_model): (batch d_head^2, seq_len, n_heads)."""
        if self.d_head == 1:
            return k * v
        k, v = (t.reshape(*t.shape[:2], -1, self.d_head) for t in (k, v))
        return torch.einsum("bthi,bthj->bijth", k, v).flatten(0, 2)

    def _query(self, q: Tensor, y: Tensor) -> Tensor:
        """Return q (batch, seq_len, d_model) times the states of the products: (batch, seq_len, d_model)."""
        if self.d_head == 1:
            return q * y
        y = y.view(-1, self.d_head, self.d_head, *y.shape[1:])
        q = q.reshape(*q.shape[:2], -1, self.d_head)
        return torch.einsum("bthi,bijth->bthj", q, y).flatten(2)


class H3(LanguageModel):
    """A language model of H3 layers.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: H3Config

    @staticmethod
    def block(config: H3Config, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        mixer = H3Mixer(config, generator)
        return FeedForwardBlock(config, mixer, config.ff_width, nn.GELU(), generator)


ENTRY = ModelEntry(
    name="h3",
    kind="language",
    year=2022,
    paper="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
    arxiv="2212.14052",
    idea="a state between two products",
    parents=("s4d", "linear_attention"),
    cls=H3,
    config=H3Config,
    presets=PRESETS,
    verbs=LANGUAGE,
)
