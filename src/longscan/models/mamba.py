"""Mamba: Linear-Time Sequence Modeling with Selective State Spaces.

Albert Gu and Tri Dao, 2023, arXiv 2312.00752.

Parents: H3 (a gated state space model between convolutions), with the diagonal state matrix of S4D-real, and
GAU, whose single block of mixing and gating replaces two.
Kept: a linear recurrence over a diagonal state, a short causal convolution before it, a gate after it.
Changed: the step size and the matrices B and C depend on the input, so the model selects what to remember and
what to forget; H3's two blocks (mixing, gated MLP) become one; a scan replaces the long convolution.

Deviations from the official code: the model takes an initial state and returns the final one, both with
gradients; padding and packed sequences are supported; the state and the parameters of the recurrence (A_log,
D, the bias of dt_proj) are float32 whatever the dtype of the other weights; a tied head is the embedding
itself.

The block, for a token x of width d_model:

    [x; z] = in_proj x                                         two streams of width d_inner
    x      = silu(conv1d x)                                    over the last d_conv tokens
    [dt; B; C] = x_proj x                                      what makes it selective (section 3.2)
    dt, B, C   = norm(dt), norm(B), norm(C)                    with inner_norms: RMS norms
    dt     = softplus(dt_proj dt)
    h      = exp(dt A) h + dt B x,    A = -exp(A_log)          zero-order hold on A (section 2), Euler on B
    y      = C h + D x
    out    = out_proj (y silu(z))

The inner norms keep large models stable: those of Jamba (Lieber and others, 2024, arXiv 2403.19887) have
learned weights, those of Falcon Mamba (Zuo and others, 2024, arXiv 2410.05355) have none.

Glossary: B, L, D (sizes) = batch, seq_len, d_model; E = expand, E D = d_inner; N = d_state; R = rank;
K = d_conv; Δ = dt; A, B, C, D (matrices) as above; h = ssm.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import DtProjection, PlainRMSNorm, RMSNorm, blank, linear
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.native_decode import matrix, plain
from longscan.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257},
    "tiny-lm": {"d_model": 256, "n_layers": 8, "vocab_size": 4096},  # the default of `longscan train`
    "130m": {"d_model": 768, "n_layers": 24, "vocab_size": 50277},
    "370m": {"d_model": 1024, "n_layers": 48, "vocab_size": 50277},
    "790m": {"d_model": 1536, "n_layers": 48, "vocab_size": 50277},
    "1.4b": {"d_model": 2048, "n_layers": 48, "vocab_size": 50277},
    "2.8b": {"d_model": 2560, "n_layers": 64, "vocab_size": 50277},
    "falcon-mamba-7b": {
        **{"d_model": 4096, "n_layers": 64, "vocab_size": 65024},
        **{"tie_embeddings": False, "inner_norms": "plain"},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(LanguageModelConfig):
    """The configuration of a Mamba; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_state: int = 16  # N
    d_conv: int = 4  # K
    expand: int = 2  # E
    dt_rank: int | None = None  # R; None is d_model / 16, rounded up
    conv_bias: bool = True
    bias: bool = False  # of in_proj and out_proj
    dt_min: float = 1e-3  # time steps are initialised log-uniformly in [dt_min, dt_max]
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    inner_norms: Literal["none", "plain", "learned"] = "none"  # of dt, B and C; "plain" is without weights
    inner_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_state", "d_conv", "expand", "dt_rank")
        if not 0 < self.dt_min <= self.dt_max:
            got = f"{self.dt_min} and {self.dt_max}"
            raise LongscanError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {got}.")
        if self.dt_init not in ("random", "constant"):
            raise LongscanError(f"dt_init: expected 'random' or 'constant', got {self.dt_init!r}.")
        if self.inner_norms not in ("none", "plain", "learned"):
            raise LongscanError(
                f"inner_norms: expected 'none', 'plain' or 'learned', got {self.inner_norms!r}."
            )
        self.check("dt_scale", "dt_init_floor", above=0)
        self.check("inner_norm_eps", least=0)

    @property
    def d_inner(self) -> int:
        """Channels of the recurrence, E D in the paper."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Width of dt before its projection: dt_rank or its default."""
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank


class MambaState(NamedTuple):
    """The state of one layer.

    Attributes:
        conv: (batch, d_conv - 1, d_inner) the last inputs of the convolution, oldest first.
        ssm: (batch, d_inner, d_state) the hidden state h.
    """

    conv: Tensor
    ssm: Tensor


