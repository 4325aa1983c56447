"""The configuration of a hybrid, and the sizes that are published; see `hybrid`."""

import dataclasses
import math
from typing import Any, ClassVar, Literal, TypeAlias

from longscan.core.checks import check_range
from longscan.errors import LongscanError
from longscan.models.common.attention import AttentionLayer
from longscan.models.common.experts import ExpertsLayer, RouterKind
from longscan.models.common.feed_forward import FeedForwardKind
from longscan.models.common.mixer import LanguageModelConfig
from longscan.models.mamba import MambaConfig
from longscan.models.mamba2 import GateOrder, Mamba2Layer

MAX_LAYERS = 10_000  # a pattern is not repeated further
NEEDED = {
    "*": ("n_heads",),
    "P": ("n_heads",),
    "-": ("d_ff",),
    "E": ("n_experts", "n_active_experts", "d_expert"),
}

Family: TypeAlias = Literal["own", "falcon_h1", "granitemoehybrid", "bamba", "nemotron_h", "jamba"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternConfig(LanguageModelConfig):
    """The configuration of a model whose layers a string names.

    Attributes:
        letters: the kinds of layers.
    """

    letters: ClassVar[str]

    pattern: str  # a letter per layer; repeated to n_layers
    n_layers: int = 0  # 0: as many as the pattern has letters

    def __post_init__(self) -> None:
        """Repeat the pattern, and check the ranges.

        Raises:
            LongscanError: a letter is unknown, or a value out of range.
        """
        if isinstance(self.pattern, str) and self.pattern and type(self.n_layers) is int:
            check_range("n_layers", self.n_layers, least=0, most=MAX_LAYERS)
            n_layers = self.n_layers or len(self.pattern)
            repeated = self.pattern * -(-n_layers // len(self.pattern))
            object.__setattr__(self, "n_layers", n_layers)
            object.__setattr__(self, "pattern", repeated[:n_layers])
        super().__post_init__()
        if unknown := sorted(set(self.pattern) - set(self.letters)):
            raise LongscanError(f"pattern: expected letters among {self.letters}, got {unknown[0]!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(PatternConfig):
    """The configuration of a hybrid.

    Raises:
        LongscanError: a value is out of range.
    """

    letters: ClassVar = "Mm*P-E"

    family: Family = "own"  # whose layout its files have

    n_heads: int | None = None  # of attention
    n_kv_heads: int | None = None  # None is n_heads
    d_head: int | None = None  # None is d_model / n_heads
    rope_theta: float | None = None  # None: attention has no positions
    rotary_fraction: float = 1.0  # of each head that rotates
    attention_multiplier: float | None = None  # scale of the scores; None is d_head ** -0.5
    attention_bias: bool = False
    attention_conv: int = 0  # taps of a convolution of queries, keys and values; 0: there is none
    max_positions: int = 2048  # the context length; longer sequences work, with a warning

    d_ssm: int | None = None  # channels of the recurrence; None is 2 d_model
    d_ssm_head: int = 64  # P
    n_ssm_groups: int = 1  # G
    d_state: int = 128  # N
    d_conv: int = 4  # K
    gated_norm: GateOrder = "gate-first"
    conv_bias: bool = True
    ssm_in_bias: bool = False
    ssm_out_bias: bool = False
    dt_limit: tuple[float, float | None] | None = None  # of Mamba-2: least and largest
    dt_rank: int | None = None  # R of Mamba; None is d_model / 16, rounded up
    inner_norms: Literal["none", "plain", "learned"] = "none"  # of Mamba's dt, B and C

    d_ff: int | None = None  # width inside the feed-forward layer
    feed_forward: FeedForwardKind = "swiglu"  # of experts too
    feed_forward_bias: bool = False

    n_experts: int | None = None
    n_active_experts: int | None = None  # of each token
    d_expert: int | None = None  # width inside an expert
    d_shared_expert: int = 0  # width inside the one that all tokens pass through; 0: there is none
    d_latent: int = 0  # width of what experts map; 0: they map d_model
    router: RouterKind = "topk-softmax"
    n_expert_groups: int = 1  # of a "sigmoid" router, as what follows
    n_active_groups: int = 1
    normalize_experts: bool = True
    experts_multiplier: float = 1.0

    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_divisor: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    key_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: tuple[float, float, float, float, float] = (1.0,) * 5  # of z, x, B, C and dt
    gate_multiplier: float = 1.0  # of W_gate x in the feed-forward layer
    down_multiplier: float = 1.0  # of its result

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not set(self.pattern) & set("Mm*P"):
            raise LongscanError(f"pattern: expected a layer that mixes, M, m, * or P, got {self.pattern!r}.")
        for letter in self.pattern:
            for name in NEEDED.get(letter, ()):
                if getattr(self, name) is None:
                    raise LongscanError(f"{name}: expected a number, for the {letter!r} of the pattern.")
        self.check("n_heads", "n_kv_heads", "d_head", "max_positions", "d_ff")
        self.check("d_ssm", "d_ssm_head", "n_ssm_groups", "d_state", "d_conv", "dt_rank")
        self.check("n_experts", "n_active_experts", "d_expert", "n_expert_groups", "n_active_groups")
        self.check("d_shared_expert", "d_latent", "attention_conv", least=0)
        self.check("rope_theta", "attention_multiplier", "key_multiplier", "logits_divisor", above=0)
        self.check("rotary_fraction", above=0, most=1)
        if self.dt_limit is not None:
            low, high = self.dt_limit[0], math.inf if self.dt_limit[1] is None else self.dt_limit[1]
            if not 0 <= low < high:
                raise LongscanError(f"dt_limit: expected 0 <= least < largest, got {low} and {high}.")
        if self.attention_conv and "P" in self.pattern:
            raise LongscanError("attention_conv: expected 0 for the 'P' of the pattern; or use M and *.")
        if self.n_heads and self.d_head is None and self.d_model % self.n_heads:
            got = f"{self.d_model} and {self.n_heads}"
            raise LongscanError(f"n_heads: expected a divisor of d_model, got {got}. Or set d_head.")
        for letter in set(self.pattern):  # which checks that heads, groups and experts fit
            self.mamba if letter == "m" else None  # noqa: B018
            self.mamba2 if letter in "MP" else None  # noqa: B018
            self.attention if letter in "*P" else None  # noqa: B018
            self.experts if letter == "E" else None  # noqa: B018

    @property
    def channels(self) -> int:
        """Channels of the recurrence: d_ssm or its default."""
        return 2 * self.d_model if self.d_ssm is None else self.d_ssm

    @property
    def head_width(self) -> int:
        """Width of a head of attention: d_head or its default."""
        assert self.n_heads is not None
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def mamba(self) -> MambaConfig:
        """The sizes and options of each Mamba."""
        if self.channels % self.d_model:
            raise LongscanError(
                f"d_ssm: expected a multiple of d_model = {self.d_model} for Mamba, got {self.channels}."
            )
        if self.ssm_in_bias != self.ssm_out_bias:
            raise LongscanError("ssm_out_bias: expected ssm_in_bias, for the 'm' of the pattern.")
        return MambaConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            vocab_size=self.vocab_size,
            d_state=self.d_state,
            d_conv=self.d_conv,
            expand=self.channels // self.d_model,
            dt_rank=self.dt_rank,
            conv_bias=self.conv_bias,
            bias=self.ssm_in_bias,
            inner_norms=self.inner_norms,
            inner_norm_eps=self.norm_eps,
        )

    @property
    def mamba2(self) -> Mamba2Layer:
        """The sizes and options of each Mamba-2."""
        factors = self.ssm_multipliers
        return Mamba2Layer(
            d_model=self.d_model,
            d_ssm=self.channels,
            d_head=self.d_ssm_head,
            d_state=self.d_state,
            n_groups=self.n_ssm_groups,
            d_conv=self.d_conv,
            norm=self.gated_norm,
            norm_eps=self.norm_eps,
            conv_bias=self.conv_bias,
            in_bias=self.ssm_in_bias,
            out_bias=self.ssm_out_bias,
            dt_limit=self.dt_limit,
            multipliers=None if factors == (1,) * 5 else factors,
            depth=self.n_layers,
        )

    @property
    def attention(self) -> AttentionLayer:
        """The sizes and options of each layer of attention."""
        assert self.n_heads is not None
        scale = self.head_width**-0.5 if self.attention_multiplier is None else self.attention_multiplier
        return AttentionLayer(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads if self.n_kv_heads is None else self.n_kv_heads,
            d_head=self.head_width,
            rope_theta=self.rope_theta,
            d_rotary=round(self.head_width * self.rotary_fraction),
            scale=scale * self.key_multiplier,  # which is linear in the keys
            bias=self.attention_bias,
            max_positions=self.max_positions,
            depth=self.n_layers,
        )

    @property
    def experts(self) -> ExpertsLayer:
        """The sizes and options of each mixture of experts."""
        assert self.n_experts
        assert self.n_active_experts
        assert self.d_expert
        return ExpertsLayer(
            d_model=self.d_model,
            n_experts=self.n_experts,
            n_active=self.n_active_experts,
            d_ff=self.d_expert,
            d_shared=self.d_shared_expert,
            d_latent=self.d_latent,
            kind=self.feed_forward,
            router=self.router,
            n_groups=self.n_expert_groups,
            n_active_groups=self.n_active_groups,
            normalize=self.normalize_experts,
            scale=self.experts_multiplier,
            depth=self.n_layers,
        )


def _and_then(mixers: str, other: str) -> str:
    """Return a pattern with another letter after each."""
    return "".join(f"{mixer}{other}" for mixer in mixers)


_GRANITE: dict[str, Any] = {
    "family": "granitemoehybrid",
    "vocab_size": 100352,
    "embedding_multiplier": 12.0,
    "max_positions": 131072,
}
_GRANITE_MIXERS = "MMMMM*" + "MMMMMMMMM*" * 3 + "MMMM"
_NEMOTRON: dict[str, Any] = {
    **{"family": "nemotron_h", "vocab_size": 131072, "tie_embeddings": False, "n_kv_heads": 8},
    **{"feed_forward": "relu2", "n_ssm_groups": 8, "max_positions": 8192, "residual_in_fp32": False},
}
_NEMOTRON_PATTERN = "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"d_model": 64, "pattern": "M-*-", "n_layers": 4, "vocab_size": 257, "d_ff": 128, "d_state": 16},
        **{"d_ssm_head": 16, "n_heads": 4, "n_kv_heads": 2},
    },
    "tiny-lm": {  # as large as Mamba's
        **{"d_model": 256, "pattern": "M-M-*-M-", "n_layers": 8, "vocab_size": 4096, "d_ff": 512},
        **{"d_state": 64, "n_heads": 4},
    },
    "falcon-h1-90m": {
        **{"family": "falcon_h1", "d_model": 512, "pattern": "P-" * 24, "vocab_size": 32768, "d_ff": 768},
        **{"n_heads": 8, "n_kv_heads": 2, "rope_theta": 1e11, "max_positions": 262144},
        **{"d_ssm": 768, "d_ssm_head": 32, "d_state": 64, "gated_norm": "none"},
    },
    "falcon-h1-0.5b": {
        **{"family": "falcon_h1", "d_model": 1024, "pattern": "P-" * 36, "vocab_size": 32784, "d_ff": 2048},
        **{"n_heads": 8, "n_kv_heads": 2, "d_head": 64, "rope_theta": 1e11, "max_positions": 16384},
        **{"d_ssm": 1536, "d_ssm_head": 64, "d_state": 128, "gated_norm": "none", "tie_embeddings": False},
        **{"embedding_multiplier": 5.656854249492381, "logits_multiplier": 0.0390625},
        **{
            "key_multiplier": 0.39062499999999994,
            "attention_out_multiplier": 0.9375,
            "ssm_in_multiplier": 1.25,
        },
        **{"ssm_out_multiplier": 0.23570226039551587, "gate_multiplier": 0.8838834764831844},
        **{"down_multiplier": 0.5859375},
        "ssm_multipliers": (0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738),
    },
    "granite-4.0-h-350m": {
        **{**_GRANITE, "d_model": 768, "pattern": _and_then("MMMMMMMMMM*MM*MMM*MMMMMMMMM*MMMM", "-")},
        **{"n_heads": 12, "n_kv_heads": 4, "d_ssm_head": 32, "d_ff": 2048, "residual_multiplier": 0.246},
        **{"attention_multiplier": 0.015625, "logits_divisor": 3.0},
    },
    "granite-4.0-h-1b": {
        **{**_GRANITE, "d_model": 1536, "pattern": _and_then(_GRANITE_MIXERS, "-")},
        **{"n_heads": 12, "n_kv_heads": 4, "d_ff": 4096, "residual_multiplier": 0.22},
        **{"attention_multiplier": 0.0078125, "logits_divisor": 6.0},
    },
    "granite-4.0-h-micro": {
        **{**_GRANITE, "d_model": 2048, "pattern": _and_then(_GRANITE_MIXERS, "-")},
        **{"n_heads": 32, "n_kv_heads": 8, "d_ff": 8192, "residual_multiplier": 0.22},
        **{"attention_multiplier": 0.015625, "logits_divisor": 8.0},
    },
    "granite-4.0-h-tiny": {
        **{**_GRANITE, "d_model": 1536, "pattern": _and_then(_GRANITE_MIXERS, "E")},
        **{"n_heads": 12, "n_kv_heads": 4, "residual_multiplier": 0.22},
        **{"n_experts": 64, "n_active_experts": 6, "d_expert": 512, "d_shared_expert": 1024},
        **{"attention_multiplier": 0.0078125, "logits_divisor": 6.0},
    },
    "granite-4.0-h-small": {
        **{**_GRANITE, "d_model": 4096, "pattern": _and_then(_GRANITE_MIXERS, "E")},
        **{"n_heads": 32, "n_kv_heads": 8, "residual_multiplier": 0.22},
        **{"n_experts": 72, "n_active_experts": 10, "d_expert": 768, "d_shared_expert": 1536},
        **{"attention_multiplier": 0.0078125, "logits_divisor": 16.0},
    },
    "bamba-9b": {
        **{"family": "bamba", "d_model": 4096, "vocab_size": 128256, "tie_embeddings": False},
        **{"pattern": _and_then("M" * 9 + "*" + "MMMMMMMM*" * 2 + "MMMM", "-"), "d_ff": 14336},
        **{"n_heads": 32, "n_kv_heads": 8, "rope_theta": 1e4, "rotary_fraction": 0.5},
        **{"max_positions": 262144},
    },
    "nemotron-h-4b": {
        **{**_NEMOTRON, "d_model": 3072, "pattern": _NEMOTRON_PATTERN, "d_ff": 12288},
        **{"d_ssm": 7168, "n_heads": 32, "d_head": 128},
    },
    "nemotron-h-8b": {
        **{**_NEMOTRON, "d_model": 4096, "pattern": _NEMOTRON_PATTERN, "d_ff": 21504, "n_heads": 32},
    },
    "nemotron-nano-9b-v2": {
        **{**_NEMOTRON, "d_model": 4480, "d_ff": 15680, "d_ssm": 10240, "d_ssm_head": 80},
        **{"n_heads": 40, "d_head": 128, "max_positions": 131072},
        "pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    },
    "nemotron-3-nano-30b-a3b": {
        **{**_NEMOTRON, "d_model": 2688, "d_ssm": 4096, "n_heads": 32, "n_kv_heads": 2, "d_head": 128},
        **{"n_experts": 128, "n_active_experts": 6, "d_expert": 1856, "d_shared_expert": 3712},
        **{"router": "sigmoid", "experts_multiplier": 2.5, "max_positions": 262144},
        "pattern": "MEMEM*E" + "MEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME",
    },
    "jamba-v0.1": {
        **{"family": "jamba", "d_model": 4096, "vocab_size": 65536, "tie_embeddings": False, "d_ff": 14336},
        **{"pattern": "m-mEm-mE*-mEm-mE" * 4, "n_heads": 32, "n_kv_heads": 8, "d_state": 16},
        **{"n_experts": 16, "n_active_experts": 2, "d_expert": 14336, "router": "softmax-topk"},
        **{"inner_norms": "learned", "norm_eps": 1e-6, "max_positions": 262144},
    },
}
