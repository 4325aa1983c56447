"""Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention.

Angelos Katharopoulos, Apoorv Vyas, Nikolaos Pappas, François Fleuret, 2020, arXiv 2006.16236.

Parent: the decoder of the Transformer, without cross-attention.
Kept: multi-head queries, keys and values, a feed-forward sublayer.
Changed: a product of feature maps replaces the softmax, so the sum over the past can be stored instead of the
past: a matrix per head that each token adds to. As a state space this is A = 1, B = phi(k), C = phi(q): the
input to the state depends on the token, but nothing is ever forgotten.

Deviations: pre-norm; positional encodings are added to the input of each layer, because the embedding has
none.

    q, k, v = W_q x, W_k x, W_v x                  per head; after a norm, plus the positional encoding
    S       = S + phi(k) [v; 1]'                   phi(x) = elu(x) + 1
    [n; d]  = S' phi(q)
    x       = x + W_o n / (d + eps)
    x       = x + W_2 relu(W_1 x)                  after a norm

Glossary: S = kv, whose last column is the sum z of the keys in the paper; eps = 1e-6.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import RMSNorm, linear
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.packing import SectionMixer
from longscan.models.transformer import sinusoid_angles
from longscan.ops._autocast import exact
from longscan.ops._chunks import causal_parts

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "n_heads": 4},
    "tiny-lm": {"d_model": 256, "n_layers": 4, "vocab_size": 4096, "n_heads": 4, "d_ff": 1152},
}
CHUNK = 64  # tokens that attend to each other directly; the state is updated between chunks only
EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(LanguageModelConfig):
    """The configuration of a linear Transformer.

    Raises:
        LongscanError: a value is out of range.
    """

    n_heads: int
    d_ff: int | None = None  # width inside the feed-forward layer; None is 4 d_model

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("n_heads", "d_ff")
        if self.d_model % self.n_heads or self.d_model % 2:
            what = f"d_model: expected an even multiple of n_heads ({self.n_heads})"
            raise LongscanError(f"{what}, got {self.d_model}.")

    @property
    def ff_width(self) -> int:
        """Width inside the feed-forward layer: d_ff or its default."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


class LinearAttentionState(NamedTuple):
    """The state of one layer.

    Attributes:
        kv: (batch, n_heads, d_head, d_head + 1) the sum of phi(k) [v; 1]' over all tokens.
        length: (batch,) int64 tokens consumed.
    """

    kv: Tensor
    length: Tensor