class MambaMixer(Mixer[MambaState]):
    """The selective state space block.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    recurrence = ("A_log", "D", "dt_proj.bias")
    copied = ("A_log", "conv1d.weight")

    def __init__(self, config: MambaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        d_inner, d_state, rank = config.d_inner, config.d_state, config.rank
        self.widths, self.normalises = (rank, d_state, d_state), config.inner_norms != "none"
        self.in_proj = linear(config.d_model, 2 * d_inner, config.bias, generator)
        self.conv1d = blank(nn.Conv1d, d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias)
        self.x_proj = linear(d_inner, sum(self.widths), False, generator)
        self.dt_proj = blank(DtProjection, rank, d_inner)
        if self.normalises:
            learned, eps = config.inner_norms == "learned", config.inner_norm_eps
            norms = [RMSNorm(width, eps) if learned else PlainRMSNorm(eps) for width in self.widths]
            self.dt_layernorm, self.b_layernorm, self.c_layernorm = norms
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = linear(d_inner, config.d_model, config.bias, generator)
        if not self.A_log.is_meta:  # which only needs shapes
            self._init_weights(config, generator)

    @torch.no_grad()
    def _init_weights(self, config: MambaConfig, generator: torch.Generator | None) -> None:
        """Initialise everything but the Linears, and scale the output projection for the residual stream."""
        self.A_log.copy_(torch.arange(1.0, config.d_state + 1).log())  # S4D-real: A_n = -n
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5), generator=generator)
        if self.conv1d.bias is not None:
            bound = config.d_conv**-0.5
            nn.init.uniform_(self.conv1d.bias, -bound, bound, generator=generator)
        bound = config.rank**-0.5 * config.dt_scale
        if config.dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound, generator=generator)
        else:
            nn.init.constant_(self.dt_proj.weight, bound)
        dt = self.dt_proj.bias.uniform_(math.log(config.dt_min), math.log(config.dt_max), generator=generator)
        dt.exp_().clamp_(min=config.dt_init_floor)
        dt += torch.log(-torch.expm1(-dt))  # the inverse of softplus
        self.out_proj.weight /= math.sqrt(config.n_layers)  # n_layers terms add up in the residual stream

    def forward(
        self, x: Tensor, state: MambaState | None = None, seq_idx: Tensor | None = None, /
    ) -> tuple[Tensor, MambaState]:
        """Mix along time; see `Mixer.forward`."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (batch, seq_len, d_inner) each
        conv, ssm = (None, None) if state is None else state
        x, conv = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", conv, seq_idx)
        (dt, B, C), A = self._select(x), -torch.exp(self.A_log)
        y, ssm = selective_scan(x, dt, A, B, C, self.D, z, self.dt_proj.bias, True, ssm, seq_idx)
        return self.out_proj(y), MambaState(conv, ssm)

    def init_state(self, batch_size: int) -> MambaState:
        """Return zeros in float32, or in float64 in a float64 model; see `Mixer.init_state`."""
        d_inner, d_state = self.A_log.shape
        past = self.conv1d.weight.shape[-1] - 1
        zeros = self.A_log.new_zeros
        return MambaState(zeros(batch_size, past, d_inner), zeros(batch_size, d_inner, d_state))

    def step(self, x: Tensor, state: MambaState, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (batch, d_inner) each
        x = causal_conv1d_step(state.conv, x, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        (dt, B, C), A = self._select(x), -torch.exp(self.A_log)
        y = selective_scan_step(state.ssm, x, dt, A, B, C, self.D, z, self.dt_proj.bias, True)
        return cast(Tensor, self.out_proj(y))

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dt (..., d_inner), without its bias, and B and C (..., d_state) of x (..., d_inner)."""
        dt, B, C = self.x_proj(x).split(self.widths, dim=-1)
        if self.normalises:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return self.dt_proj(dt), B, C

    def inner_norms(self) -> tuple[RMSNorm | PlainRMSNorm, ...]:
        """Return the norms of dt, B and C, if there are any."""
        return (self.dt_layernorm, self.b_layernorm, self.c_layernorm) if self.normalises else ()

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        weight, bias = self.conv1d.weight, self.conv1d.bias
        projections = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        in_proj, x_proj, dt_proj, out_proj = map(matrix, projections)
        norms = self.inner_norms()
        inner = [getattr(module, "weight", None) for module in norms]
        eps = {norm.eps for norm in norms}
        if not plain(weight, bias, self.A_log, self.D, *inner) or len(eps) > 1:
            return None
        if in_proj is None or x_proj is None or dt_proj is None or out_proj is None:
            return None
        if any(w is not None and w.shape != (width,) for w, width in zip(inner, self.widths, strict=False)):
            return None
        weights = ops.MambaWeights(
            in_proj,
            x_proj,
            dt_proj,
            out_proj,
            conv_weight=weight.detach().squeeze(1).T.contiguous(),
            conv_bias=bias,
            A=self.A_log.detach().exp() * -math.log2(math.e),
            D=self.D,
            inner_norms=(inner[0], inner[1], inner[2]) if inner else (None, None, None),
            inner_eps=eps.pop() if eps else None,
        )
        return [ops.Sublayer(weights, layer, norm)]


class Mamba(LanguageModel):
    """A language model of Mamba blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: MambaConfig
    decodable = (MambaMixer,)

    @staticmethod
    def block(config: MambaConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        return Block(config, MambaMixer(config, generator))


ENTRY = ModelEntry(
    name="mamba",
    kind="language",
    year=2023,
    paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arxiv="2312.00752",
    idea="a state that chooses",
    parents=("h3", "gau"),
    cls=Mamba,
    config=MambaConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
