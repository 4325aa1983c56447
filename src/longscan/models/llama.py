"""LLaMA: Open and Efficient Foundation Language Models.

Hugo Touvron and others, 2023, arXiv 2302.13971.

Parent: the decoder of the Transformer, without an encoder to look at. It is the yardstick beside Mamba, whose
paper calls it Transformer++.
Kept: every token looks at itself and at all before it, in several heads; two sublayers in each block.
Changed: norms stand before the sublayers and divide by the root mean square (1910.07467); positions are
rotations of queries and keys (RoPE, 2104.09864); the feed-forward layer is gated (SwiGLU, 2002.05202);
nothing has a bias. Several query heads may share one head of keys and values (grouped queries, 2305.13245),
as in LLaMA 2 and 3.

Deviations from the official code: rotated are the two halves of a head, as in Hugging Face's files, not
neighbours; the model reads from a state and returns one, both with gradients; padding and packed sequences
are honoured; the residual stream is float32 whatever the weights are. Angles are always float32.

The block, for tokens x of width d_model at positions t:

    q, k, v = W_q x, W_k x, W_v x                      per head of width d_head
    q, k    = R_t q, R_t k                             R_t turns (x_i, x_{i + d_head / 2}) by the angle
                                                       t rope_theta^(-2 i / d_head)
    x       = x + W_o softmax(q k' / sqrt(d_head)) v   over the tokens up to t; x normed before
    x       = x + W_down (silu(W_gate x) * W_up x)     x normed before

What it remembers grows with the text: a key and a value for each token, layer and head of keys.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import Linear, RMSNorm, WeightOnly, blank
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.state import KV
from longscan.ops import attention
from longscan.ops._segments import check_seq_idx, segments

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "n_heads": 4, "n_kv_heads": 2},
    # about as large as the presets of Mamba with these names
    "tiny-lm": {"d_model": 256, "n_layers": 4, "vocab_size": 4096, "n_heads": 4, "d_ff": 800},
    "130m": {"d_model": 768, "n_layers": 12, "vocab_size": 50277, "n_heads": 12},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(LanguageModelConfig):
    """The sizes of a Llama.

    Raises:
        LongscanError: a value is out of range.
    """

    n_heads: int
    n_kv_heads: int | None = None  # heads of keys and values; None is n_heads
    d_head: int | None = None  # None is d_model / n_heads
    d_ff: int | None = None  # width inside the feed-forward layer; None is 8/3 d_model, rounded up to 32s
    rope_theta: float = 10000.0  # the longest wavelength, nearly, over 2 pi
    max_positions: int = 2048  # longer texts are read, with a warning: it was not made for them

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("n_heads", "n_kv_heads", "d_head", "d_ff", "max_positions"):
            if getattr(self, name) is not None:
                self.check_count(name)
        if self.n_heads % self.kv_heads:
            raise LongscanError(
                f"n_kv_heads: expected a divisor of {self.n_heads} heads, got {self.kv_heads}."
            )
        if self.d_head is None and self.d_model % self.n_heads:
            got = f"{self.d_model} and {self.n_heads}"
            raise LongscanError(f"n_heads: expected a divisor of d_model, or d_head beside them, got {got}.")
        if self.head_width % 2:
            raise LongscanError(f"d_head: expected an even width, halves are rotated, got {self.head_width}.")
        if not self.rope_theta > 0:
            raise LongscanError(f"rope_theta: expected more than 0, got {self.rope_theta}.")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: n_kv_heads, or the default it stands for."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head: d_head, or the default it stands for."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def ff_width(self) -> int:
        """Width inside the feed-forward layer: d_ff, or the default it stands for."""
        return -(-8 * self.d_model // 96) * 32 if self.d_ff is None else self.d_ff


class Places(NamedTuple):
    """Where the tokens of a pass stand and what they may look at, the same in all layers.

    Attributes:
        cos: (batch or 1, seq_len, 1, d_head / 2) of the angles of the positions; without seq_len in a step.
        sin: likewise.
        past: tokens of the state that are looked at.
        mask: (batch or 1, 1, seq_len, past + seq_len) bool, True where a token may look; None: it is causal.
        kept: (batch, capacity) which of the past and new places stay in the state, those of each row in
            front; None: all.
        length: (batch,) int64 tokens after the pass; before it in a step.
    """

    cos: Tensor
    sin: Tensor
    past: int
    mask: Tensor | None
    kept: Tensor | None
    length: Tensor


class Attention(Mixer[KV]):
    """Causal attention with rotated queries and keys, and its cache.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        d_head = config.head_width
        d_q, d_kv = config.n_heads * d_head, config.kv_heads * d_head
        self.q_proj = _matrix(config.d_model, d_q, config, generator)
        self.k_proj = _matrix(config.d_model, d_kv, config, generator)
        self.v_proj = _matrix(config.d_model, d_kv, config, generator)
        self.o_proj = _matrix(d_q, config.d_model, config, generator, ends=True)

    def plan(self, ids: Tensor, state: KV | None, seq_idx: Tensor | None) -> Places:
        """Work out positions and masks once for all layers; see `Mixer.plan`."""
        if ids.dim() == 1:
            assert state is not None
            return self._plan_step(ids, state)
        batch, seq_len = ids.shape
        seq_idx = check_seq_idx(seq_idx, batch, seq_len)
        length = torch.zeros(batch, dtype=torch.int64, device=ids.device) if state is None else state.length
        if len(length) != batch:
            raise ValueError(f"initial_state: expected {batch} rows, got {len(length)}")
        past = 0 if state is None else state.longest
        if seq_idx is None and (not past or int(length.min()) == past):  # rows of one length, without gaps
            positions = torch.arange(past, past + seq_len, device=ids.device)[None]
            mask = None
            if past and seq_len > 1:
                mask = torch.ones(seq_len, past + seq_len, dtype=torch.bool, device=ids.device).tril(past)
            self._warn(past + seq_len)
            return self._places(positions, past, mask, None, length + seq_len)
        if seq_idx is None:
            seq_idx = torch.zeros(batch, seq_len, dtype=torch.int64, device=ids.device)
        starts, padding = segments(seq_idx)
        section = torch.where(padding, -1, starts.cumsum(1))  # (batch, seq_len) 0 continues the state
        count = (~padding).cumsum(1)  # tokens so far, this one included
        before = torch.where(starts, count - 1, 0).cummax(1).values  # of those, in other sections
        positions = (count - 1 - before).clamp(min=0) + torch.where(section > 0, 0, length[:, None])
        old = torch.arange(past, device=ids.device) < length[:, None]  # (batch, past)
        causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=ids.device).tril()
        new = (section[:, :, None] == section[:, None]) & causal  # (batch, seq_len, seq_len)
        mask = torch.cat([(section == 0)[:, :, None] & old[:, None], new], 2)[:, None]
        last = section.amax(1, keepdim=True)  # (batch, 1) the section that the state is left in
        stays = torch.cat([old & (last <= 0), (section == last) & ~padding], 1)  # (batch, past + seq_len)
        kept = (~stays).int().argsort(dim=1, stable=True)
        return self._places(positions, past, mask, kept, stays.sum(1))

    def _plan_step(self, ids: Tensor, state: KV) -> Places:
        """Do the same for one token per row."""
        if len(state.length) != len(ids):
            raise ValueError(f"state: expected {len(ids)} rows, got {len(state.length)}")
        length = state.length.clone()  # the layers count up their own
        past = state.longest
        self._warn(past + 1)
        if int(length.min()) == past:
            return self._places(length[:1], past, None, None, length)
        mask = torch.arange(past + 1, device=ids.device) <= length[:, None]  # (batch, past + 1)
        return self._places(length, past, mask[:, None, None], None, length)

    def _places(
        self, positions: Tensor, past: int, mask: Tensor | None, kept: Tensor | None, length: Tensor
    ) -> Places:
        """Add the angles of positions (...) to the plan."""
        half = self.config.head_width // 2
        # float32 whatever the weights: in fewer bits far positions would be the same
        exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / half
        frequencies = 1.0 / self.config.rope_theta**exponents
        angles = positions[..., None].float() * frequencies  # (..., d_head / 2)
        return Places(angles.cos()[..., None, :], angles.sin()[..., None, :], past, mask, kept, length)

    def _warn(self, length: int) -> None:
        """Warn of texts of another length than the model was made for."""
        if length > self.config.max_positions:
            warnings.warn(
                f"a text is longer than the {self.config.max_positions:,} positions this model was made for: "
                "it is read all the same, but expect worse predictions there.",
                stacklevel=2,
            )

    def forward(self, x: Tensor, state: KV | None, places: Places, /) -> tuple[Tensor, KV]:
        """Let each token look back.

        Args:
            x: (batch, seq_len, d_model).
            state: what came before the first token; nothing if None.
            places: where the tokens are.

        Returns:
            y: (batch, seq_len, d_model).
            state: after the last token.
        """
        q, k, v = self._project(x, places)  # (batch, seq_len, heads, d_head) each
        if state is not None and places.past:
            k = torch.cat([state.k[:, : places.past], k], 1)
            v = torch.cat([state.v[:, : places.past], v], 1)
        y = attention(q, k, v, mask=places.mask, causal=places.mask is None)
        if places.kept is not None:
            rows = torch.arange(len(k), device=k.device)[:, None]
            inside = torch.arange(places.kept.shape[1], device=k.device) < places.length[:, None]
            k, v = (torch.where(inside[..., None, None], t[rows, places.kept], 0) for t in (k, v))
        return cast(Tensor, self.o_proj(y.flatten(2))), KV(k, v, places.length.clone())

    def init_state(self, batch_size: int) -> KV:
        """Return the state before any token: no keys, no values.

        Args:
            batch_size: rows.
        """
        weight = self.k_proj.weight
        stored = isinstance(self.k_proj, WeightOnly)  # its activations are wide
        shape = (batch_size, 0, self.config.kv_heads, self.config.head_width)
        empty = torch.empty(shape, dtype=torch.float32 if stored else weight.dtype, device=weight.device)
        return KV(empty, empty.clone(), torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def step(self, x: Tensor, state: KV, places: Places, /) -> Tensor:
        """Take in one token per row.

        Args:
            x: (batch, d_model).
            state: with room; the token is added to it.
            places: where the tokens are.

        Returns:
            y: (batch, d_model).
        """
        q, k, v = self._project(x, places)  # (batch, heads, d_head) each
        k, v = k.to(state.k.dtype), v.to(state.v.dtype)  # autocast may have come or gone
        end = places.past + 1
        if places.mask is None:
            state.k[:, places.past], state.v[:, places.past] = k, v
        else:
            rows = torch.arange(len(x), device=x.device)
            state.k[rows, places.length], state.v[rows, places.length] = k, v
        state.length.add_(1)
        y = attention(q[:, None], state.k[:, :end], state.v[:, :end], mask=places.mask)
        return cast(Tensor, self.o_proj(y.flatten(1)))

    def _project(self, x: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Turn x (..., d_model) into rotated queries and keys, and values, (..., heads, d_head)."""
        split = (-1, self.config.head_width)
        q, k, v = (proj(x).unflatten(-1, split) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = places.cos.to(q.dtype), places.sin.to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d_head / 2}) by its angle.

    Args:
        x: (..., d_head).
        cos: (..., d_head / 2) of the angles, broadcast over x.
        sin: likewise.

    Returns:
        (..., d_head).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x).

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.gate_proj = _matrix(config.d_model, config.ff_width, config, generator)
        self.up_proj = _matrix(config.d_model, config.ff_width, config, generator)
        self.down_proj = _matrix(config.ff_width, config.d_model, config, generator, ends=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class LlamaBlock(Block):
    """x + attention(norm(x)), then x + mlp(mlp_norm(x)).

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, Attention(config, generator))
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config, generator)

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add both sublayers' words to the residual stream x (batch, seq_len, d_model)."""
        x, state = super().forward(x, state, plan)
        return x + self.mlp(self.mlp_norm(x)), state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Do the same for one token per row, x (batch, d_model)."""
        x = super().step(x, state, plan)
        return cast(Tensor, x + self.mlp(self.mlp_norm(x)))


class Llama(LanguageModel):
    """A decoder-only Transformer.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    config: LlamaConfig

    @staticmethod
    def block(config: LlamaConfig, generator: torch.Generator | None = None) -> Block:
        """Make one block."""
        return LlamaBlock(config, generator)

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text it was made for."""
        return self.config.max_positions


def _matrix(
    d_in: int, d_out: int, config: LlamaConfig, generator: torch.Generator | None, ends: bool = False
) -> nn.Linear:
    """Make a Linear as GPT-2 starts it; one that ends a sublayer is smaller, 2 n_layers of them add up."""
    layer = blank(Linear, d_in, d_out, bias=False)
    if not layer.weight.is_meta:
        std = 0.02 / math.sqrt(2 * config.n_layers) if ends else 0.02
        nn.init.normal_(layer.weight, std=std, generator=generator)
    return layer


# Hugging Face's beginnings of names -> ours
OUTER = {
    "model.embed_tokens.": "backbone.embedding.",
    "model.norm.": "backbone.norm_f.",
    "lm_head.": "lm_head.",
}
INNER = {
    "self_attn.": "mixer.",
    "mlp.": "mlp.",
    "input_layernorm.": "norm.",
    "post_attention_layernorm.": "mlp_norm.",
}
LAYERS = ("model.layers.", "backbone.layers.")


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the parameters of a Hugging Face checkpoint our names.

    A `lm_head.weight` stays, see `mamba.rename`. Old files hold the frequencies of the rotations, which the
    Config tells: those are left out.

    Args:
        state_dict: name -> tensor.

    Returns:
        The tensors under our names.
    """
    frequencies = ".rotary_emb.inv_freq"
    names = [name for name in state_dict if not name.endswith(frequencies)]
    return {_translate(name, LAYERS, OUTER, INNER): state_dict[name] for name in names}


def publish(name: str) -> str:
    """Return Hugging Face's name of a parameter.

    Args:
        name: ours.
    """
    outer, inner = ({ours: theirs for theirs, ours in table.items()} for table in (OUTER, INNER))
    return _translate(name, LAYERS[::-1], outer, inner)


def _translate(name: str, layers: tuple[str, str], outer: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """Change the beginning of a name, or what follows the number of its layer."""
    if not name.startswith(layers[0]):
        start = next((start for start in outer if name.startswith(start)), "")
        return outer.get(start, "") + name.removeprefix(start)
    number, _, rest = name.removeprefix(layers[0]).partition(".")
    start = next((start for start in inner if rest.startswith(start)), "")
    return f"{layers[1]}{number}.{inner.get(start, '')}{rest.removeprefix(start)}"


ENTRY = ModelEntry(
    name="llama",
    kind="language",
    year=2023,
    paper="LLaMA: Open and Efficient Foundation Language Models",
    arxiv="2302.13971",
    idea="every token before, rotated by its distance",
    parents=("transformer",),
    cls=Llama,
    config=LlamaConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
    rename=rename,
)