@exact
def accumulate(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of (q_i . k_j) v_j over j <= i, in chunks: in linear time, without a state per token.

    Args:
        q: (batch, seq_len, n_heads, d_k).
        k: likewise.
        v: (batch, seq_len, n_heads, d_v).
        kv: (batch, n_heads, d_k, d_v), the sum of k v' before.

    Returns:
        y: (batch, seq_len, n_heads, d_v).
        kv: after the last token.
    """
    seq_len = q.shape[1]
    size = min(CHUNK, seq_len)
    padding = -seq_len % size
    shape = (len(q), -1, size, q.shape[2])  # (batch, chunks, size, n_heads)
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, padding)).reshape(*shape, t.shape[3]) for t in (q, k, v))
    sums = torch.einsum("bnchd,bnche->bnhde", k, v)  # of each chunk
    after = kv[:, None] + sums.cumsum(1)
    before = torch.cat([kv[:, None], after[:, :-1]], 1)  # (batch, chunks, n_heads, d_k, d_v)
    scores = torch.einsum("bnihd,bnjhd->bnhij", q, k).tril()
    finite, later = causal_parts(v, 2)
    y = torch.einsum("bnhij,bnjhe->bnihe", scores, finite) + torch.einsum("bnihd,bnhde->bnihe", q, before)
    y = y if later is None else y + later
    return y.flatten(1, 2)[:, :seq_len], after[:, -1]


def features(x: Tensor) -> Tensor:
    """Return phi(x) = elu(x) + 1, which is positive."""
    return F.elu(x) + 1


class LinearAttention(SectionMixer[LinearAttentionState]):
    """Causal attention in linear time.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: LinearAttentionConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_model // config.n_heads
        self.in_proj = linear(config.d_model, 3 * config.d_model, False, generator)  # W_q, W_k, W_v
        self.out_proj = linear(config.d_model, config.d_model, False, generator)
        if not self.out_proj.weight.is_meta:
            with torch.no_grad():
                self.out_proj.weight /= math.sqrt(2 * config.n_layers)

    def mix(
        self, x: Tensor, state: LinearAttentionState | None, length: Tensor | None
    ) -> tuple[Tensor, LinearAttentionState]:
        """Mix along time; see `SectionMixer.mix`."""
        kv, begin = self.init_state(len(x)) if state is None else state
        time = torch.arange(x.shape[1], device=x.device)
        q, k, v = self._project(x, begin[:, None] + time)
        if length is not None:
            k = k * (time < length[:, None])[..., None, None]
        y, kv = accumulate(q, k, v, kv)
        end = begin + (x.shape[1] if length is None else length)
        return self._finish(y, x.dtype), LinearAttentionState(kv, end)

    def init_state(self, batch_size: int) -> LinearAttentionState:
        """Return zeros in float32, or in float64 in a float64 model; see `Mixer.init_state`."""
        weight = self.in_proj.weight
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        kv = weight.new_zeros(batch_size, self.n_heads, self.d_head, self.d_head + 1, dtype=kind)
        return LinearAttentionState(kv, kv.new_zeros(batch_size, dtype=torch.int64))

    @exact
    def step(self, x: Tensor, state: LinearAttentionState, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        q, k, v = self._project(x, state.length)  # (batch, n_heads, ...) each
        state.kv.add_(k[..., None] * v[..., None, :])
        state.length.add_(1)
        return self._finish((q[..., None, :] @ state.kv)[..., 0, :], x.dtype)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return phi(q), phi(k) and [v; 1], (..., n_heads, .), of x (..., d_model) at positions (...)."""
        x = x + encodings(position, x.shape[-1]).to(x.dtype)
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.n_heads, -1)).unbind(-3)
        # float32 at least, since these are summed over the whole sequence
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        return features(q), features(k), F.pad(v, (0, 1), value=1.0)

    def _finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Return numerators / denominators of y (..., n_heads, d_head + 1), projected to (..., d_model)."""
        y = y[..., :-1] / (y[..., -1:] + EPS)
        return cast(Tensor, self.out_proj(y.flatten(-2).to(dtype)))


def encodings(position: Tensor, d_model: int) -> Tensor:
    """Return the Transformer's positional encodings, all sines before all cosines.

    Args:
        position: (...) integers.
        d_model: an even width.

    Returns:
        (..., d_model) float64.
    """
    angles = sinusoid_angles(position, d_model)
    return torch.cat([angles.sin(), angles.cos()], -1)


class FeedForwardBlock(Block):
    """x + mixer(norm(x)), then x + W_2 f(W_1 ff_norm(x)).

    Args:
        config: the configuration.
        mixer: of the first sublayer.
        d_ff: width inside the second.
        activation: f.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        mixer: Mixer[Any],
        d_ff: int,
        activation: nn.Module,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(config, mixer)
        self.ff_norm = RMSNorm(config.d_model, config.norm_eps)
        wide = linear(config.d_model, d_ff, True, generator)
        narrow = linear(d_ff, config.d_model, True, generator)
        if not narrow.weight.is_meta:
            with torch.no_grad():
                narrow.weight /= math.sqrt(2 * config.n_layers)
        self.ff = nn.Sequential(wide, activation, narrow)

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the outputs of both sublayers to the residual stream x (batch, seq_len, d_model)."""
        x, state = super().forward(x, state, plan)
        return x + self.ff(self.ff_norm(x)), state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Add the outputs of both sublayers for one token per row, x (batch, d_model)."""
        x = super().step(x, state, plan)
        return cast(Tensor, x + self.ff(self.ff_norm(x)))


class LinearTransformer(LanguageModel):
    """A language model of linear attention and feed-forward layers.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: LinearAttentionConfig

    @staticmethod
    def block(config: LinearAttentionConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        mixer = LinearAttention(config, generator)
        return FeedForwardBlock(config, mixer, config.ff_width, nn.ReLU(), generator)


ENTRY = ModelEntry(
    name="linear_attention",
    kind="language",
    year=2020,
    paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arxiv="2006.16236",
    idea="a sum over all pairs of features",
    parents=("transformer",),
    cls=LinearTransformer,
    config=LinearAttentionConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
