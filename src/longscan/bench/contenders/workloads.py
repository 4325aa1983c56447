"""The workloads of all contenders: inputs, training step, decoding. Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.bench.worker import Run

__all__ = [
    "OpRun",
    "conv_inputs",
    "decoding",
    "differentiable",
    "excerpt",
    "next_token_loss",
    "poles",
    "random_ids",
    "scan_inputs",
    "signal",
    "ssd_inputs",
    "training",
]

N_EXCERPT = 128


def scan_inputs(batch: int, seq_len: int, d_inner: int, d_state: int) -> tuple[Tensor, ...]:
    """Return the arguments of a selective scan.

    Args:
        batch: rows.
        seq_len: steps.
        d_inner: channels.
        d_state: states per channel.

    Returns:
        u and dt (batch, seq_len, d_inner), A (d_inner, d_state), B and C (batch, seq_len, d_state), D
        (d_inner,); dt is positive, as after a softplus, and A negative.
    """
    random = torch.Generator().manual_seed(0)
    u, dt = (torch.randn(batch, seq_len, d_inner, generator=random) for _ in range(2))
    A = -torch.arange(1.0, d_state + 1).repeat(d_inner, 1)
    B, C = (torch.randn(batch, seq_len, d_state, generator=random) for _ in range(2))
    return u, F.softplus(dt - 4), A, B, C, torch.ones(d_inner)


def ssd_inputs(batch: int, seq_len: int, n_heads: int, d_head: int, d_state: int) -> tuple[Tensor, ...]:
    """Return the arguments of state space duality as Mamba-2 has them, with one group.

    Args:
        batch: rows.
        seq_len: steps.
        n_heads: heads.
        d_head: channels per head.
        d_state: states per channel.

    Returns:
        x (batch, seq_len, n_heads, d_head), dt and log_decay (batch, seq_len, n_heads), B and C
        (batch, seq_len, 1, d_state), D (n_heads,).
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, seq_len, n_heads, d_head, generator=random)
    dt = F.softplus(torch.randn(batch, seq_len, n_heads, generator=random) - 4)
    B, C = (torch.randn(batch, seq_len, 1, d_state, generator=random) for _ in range(2))
    return x, dt, -dt * torch.linspace(1.0, 16.0, n_heads), B, C, torch.ones(n_heads)


def conv_inputs(sizes: Sequence[int], d_conv: int) -> tuple[Tensor, ...]:
    """Return the arguments of a causal convolution.

    Args:
        sizes: (batch, seq_len, d_inner).
        d_conv: taps.

    Returns:
        x of those sizes, weight (d_inner, d_conv), bias (d_inner,).
    """
    random = torch.Generator().manual_seed(0)
    shapes = (tuple(sizes), (sizes[-1], d_conv), (sizes[-1],))
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


def poles(channels: int, n: int) -> tuple[Tensor, Tensor]:
    """Return a bank of diagonal state spaces, initialised as in S4D-Lin.

    Args:
        channels: state spaces.
        n: states of each, one of each conjugate pair.

    Returns:
        C and dt A (channels, n), complex64.
    """
    random = torch.Generator().manual_seed(0)
    dt = torch.logspace(-3, -1, channels)[:, None]
    C = torch.view_as_complex(torch.randn(channels, n, 2, generator=random))
    return C, dt * torch.complex(torch.full((n,), -0.5), torch.pi * torch.arange(n))


def signal(sizes: Sequence[int]) -> Tensor:
    """Return white noise of some sizes."""
    return torch.randn(tuple(sizes), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class OpRun:
    """An op and its inputs; a call runs it.

    Attributes:
        op: from the inputs to one output.
        inputs: its arguments.
        dy: the gradient of the output; None without the backward pass.
    """

    op: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    dy: Tensor | None

    def __call__(self) -> None:
        """Run forward, and backward if there is a gradient."""
        if self.dy is not None:
            torch.autograd.grad(self.op(*self.inputs), self.inputs, self.dy)
            return
        with torch.no_grad():
            self.op(*self.inputs)


def differentiable(
    op: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    backward: bool,
    shape: Sequence[int] | None = None,
) -> OpRun:
    """Prepare an op, with or without the gradients of all its inputs.

    Args:
        op: from the inputs to one output.
        inputs: its arguments.
        backward: whether to run the backward pass too.
        shape: of the output; that of the first input if None.

    Returns:
        What to measure.
    """
    if not backward:
        return OpRun(op, inputs, None)
    sizes = inputs[0].shape if shape is None else tuple(shape)
    dy = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
    return OpRun(op, tuple(tensor.requires_grad_() for tensor in inputs), dy)


def random_ids(batch: int, seq_len: int, vocab_size: int) -> Tensor:
    """Return random tokens, (batch, seq_len) int64."""
    return torch.randint(vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0))


def excerpt(logits: Any) -> list[float]:
    """Return a few of some logits (vocab_size,), to check that two programs compute the same."""
    return [float(value) for value in logits[:: max(1, len(logits) // N_EXCERPT)]]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean next-token loss in nats from logits (batch, seq_len, vocab_size), all in memory."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def training(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> Run:
    """Prepare a full training step: forward, backward and AdamW.

    Args:
        parameters: to train.
        loss: the forward pass.

    Returns:
        What to measure.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-4, fused=True
    )  # torch's fastest AdamW, for every contender

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def decoding(first: Tensor, n_tokens: int, advance: Callable[[Tensor], Tensor]) -> Run:
    """Prepare greedy decoding from the model's present state.

    Args:
        first: (batch,) the first tokens.
        n_tokens: steps.
        advance: from tokens (batch,) to logits (batch, vocab_size), moving the state on.

    Returns:
        What to measure.
    """

    def run() -> dict[str, Any] | None:
        ids = first
        with torch.no_grad():
            for _ in range(n_tokens):
                ids = advance(ids).argmax(-1)
        return None

    return run
