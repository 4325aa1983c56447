"""S4D: On the Parameterization and Initialization of Diagonal State Space Models.

Albert Gu, Ankit Gupta, Karan Goel, Christopher Ré, 2022, arXiv 2206.11893. The softmax kernel is that of DSS:
Diagonal State Spaces are as Effective as Structured State Spaces, Ankit Gupta, Albert Gu, Jonathan Berant,
2022, arXiv 2203.14343.

Parent: S4. Kept: the layer, the time steps, the spectrum that HiPPO gave A.
Changed: the rank-one term is dropped, so A is diagonal and the kernel a sum of n exponentials; B is folded
into C, since only their product matters.

Deviations from the official code: the model takes an initial state and returns the final one; padding and
packed sequences are supported; the softmax of DSS runs over l_max steps, whatever the sequence length, so
that chunks of a sequence give the same results as the whole.

The layer, for channel h of the input u:

    A   = -exp(log_A_real) + i A_imag                       one of each conjugate pair
    z   = dt A,  B_bar = (exp(z) - 1) / A                   zero-order hold
    K_l = 2 Re sum_n C_n B_bar_n exp(z_n)^l                 the Vandermonde product
    y   = K * u + D u
    out = glu(out_proj(gelu(y)))                            which mixes the channels

Glossary: H = d_model; N = d_state, stored as N / 2 complex numbers; Δ = dt; Λ = A; L = seq_len, or
l_max in the softmax.
"""

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import linear
from longscan.models.common.lti import GatedMixer, SSMState, StateSpaceConfig, System, start_log_dt
from longscan.models.common.mixer import Block
from longscan.models.s4 import clipped, nplr
from longscan.ops import diagonal_ssm, diagonal_ssm_step, vandermonde

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16},
    "tiny-lm": {"d_model": 384, "n_layers": 8, "vocab_size": 4096},  # the default of `longscan train`
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4DConfig(StateSpaceConfig):
    """The configuration of an S4D; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    init: Literal["legs", "inv", "lin", "real"] = "lin"  # initialisation of A, section 4
    discretization: Literal["zoh", "bilinear", "softmax"] = "zoh"  # "softmax" is the kernel of DSS
    l_max: int | None = None  # L, the steps that the softmax runs over

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check_pairs()
        if (self.l_max is not None) != (self.discretization == "softmax"):
            raise LongscanError(
                "l_max: expected a number of steps for 'softmax' and none otherwise, got "
                f"{self.l_max} with {self.discretization!r}."
            )
        self.check("l_max")


def spectrum(init: str, d_state: int) -> Tensor:
    """Return the initial diagonal of A, one of each conjugate pair, (d_state / 2,) complex128.

    Args:
        init: "legs", the eigenvalues of the normal part of HiPPO-LegS; "inv", a formula close to them; "lin",
            those of a Fourier series; "real", decay only.
        d_state: even.
    """
    n = torch.arange(d_state // 2, dtype=torch.float64)
    if init == "legs":
        return nplr("legs", d_state)[0]
    if init == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    frequency = math.pi * n if init == "lin" else d_state / math.pi * (d_state / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), frequency)


class DiagonalSSM(System):
    """The systems of S4D, one per channel.

    Args:
        config: the configuration.
        channels: number of systems.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    recurrence = ("log_dt", "log_A_real", "A_imag")
    convolves = False  # the recurrence is as fast and returns the state

    def __init__(self, config: S4DConfig, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.discretization, self.l_max = config.discretization, config.l_max
        shape = (channels, config.d_state // 2)
        self.log_dt = start_log_dt(config, channels, generator)
        self.log_A_real = nn.Parameter(torch.empty(shape))
        self.A_imag = nn.Parameter(torch.empty(shape))
        self.C = nn.Parameter(torch.empty(*shape, 2))
        self.D = nn.Parameter(torch.empty(channels))
        if not self.C.is_meta:
            A = spectrum(config.init, config.d_state)
            with torch.no_grad():
                self.log_A_real.copy_((-A.real).log())
                self.A_imag.copy_(A.imag)
            nn.init.normal_(self.C, std=0.5**0.5, generator=generator)
            if config.init == "legs":  # the official code initialises B with V* B_LegS, otherwise with 1
                B = clipped(nplr("legs", config.d_state).B)
                with torch.no_grad():
                    self.C.copy_(torch.view_as_real(torch.view_as_complex(self.C.double()) * B))
            nn.init.normal_(self.D, generator=generator)

    @property
    def A(self) -> Tensor:
        """The diagonal of the state matrix, (channels, n) complex."""
        return torch.complex(-self.log_A_real.to(self.dtype).exp(), self.A_imag.to(self.dtype))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Return z = log A_bar and C B_bar, each (channels, n) complex."""
        A, dt = self.A, self.dt[:, None]
        C = torch.view_as_complex(self.C.to(self.dtype))
        z = dt * A
        if self.discretization == "bilinear":
            return ((1 + z / 2) / (1 - z / 2)).log(), C * dt / (1 - z / 2)
        B_bar = torch.expm1(z) / A
        if self.discretization == "softmax":
            assert self.l_max is not None
            B_bar = B_bar / torch.expm1(self.l_max * z)  # exp(z l) / A over its sum for all l < l_max
        return z, C * B_bar

    def kernel(self, length: int) -> Tensor:
        """Return the kernel (channels, length); see `System.kernel`."""
        z, C = self.discrete()
        return vandermonde(C, z, length)

    def scan(self, u: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the recurrence; see `System.scan`. The state is (batch, channels, n, 2)."""
        return diagonal_ssm(u, *self.discrete(), state, seq_idx)

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """Run one step; see `System.advance`."""
        return diagonal_ssm_step(state, u, *self.cached(self.discrete))

    def init_state(self, batch_size: int) -> SSMState:
        """Return zeros; see `System.init_state`."""
        return SSMState(self.C.new_zeros(batch_size, *self.C.shape, dtype=self.dtype))

    @torch.no_grad()
    def rescale_time(self, factor: float) -> None:
        """Scale every time step; the softmax keeps its normalisation."""
        before = self.dt[:, None] * self.A
        super().rescale_time(factor)
        if self.l_max is not None:
            C = torch.view_as_complex(self.C)
            C *= torch.expm1(self.l_max * self.dt[:, None] * self.A) / torch.expm1(self.l_max * before)


class S4D(LanguageModel):
    """A language model of diagonal state spaces.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: S4DConfig

    @staticmethod
    def block(config: S4DConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        out_proj = linear(config.d_model, 2 * config.d_model, True, generator)
        return Block(config, GatedMixer(DiagonalSSM(config, config.d_model, generator), out_proj))


ENTRY = ModelEntry(
    name="s4d",
    kind="language",
    year=2022,
    paper="On the Parameterization and Initialization of Diagonal State Space Models",
    arxiv="2206.11893",
    idea="a sum of fading waves",
    parents=("s4",),
    cls=S4D,
    config=S4DConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
