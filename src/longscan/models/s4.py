"""S4: Efficiently Modeling Long Sequences with Structured State Spaces.

Albert Gu, Karan Goel, Christopher Ré, 2021, arXiv 2111.00396.

Parent: LSSL. Kept: a bank of state spaces initialised with HiPPO's matrix, the bilinear transform, a layer
whose nonlinearities are pointwise in time.
Changed: A is parametrised as Lambda - P P*, diagonal plus low rank, in the basis where it has that form; the
kernel is computed through its generating function at the roots of unity, in O(N + L) memory instead of O(N
L).

Deviations from the official code: both low-rank factors are P, as in its later versions; the model takes an
initial state and returns the final one; padding and packed sequences are supported.

The kernel, for channel h (section 3):

    K^(z) = sum_{l<L} C A_bar^l B_bar z^l
          = C~ (I - A_bar z)^-1 B_bar,  C~ = C (I - A_bar^L)                     where z^L = 1
          = 2 / (1 + z) (k_CB - k_CP (1 + k_PP)^-1 k_PB)                         Woodbury
    k_CB  = sum_n C~_n B_n / (g(z) - Lambda_n),  g(z) = 2 / dt (1 - z) / (1 + z) Cauchy
    K     = inverse Fourier transform of K^ at the L-th roots of unity
    out   = glu(out_proj(gelu(K * u + D u)))                                     mixes the channels

The parameter is C, unless l_max is set: then it is C~ for L = l_max, as in the paper, which needs no power of
A_bar for sequences up to that length. Either way a model works at any length.

Glossary: H = d_model; N = d_state, stored as N / 2 complex numbers; Δ = dt; L = seq_len; Λ = Lambda.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longscan.errors import LongscanError
from longscan.models.common.dense_lti import DenseSystem
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import linear
from longscan.models.common.lti import GatedMixer, SSMState, StateSpaceConfig, start_log_dt
from longscan.models.common.mixer import Block
from longscan.models.hippo import transition
from longscan.ops import cauchy

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16},
    "tiny-lm": {"d_model": 384, "n_layers": 8, "vocab_size": 4096, "d_state": 32, "l_max": 512},
}

FLOOR = 1e-4  # the smallest initial decay, for measures that have none
B_CLIP = 2.0  # the largest imaginary part of the initial B, as in the official code: LegS has 40 at N = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4Config(StateSpaceConfig):
    """The configuration of an S4; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    init: Literal["legs", "legt", "lagt", "fourier", "random", "spread"] = (
        "legs"  # the measure of the initial A
    )
    l_max: int | None = None  # L of the parameter C~; None: the parameter is C

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check_pairs()
        self.check("l_max")


