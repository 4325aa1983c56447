"""LSSL: Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers.

Albert Gu, Isys Johnson, Karan Goel, Khaled Saab, Tri Dao, Atri Rudra, Christopher Ré, 2021, arXiv 2110.13985.

Parent: HiPPO. Kept: its matrices, which make a state of N numbers remember the past.
Changed: the linear system is no longer part of an RNN but the layer itself: each channel is the input of a
linear system with learned time steps, A and B; the nonlinearities are between the layers. So a layer is both
a recurrence and a convolution.

Deviations from the paper: a learned A is a dense matrix, not a product of sparse ones, since these give no
fast kernel in floating point; `fixed` does not train A, B and dt (LSSL-f).

The layer, for channel h of the input u:

    A_bar, B_bar = the generalised bilinear transform of A, B for dt_h       section 2
    K_ml = C_m A_bar^l B_bar                                                 for M outputs a channel
    y    = K * u + D u
    out  = out_proj(gelu(y))                                                 mixes channels and outputs

The kernel costs O(N^2 L) time and O(N L) memory per channel, which S4 reduces.

Glossary: H = d_model; N = d_state; M = n_outputs; Δ = dt; L = seq_len; α = alpha.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longscan.models.common.dense_lti import DenseSystem
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import linear
from longscan.models.common.lti import SSMState, StateSpaceConfig, StateSpaceMixer, start_log_dt
from longscan.models.common.mixer import Block
from longscan.models.common.state_space import discretize, krylov
from longscan.models.hippo import transition

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16},
    "tiny-lm": {"d_model": 384, "n_layers": 9, "vocab_size": 4096, "d_state": 32, "n_outputs": 2},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSSLConfig(StateSpaceConfig):
    """The configuration of an LSSL; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    init: Literal["legs", "legt", "lagt", "random"] = "legs"  # the measure of the initial A
    n_outputs: int = 1  # M
    alpha: float = 0.5  # α, of the generalised bilinear transform
    fixed: bool = False  # A, B and dt are not trained

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("n_outputs")
        self.check("alpha", least=0, most=1)


class DenseSSM(DenseSystem):
    """The systems of LSSL: a shared A and B, and time steps and outputs per channel.

    Args:
        config: the configuration.
        channels: number of systems.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    recurrence = ("log_dt", "A", "B")

    def __init__(self, config: LSSLConfig, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        n, self.alpha = config.d_state, config.alpha
        self.log_dt = start_log_dt(config, channels, generator)
        self.A = nn.Parameter(torch.empty(n, n))
        self.B = nn.Parameter(torch.empty(n))
        self.C = nn.Parameter(torch.empty(channels, config.n_outputs, n))
        self.D = nn.Parameter(torch.empty(channels * config.n_outputs))
        if not self.C.is_meta:
            self._init_weights(config, generator)
        for name in self.recurrence:
            self.get_parameter(name).requires_grad_(not config.fixed)

    @torch.no_grad()
    def _init_weights(self, config: LSSLConfig, generator: torch.Generator | None) -> None:
        """Initialise with HiPPO's matrix."""
        if config.init == "random":
            nn.init.normal_(self.A, std=1 / config.d_state, generator=generator)
            nn.init.normal_(self.B, generator=generator)
        else:
            A, B = transition(config.init, config.d_state)
            self.A.copy_(A)
            self.B.copy_(B)
        nn.init.normal_(self.C, std=config.d_state**-0.5, generator=generator)
        nn.init.normal_(self.D, generator=generator)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Return A_bar (channels, N, N) and B_bar (channels, N)."""
        A, B, log_dt = (x.to(self.dtype) for x in (self.A, self.B, self.log_dt))
        shape = (len(log_dt), *A.shape)
        return discretize(A.expand(shape), B.expand(shape[:2]), log_dt.exp(), "gbt", self.alpha)

    def kernel(self, length: int) -> Tensor:
        """Return the kernel (channels n_outputs, length); see `System.kernel`."""
        return (self.C.to(self.dtype) @ krylov(*self.discrete(), length)).flatten(0, 1)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the discrete systems; see `DenseSystem.dense`."""
        return *self.discrete(), self.C

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """Run one step; see `System.advance`."""
        A_bar, B_bar = self.cached(self.discrete)
        with torch.no_grad():
            x = torch.einsum("cmn,bcn->bcm", A_bar, state) + B_bar * u[..., None]
            state.copy_(x)
            return torch.einsum("cmn,bcn->bcm", self.C.to(self.dtype), x).flatten(1)

    def init_state(self, batch_size: int) -> SSMState:
        """Return zeros; see `System.init_state`."""
        channels, _, n = self.C.shape
        return SSMState(self.C.new_zeros(batch_size, channels, n, dtype=self.dtype))


class LSSL(LanguageModel):
    """A language model of linear state space layers.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: LSSLConfig

    @staticmethod
    def block(config: LSSLConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        out_proj = linear(config.d_model * config.n_outputs, config.d_model, True, generator)
        return Block(config, StateSpaceMixer(DenseSSM(config, config.d_model, generator), out_proj))


ENTRY = ModelEntry(
    name="lssl",
    kind="language",
    year=2021,
    paper="Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
    arxiv="2110.13985",
    idea="a linear system, step by step or all at once",
    parents=("hippo",),
    cls=LSSL,
    config=LSSLConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
