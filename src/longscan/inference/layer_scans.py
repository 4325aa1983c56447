"""What a layer of a language model computes from a text: time steps, states, and matrices of attention.

The hidden attention of Mamba models: Ali, Zimerman and Wolf 2024, arXiv 2403.01590. Unrolled along the text,
a selective scan is a product with a causal matrix, in Mamba a different one for each channel:

    y_i = sum over j <= i of alpha_ij u_j + D u_i
    alpha_ij = C_i . exp(A (dt_{j+1} + ... + dt_i)) dt_j B_j

In Mamba-2 (arXiv 2405.21060) and Mamba-3 (2603.15569) it is one for each head, with the names of `trapezoid`:

    alpha_ij = (q_i . k_j) exp(l_{j+1} + ... + l_i) w_ij        l is log_decay, dt A in Mamba-2
    w_ij     = late_j + early_{j+1} for j < i, late_i for j = i

Mamba-2's late is dt, its early 0; Mamba-3's q and k are rotated, and early + late is dt. alpha has no
softmax: its rows don't add up to 1, and it may be negative.

The half-life of what is stored at a token is the number of further tokens until exp(sum of dt A) is at most
one half. After the end of the text the sum is assumed to grow at its mean rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.models.common.trapezoid import Tokens, advance
from longscan.ops import selective_scan_step
from longscan.ops.attention import attention_ref

__all__ = ["ChannelScan", "HeadScan", "Scan", "Softmax"]

BLOCK = 32  # tokens whose decays are computed pairwise; between blocks they factorise
ELEMENTS = 1 << 24  # of a tensor, about
STARTS = 64  # tokens at which half-lives are measured, evenly spaced in longer texts; fewer in huge layers


class ChannelScan(NamedTuple):
    """The scan of a layer over a text, where each channel has its own dt and each state its own decay: Mamba.

    Attributes:
        u: (n, d_inner) input of the scan.
        dt: (n, d_inner) step sizes, after bias and softplus.
        A: (d_inner, d_state).
        B: (n, d_state).
        C: (n, d_state).
        D: (d_inner,).
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    @property
    def noun(self) -> str:
        """What has a dt of its own."""
        return "channel"

    @property
    def lanes(self) -> int:
        """How many there are."""
        return self.dt.shape[1]

    def norms(self) -> Tensor:
        """Return the norm of the state after each token, (n,)."""
        state, norms = self.u.new_zeros(1, *self.A.shape), []
        for u, dt, B, C in zip(*(x[:, None] for x in (self.u, self.dt, self.B, self.C)), strict=True):
            selective_scan_step(state, u, dt, self.A, B, C)
            norms.append(state.norm())
        return torch.stack(norms)

    def half_lives(self) -> Tensor:
        """Return half-lives in tokens, (n_starts, d_inner, d_state); infinity where nothing decays."""
        return _half_lives(self.dt, -self.A)

    def alpha(self, channels: slice) -> Tensor:
        """Return the matrices alpha of some channels, (n_channels, n, n)."""
        dt, A = self.dt[:, channels], self.A[channels]
        total, n = dt.double().cumsum(0), len(dt)
        result = dt.new_zeros(dt.shape[1], n, n)
        added = dt[..., None] * self.B[:, None]  # (n, n_channels, d_state)

        def decay(time: Tensor) -> Tensor:
            return (time.to(dt.dtype)[..., None] * A).exp()

        for begin in range(0, n, BLOCK):
            block = slice(begin, begin + BLOCK)
            C, now = self.C[block], total[block]
            if begin:  # all pairs with earlier tokens pass the end of the token before the block
                since = decay(now - total[begin - 1])
                held = decay(total[begin - 1] - total[:begin]) * added[:begin]
                result[:, block, :begin] = torch.einsum("in,idn,jdn->dij", C, since, held)
            between = (now[:, None] - now[None]).clamp(min=0)
            inside = torch.einsum("in,ijdn,jdn->dij", C, decay(between), added[block])
            result[:, block, block] = inside.tril()
        return result

    def matrix(self, channel: int | None = None) -> Tensor:
        """Return alpha of a channel, or the mean of |alpha| over all, (n, n)."""
        if channel is not None:
            return self.alpha(slice(channel, channel + 1))[0]
        return torch.stack(list(self.parts())).sum(0) / self.lanes

    def parts(self, elements: int = ELEMENTS) -> Iterator[Tensor]:
        """Yield sums of |alpha| over some channels each, (n, n); the mean over all is that of `matrix`.

        Args:
            elements: of the largest tensor, about.
        """
        n, d_inner = self.u.shape
        width = max(1, elements // (n * max(n, BLOCK * self.A.shape[1])))
        for at in range(0, d_inner, width):
            yield self.alpha(slice(at, at + width)).abs().sum(0)


class HeadScan(NamedTuple):
    """The scan of a layer over a text, where all states of a head decay alike: Mamba-2 and Mamba-3.

    Attributes:
        tokens: of the text, with leading axis (n,).
        D: (n_heads,) or (n_heads, d_head).
    """

    tokens: Tokens
    D: Tensor

    @property
    def noun(self) -> str:
        """What has a dt of its own."""
        return "head"

    @property
    def lanes(self) -> int:
        """How many there are."""
        return self.dt.shape[1]

    @property
    def dt(self) -> Tensor:
        """The step sizes (n, n_heads), after bias, softplus and limits."""
        return self.tokens.early + self.tokens.late

    def norms(self) -> Tensor:
        """Return the norm of the state after each token, (n,)."""
        v, k = self.tokens.v, self.tokens.k
        state, norms = v.new_zeros(1, *v.shape[2:], k.shape[3]), []
        before = torch.zeros_like(k[:1]), torch.zeros_like(v[:1])
        for parts in zip(*(x[:, None] for x in self.tokens), strict=True):
            token = Tokens(*parts)
            advance(state, token, *before, self.D.new_zeros(v.shape[2]))
            before = token.k, token.v
            norms.append(state.norm())
        return torch.stack(norms)

    def half_lives(self) -> Tensor:
        """Return half-lives in tokens, (n_starts, n_heads, 1); infinity where nothing decays."""
        log_decay = self.tokens.log_decay
        return _half_lives(-log_decay, torch.ones_like(log_decay[0])[:, None])

    def alpha(self, heads: slice) -> Tensor:
        """Return the matrices alpha of some heads, (n_heads, n, rank, n, rank).

        The axes are those of the outputs, then of the inputs; the rank is 1 except in a MIMO Mamba-3.
        """
        q, k, _, log_decay, early, late = (
            x[..., heads, :] if x.dim() == 4 else x[:, heads] for x in self.tokens
        )
        total = log_decay.double().cumsum(0).T  # (n_heads, n)
        decay = (total[:, :, None] - total[:, None]).clamp(max=0).exp().to(q.dtype)
        later = F.pad(early[1:].T, (0, 1))[:, None].expand_as(decay)  # weight of a token in the step after it
        mask = decay.tril() * late.T[:, None] + (decay * later).tril(-1)
        return torch.einsum("irhn,jshn->hirjs", q, k) * mask[:, :, None, :, None]

    def matrix(self, head: int | None = None) -> Tensor:
        """Return alpha of a head, or the mean of |alpha| over all, (n, n); a mean over the rank as well."""
        if head is not None:
            return self.alpha(slice(head, head + 1))[0].mean((1, 3))
        return torch.stack(list(self.parts())).sum(0) / self.lanes

    def parts(self, elements: int = ELEMENTS) -> Iterator[Tensor]:
        """Yield sums of |alpha| over some heads each, (n, n); the mean over all is that of `matrix`.

        Args:
            elements: of the largest tensor, about.
        """
        n, rank, n_heads, _ = self.tokens.q.shape
        width = max(1, elements // (n * rank) ** 2)
        for at in range(0, n_heads, width):
            yield self.alpha(slice(at, at + width)).abs().mean((2, 4)).sum(0)


Scan: TypeAlias = ChannelScan | HeadScan


class Softmax(NamedTuple):
    """The attention of a layer over a text.

    Attributes:
        q: (n, n_heads, d_head) queries, rotated.
        k: (n, n_kv_heads, d_head) keys, rotated.
        v: (n, n_kv_heads, d_head) values.
        scale: of the scores; None: d_head ** -0.5.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None

    @property
    def noun(self) -> str:
        """What has a matrix of its own."""
        return "head"

    @property
    def lanes(self) -> int:
        """How many there are."""
        return self.q.shape[1]

    def matrix(self, head: int | None = None) -> Tensor:
        """Return the weights of a head, or their mean over all, (n, n)."""
        q, k, v = (x[None] for x in (self.q, self.k, self.v))
        weights = attention_ref(q, k, v, causal=True, scale=self.scale)[1][0]  # (n_heads, n, n)
        return weights.mean(0) if head is None else weights[head]


def _half_lives(dt: Tensor, rate: Tensor) -> Tensor:
    """Return half-lives in tokens, (n_starts, n_lanes, n_rates), of a state that decays by exp(-dt rate).

    Args:
        dt: (n, n_lanes).
        rate: (n_lanes, n_rates).
    """
    total = dt.double().cumsum(0).T.contiguous()  # (n_lanes, n)
    n = total.shape[1]
    n_starts = min(n, STARTS, max(1, ELEMENTS // (2 * rate.numel())))
    starts = torch.linspace(0, n - 1, n_starts, device=dt.device).round().long()
    reached = total[:, starts, None] + (math.log(2) / rate.double())[:, None]  # (n_lanes, n_starts, n_rates)
    index = torch.searchsorted(total, reached.flatten(1)).view(reached.shape)
    beyond = (n - 1 + (reached - total[:, -1, None, None]) * n / total[:, -1, None, None]).ceil()
    return (torch.where(index < n, index, beyond) - starts[:, None]).transpose(0, 1)