class NPLR(NamedTuple):
    """A HiPPO matrix in normal plus low-rank form, A = V (Lambda - P^T conj(P)) V*, with V unitary.

    Only the eigenvalue of positive frequency of each conjugate pair is stored: full sums are twice the real
    part of sums over these.

    Attributes:
        Lambda: (n / 2,) complex128 eigenvalues, by frequency.
        P: (rank, n / 2) complex128.
        B: (n / 2,) complex128, the input matrix in the same basis.
        V: (n, n / 2) complex128, the basis.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def nplr(measure: str, n: int) -> NPLR:
    """Return the normal plus low-rank form of a HiPPO matrix (section 3, theorem 1).

    Args:
        measure: "legs", "legt", "lagt", "tlagt" or "fourier".
        n: size of the matrix, even.

    Raises:
        LongscanError: the measure has no such form, or n is odd.
    """
    if n % 2:
        raise LongscanError(f"n: expected an even number, for conjugate pairs, got {n}.")
    A, B = transition(measure, n)
    P = _low_rank(measure, A, B)
    normal = A + P.T @ P  # a multiple of the identity plus a skew matrix
    # eigh of -i skew, not eig of A: V is unitary up to rounding; A's own eigenvectors have entries of 2^n
    frequency, V = torch.linalg.eigh(-0.5j * (normal - normal.T))
    frequency, V = frequency[n // 2 :], V[:, n // 2 :]
    if measure == "fourier":  # frequency 0 has two real eigenvectors; combine them into one complex pair
        frequency[0], V[:, 0] = 0, 0
        V[0, 0], V[1, 0] = math.sqrt(0.5), 1j * math.sqrt(0.5)
    decay = normal.diagonal().mean().expand_as(frequency)
    return NPLR(torch.complex(decay, frequency), P.to(V.dtype) @ V.conj(), B.to(V.dtype) @ V.conj(), V)


def clipped(B: Tensor) -> Tensor:
    """Return an initial B (...,) complex with its imaginary part clipped, as in the official code."""
    return torch.complex(B.real, B.imag.clamp(-B_CLIP, B_CLIP))


def _low_rank(measure: str, A: Tensor, B: Tensor) -> Tensor:
    """Return P (rank, n) such that A + P^T P is normal: its symmetric part a multiple of the identity."""
    if measure in ("legs", "lagt", "tlagt"):
        return B[None] / math.sqrt(2)
    if measure == "legt":
        even = torch.arange(len(B)) % 2 == 0
        return torch.stack([B * even, B * ~even])
    if measure == "fourier":
        return B[None]
    raise LongscanError(f"measure: expected legs, legt, lagt, tlagt or fourier, got {measure!r}.")


def _random(config: S4Config, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return random Lambda, P and B of the same form, as an ablation of HiPPO.

    "random" draws from normal distributions, with poles as large as those of an N x N matrix of standard
    deviation 1 / N; "spread" draws the poles log-normally around 1, over decades.
    """
    parts = torch.randn(6, config.d_state // 2, dtype=torch.float64, generator=generator)
    if config.init == "random":
        parts[:4] *= config.d_state**-0.5
        parts[:2] = parts[:2].abs()
    else:
        parts[:2] = parts[:2].exp()
    P, B = torch.complex(*parts[2:4]), torch.complex(*parts[4:6])
    return torch.complex(-parts[0], parts[1]), P[None], B


class DPLR(DenseSystem):
    """The systems of S4, one per channel.

    Args:
        config: the configuration.
        channels: number of systems.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    recurrence = ("log_dt", "log_A_real", "A_imag", "P", "B")

    def __init__(self, config: S4Config, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.l_max = config.l_max
        n, rank = config.d_state // 2, 2 if config.init == "legt" else 1
        self.log_dt = start_log_dt(config, channels, generator)
        self.log_A_real = nn.Parameter(torch.empty(channels, n))
        self.A_imag = nn.Parameter(torch.empty(channels, n))
        self.P = nn.Parameter(torch.empty(channels, rank, n, 2))
        self.B = nn.Parameter(torch.empty(channels, n, 2))
        self.C = nn.Parameter(torch.empty(channels, n, 2))
        self.D = nn.Parameter(torch.empty(channels))
        if not self.C.is_meta:
            self._init_weights(config, generator)

    @torch.no_grad()
    def _init_weights(self, config: S4Config, generator: torch.Generator | None) -> None:
        """Initialise every channel with HiPPO's matrix."""
        if config.init in ("random", "spread"):
            poles, P, B = _random(config, generator)
        else:
            poles, P, B, _ = nplr(config.init, config.d_state)
            B = clipped(B)
        self.log_A_real.copy_((-poles.real).clamp(min=FLOOR).log())
        self.A_imag.copy_(poles.imag)
        self.P.copy_(torch.view_as_real(P))
        self.B.copy_(torch.view_as_real(B))
        nn.init.normal_(self.C, std=0.5**0.5, generator=generator)
        nn.init.normal_(self.D, generator=generator)
        self._learn(_fold(torch.view_as_complex(self.C.double())))

    @torch.no_grad()
    def _learn(self, C: Tensor) -> None:
        """Set the parameter C so that the systems have the output matrices C (channels, N)."""
        if self.l_max is not None:
            C = C - (C[:, None] @ torch.linalg.matrix_power(self.dense()[0], self.l_max))[:, 0]
        self.C.copy_(torch.view_as_real(_unfold(C)))

    @property
    def poles(self) -> Tensor:
        """Lambda, (channels, n) complex128, since its products with dt and time must be accurate."""
        return torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())

    def discrete(self) -> "Discrete":
        """Return the bilinear transform of the systems, by Woodbury's identity (appendix C.2)."""
        P, B = (torch.view_as_complex(x.double()) for x in (self.P, self.B))
        rate = 2 / self.log_dt.double().exp()[:, None]
        R = 1 / (rate - self.poles)  # (channels, n)
        seen = P.conj() * R[:, None]
        inner = 2 * torch.einsum("crn,csn->crs", seen, P).real
        inner = inner + torch.eye(P.shape[1], dtype=inner.dtype, device=inner.device)
        # (2 / dt - A)^-1 = R - across seen
        across = torch.linalg.solve(inner.mT.to(P.dtype), R[:, None] * P)
        B_seen = 2 * torch.einsum("crn,cn->cr", seen, B).real
        B_bar = 2 * (R * B - torch.einsum("cr,crn->cn", B_seen.to(B.dtype), across))
        return Discrete((rate + self.poles) * R, 2 * rate[..., None] * across, seen, B_bar)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the discrete systems as real matrices, in float64.

        Returns:
            A_bar: (channels, N, N), for a state of interleaved real and imaginary parts.
            B_bar: (channels, N).
            C: (channels, 1, N).
        """
        decay, across, seen, B_bar = self.discrete()
        n = decay.shape[1]
        turn = torch.stack([decay.real, -decay.imag, decay.imag, decay.real], -1).view(-1, n, 2, 1, 2)
        eye = torch.eye(n, dtype=turn.dtype, device=turn.device)[:, None, :, None]
        A_bar = (turn * eye).view(-1, 2 * n, 2 * n) - torch.einsum(
            "crm,crn->cmn", _parts(across), _fold(seen)
        )
        C = _fold(torch.view_as_complex(self.C.double()))
        if self.l_max is not None:
            power = torch.linalg.matrix_power(A_bar, self.l_max)
            eye = torch.eye(2 * n, dtype=power.dtype, device=power.device)
            C = torch.linalg.solve(eye - power, C[:, None], left=False)[:, 0]
        return A_bar, _parts(B_bar), C[:, None]

    def _truncated(self, length: int) -> tuple[Tensor, int]:
        """Return C~ (channels, n) complex and its L, which is at least `length`."""
        C = torch.view_as_complex(self.C.to(self.dtype))
        if self.l_max is not None and length <= self.l_max:
            return C, self.l_max
        row, reach = _fold(C.to(torch.complex128))[:, None], self.l_max or length
        power = torch.linalg.matrix_power(self.dense()[0], reach)
        if self.l_max is None:
            row = row - row @ power
        while reach < length:
            row, power, reach = row + row @ power, power @ power, 2 * reach
        return _unfold(row[:, 0]).to(C.dtype), reach

    def kernel(self, length: int) -> Tensor:
        """Return the kernel (channels, length); see `System.kernel`."""
        C, reach = self._truncated(length)
        P, B = (torch.view_as_complex(x.to(self.dtype)) for x in (self.P, self.B))
        rank = P.shape[1]
        left = torch.cat([C[:, None], P.conj()], 1)  # (channels, 1 + rank, n)
        right = torch.cat([B[:, None], P], 1)
        v = (left[:, :, None] * right[:, None]).flatten(1, 2).transpose(0, 1).contiguous()
        # z = exp(-2 pi i k / L): g(z) dt = 2 i tan(pi k / L), and infinite at z = -1
        k = torch.arange((reach + 1) // 2, dtype=torch.float64, device=C.device)
        t = 2 * torch.tan(torch.pi * k / reach)
        lam = self.log_dt.double().exp()[:, None] * self.poles
        sums = self.dt[:, None] * cauchy(v, t, lam).view(1 + rank, 1 + rank, *C.shape[:1], len(t))
        if rank == 1:
            value = sums[0, 0] - sums[0, 1] * sums[1, 0] / (1 + sums[1, 1])
        else:
            inner = sums[1:, 1:].permute(2, 3, 0, 1)  # (channels, k, rank, rank)
            eye = torch.eye(rank, dtype=C.dtype, device=C.device)
            solved = torch.linalg.solve(eye + inner, sums[1:, 0].permute(1, 2, 0))
            value = sums[0, 0] - (sums[0, 1:].permute(1, 2, 0) * solved).sum(-1)
        value = value * torch.complex(torch.ones_like(t), t / 2).to(C.dtype)
        if reach % 2 == 0:  # the limit at z = -1
            end = self.dt * (C * B).real.sum(1)
            value = torch.cat([value, torch.complex(end, torch.zeros_like(end))[:, None]], 1)
        K: Tensor = torch.fft.irfft(value, n=reach)
        return K[:, :length]

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """Run one step in O(N); see `System.advance`."""
        (decay, across, seen, B_bar), C = self.cached(self._step)
        with torch.no_grad():
            x = torch.view_as_complex(state)
            low = 2 * torch.einsum("crn,bcn->bcr", seen, x).real
            x.mul_(decay).add_(B_bar * u[..., None])
            x.sub_(torch.einsum("bcr,crn->bcn", low.to(x.dtype), across))
            return 2 * (C * x).real.sum(-1)

    def _step(self) -> tuple["Discrete", Tensor]:
        """Return the system and C (channels, n) for `advance`, in the dtype of the computation."""
        dtype = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        system = Discrete(*(x.to(dtype) for x in self.discrete()))
        return system, _unfold(self.dense()[2][:, 0]).to(dtype)

    def init_state(self, batch_size: int) -> SSMState:
        """Return zeros; see `System.init_state`."""
        return SSMState(self.C.new_zeros(batch_size, *self.C.shape, dtype=self.dtype))

    @torch.no_grad()
    def rescale_time(self, factor: float) -> None:
        """Scale every time step; C stays, so the parameter C~ changes."""
        C = self.dense()[2][:, 0]
        super().rescale_time(factor)
        self._learn(C)


class Discrete(NamedTuple):
    """A discrete system in O(N) numbers: x <- decay x - across 2 Re(seen x) + B_bar u, all complex128.

    Attributes:
        decay: (channels, n) the diagonal.
        across: (channels, rank, n) the columns of the low-rank term.
        seen: (channels, rank, n) its rows.
        B_bar: (channels, n).
    """

    decay: Tensor
    across: Tensor
    seen: Tensor
    B_bar: Tensor


def _parts(x: Tensor) -> Tensor:
    """Return x (..., n) complex as (..., 2 n), with real and imaginary parts interleaved."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _fold(C: Tensor) -> Tensor:
    """Return C (..., n) complex, of y = 2 Re C x, as the (..., 2 n) real one that acts on `_parts` of x."""
    return 2 * _parts(C.conj())


def _unfold(C: Tensor) -> Tensor:
    """Return the inverse of `_fold`."""
    pairs = C.unflatten(-1, (-1, 2)).contiguous()  # type: ignore[no-untyped-call]
    return torch.view_as_complex(pairs / 2).conj().resolve_conj()


class S4(LanguageModel):
    """A language model of structured state spaces.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: S4Config

    @staticmethod
    def block(config: S4Config, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        out_proj = linear(config.d_model, 2 * config.d_model, True, generator)
        return Block(config, GatedMixer(DPLR(config, config.d_model, generator), out_proj))


ENTRY = ModelEntry(
    name="s4",
    kind="language",
    year=2021,
    paper="Efficiently Modeling Long Sequences with Structured State Spaces",
    arxiv="2111.00396",
    idea="a linear system in O(N + L)",
    parents=("hippo", "lssl"),
    cls=S4,
    config=S4Config,
    presets=PRESETS,
    verbs=LANGUAGE,
)
