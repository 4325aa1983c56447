"""Peers: what else runs on a CPU: torch loops, mambapy, transformers, a Transformer, an LSTM.

Runs in the workers; every peer is imported in the function that needs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.bench.contenders import workloads
from longscan.bench.contenders.hugging_face import random_transformers
from longscan.bench.worker import Clock, Run

__all__ = [
    "Transformer",
    "cauchy_torch",
    "conv_torch",
    "diagonal_fft",
    "diagonal_loop",
    "scan_loop",
    "scan_mambapy",
    "ssd_loop",
    "ssd_mambapy",
    "ssd_transformers",
    "train_lstm",
    "train_mambapy",
    "train_transformer",
    "train_transformers",
    "vandermonde_torch",
]

# --- ops ----------------------------------------------------------------------------------------------------


def scan_loop(sizes: list[int], backward: bool, at_once: bool) -> workloads.OpRun:
    """Prepare the scan as a loop over time, exp(dt A) of all steps at once or step by step.

    Time is split with unbind: indexing would make its backward pass quadratic in seq_len.
    """

    def op(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        h = u.new_zeros(u.shape[0], *A.shape)
        ys = []
        steps: Any
        if at_once:
            A_bar = torch.exp(dt[..., None] * A)  # (batch, seq_len, d_inner, d_state)
            B_bar_u = (dt * u)[..., None] * B[:, :, None]
            steps = zip(A_bar.unbind(1), B_bar_u.unbind(1), C.unbind(1), strict=True)
        else:
            per_step = zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
            steps = (
                (torch.exp(dt_t[..., None] * A), (dt_t * u_t)[..., None] * B_t[:, None], C_t)
                for u_t, dt_t, B_t, C_t in per_step
            )
        for A_bar_t, B_bar_u_t, C_t in steps:
            h = A_bar_t * h + B_bar_u_t
            ys.append((h @ C_t[..., None]).squeeze(-1))
        return torch.stack(ys, 1) + D * u

    return workloads.differentiable(op, workloads.scan_inputs(*sizes), backward)


def scan_mambapy(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare the scan around mambapy's pscan, with the discretisation of mambapy."""
    from mambapy.pscan import pscan

    def op(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        A_bar = torch.exp(dt[..., None] * A)  # (batch, seq_len, d_inner, d_state)
        B_bar_u = dt[..., None] * B[:, :, None] * u[..., None]
        h: Tensor = pscan(A_bar, B_bar_u)
        return (h @ C[..., None]).squeeze(-1) + D * u

    return workloads.differentiable(op, workloads.scan_inputs(*sizes), backward)


def ssd_loop(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare state space duality as a loop over time."""

    def op(x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        S = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])  # (batch, n_heads, d_head, d_state)
        ys = []
        decays, inputs = log_decay.exp()[..., None, None].unbind(1), (dt[..., None] * x).unbind(1)
        for decay, value, b, c in zip(decays, inputs, B.unbind(1), C.unbind(1), strict=True):
            S = decay * S + value[..., None] * b[:, :, None]
            ys.append((S @ c[..., None]).squeeze(-1))
        return torch.stack(ys, 1) + D[:, None] * x

    return workloads.differentiable(op, workloads.ssd_inputs(*sizes), backward)


def ssd_mambapy(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare state space duality around mambapy's pscan, which knows no heads: all states in memory."""
    from mambapy.pscan import pscan

    def op(x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        heads = (*x.shape, B.shape[-1])  # (batch, seq_len, n_heads, d_head, d_state)
        inputs = (dt[..., None] * x)[..., None] * B[:, :, :, None]
        decay = log_decay.exp()[..., None, None].expand(heads)
        S: Tensor = pscan(decay.flatten(2, 3), inputs.flatten(2, 3)).view(heads)
        return (S @ C[..., None]).squeeze(-1) + D[:, None] * x

    return workloads.differentiable(op, workloads.ssd_inputs(*sizes), backward)


def ssd_transformers(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare state space duality as transformers computes it without CUDA, in chunks of 256 steps."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    x, dt, log_decay, *rest = workloads.ssd_inputs(*sizes)
    A = (log_decay / dt)[0, 0]

    def op(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        y: Tensor = mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D)
        return y

    return workloads.differentiable(op, (x, dt, A, *rest), backward)


def conv_torch(sizes: list[int], d_conv: int, backward: bool) -> workloads.OpRun:
    """Prepare the causal convolution with torch's conv1d and silu."""

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=d_conv - 1, groups=x.shape[2])
        return F.silu(y[..., : x.shape[1]]).transpose(1, 2)

    return workloads.differentiable(op, workloads.conv_inputs(sizes, d_conv), backward)


def diagonal_loop(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare the recurrence of S4D as a loop over time."""

    def op(u: Tensor, z: Tensor, C: Tensor) -> Tensor:
        A_bar, ys = z.exp(), []
        h = torch.zeros(u.shape[0], *z.shape, dtype=z.dtype)
        for u_t in u.unbind(1):
            h = A_bar * h + u_t[..., None]
            ys.append(2 * (C * h).sum(-1).real)
        return torch.stack(ys, 1)

    C, z = workloads.poles(*sizes[2:])
    return workloads.differentiable(op, (workloads.signal(sizes[:3]), z, C), backward)


def diagonal_fft(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare the same as a convolution: the kernel from its matrix, then Fourier transforms."""

    def op(u: Tensor, z: Tensor, C: Tensor) -> Tensor:
        length = u.shape[1]
        K = _vandermonde(C, z, length)
        product = torch.fft.rfft(u.mT, n=2 * length) * torch.fft.rfft(K, n=2 * length)
        y: Tensor = torch.fft.irfft(product, n=2 * length)[..., :length].mT
        return y

    C, z = workloads.poles(*sizes[2:])
    return workloads.differentiable(op, (workloads.signal(sizes[:3]), z, C), backward)


def vandermonde_torch(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare the kernel of S4D as a product with its whole matrix."""
    _, length, channels, n = sizes
    inputs = workloads.poles(channels, n)
    return workloads.differentiable(
        lambda C, z: _vandermonde(C, z, length), inputs, backward, (channels, length)
    )


def _vandermonde(C: Tensor, z: Tensor, length: int) -> Tensor:
    """Return the kernels (channels, length)."""
    return 2 * torch.einsum("cn,cnl->cl", C, (z[..., None] * torch.arange(length)).exp()).real


def cauchy_torch(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare a sum over poles and their conjugates with the whole matrices in memory, in complex64."""
    _, length, channels, n = sizes
    t = 2j * torch.tan(torch.pi * torch.arange((length + 1) // 2) / length)

    def op(v: Tensor, lam: Tensor) -> Tensor:
        sums = v[..., None] / (t - lam[..., None]) + v.conj()[..., None] / (t - lam.conj()[..., None])
        return sums.sum(1).real

    return workloads.differentiable(op, workloads.poles(channels, n), backward, (channels, len(t)))


# --- training -----------------------------------------------------------------------------------------------


class TiedLM(nn.Module):
    """An embedding, a body from (batch, seq_len, d_model) to the same shape, and a tied head."""

    def __init__(self, vocab_size: int, d_model: int, body: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.norm = nn.Embedding(vocab_size, d_model), body, norm
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """From ids (batch, seq_len) to logits (batch, seq_len, vocab_size)."""
        return F.linear(self.norm(self.body(self.embedding(ids))), self.embedding.weight)


class Attention(nn.Module):
    """Causal attention through scaled_dot_product_attention, then a GELU MLP, each behind a LayerNorm."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, seq_len, d_model) to the same shape."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.n_heads, -1)).transpose(1, 3)
        q, k, v = heads.unbind(2)  # (batch, n_heads, seq_len, d_head) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.mlp(self.norms[1](x))
        return torch.add(x, y)


class Transformer(nn.Module):
    """A GPT-like body; sinusoidal positions have no parameters, so its size does not depend on seq_len."""

    def __init__(self, d_model: int, n_layers: int, n_heads: int, d_ff: int, seq_len: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Attention(d_model, n_heads, d_ff) for _ in range(n_layers)))
        rate = torch.exp(-math.log(1e4) * torch.arange(0, d_model, 2) / d_model)
        angle = torch.arange(seq_len)[:, None] * rate  # (seq_len, d_model / 2)
        self.positions = nn.Buffer(torch.cat([angle.sin(), angle.cos()], -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, seq_len, d_model) to the same shape."""
        y: Tensor = self.layers(x + 0.02 * self.positions)
        return y


class LSTM(nn.Module):
    """torch's LSTM and a projection back to the width of the embedding."""

    def __init__(self, d_model: int, d_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_hidden, n_layers, batch_first=True)
        self.out = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, seq_len, d_model) to the same shape."""
        y: Tensor = self.out(self.lstm(x)[0])
        return y


def train_transformer(model: dict[str, Any], n_heads: int, d_ff: int, batch: int, seq_len: int) -> Run:
    """Prepare a training step of a Transformer; model has d_model, n_layers, vocab_size."""
    d_model = model["d_model"]
    body = Transformer(d_model, model["n_layers"], n_heads, d_ff, seq_len)
    lm = TiedLM(model["vocab_size"], d_model, body, nn.LayerNorm(d_model))
    return _train(lm, lm, model, batch, seq_len)


def train_lstm(model: dict[str, Any], d_hidden: int, batch: int, seq_len: int) -> Run:
    """Prepare a training step of an LSTM; model has d_model, n_layers, vocab_size."""
    d_model = model["d_model"]
    body = LSTM(d_model, d_hidden, model["n_layers"])
    lm = TiedLM(model["vocab_size"], d_model, body, nn.LayerNorm(d_model))
    return _train(lm, lm, model, batch, seq_len)


def train_mambapy(model: dict[str, Any], batch: int, seq_len: int) -> Run:
    """Prepare a training step of mambapy's Mamba, under our embedding and head: its own need mamba_ssm."""
    from mambapy.mamba import Mamba, MambaConfig

    d_model = model["d_model"]
    body = Mamba(MambaConfig(d_model=d_model, n_layers=model["n_layers"]))
    lm = TiedLM(model["vocab_size"], d_model, body, nn.RMSNorm(d_model))
    return _train(lm, lm, model, batch, seq_len)


def train_transformers(
    model: dict[str, Any],
    batch: int,
    seq_len: int,
    use_mambapy: bool = False,
    one_layer: bool = False,
    clock: Clock = time.perf_counter,
) -> Run:
    """Prepare a training step of transformers' Mamba, or Llama.

    With one_layer the step is taken with one layer and with none, and the time of all layers is extrapolated.
    """
    n_layers = model["n_layers"]

    def step_of(n: int) -> Run:
        peer = random_transformers(model | {"n_layers": n}, use_mambapy=use_mambapy)
        return _train(peer.train(), lambda ids: peer(ids).logits, model, batch, seq_len)

    if not one_layer:
        return step_of(n_layers)
    none, one = step_of(0), step_of(1)

    def extrapolated() -> dict[str, Any]:
        marks = [clock()]
        for step in (none, one):
            step()
            marks.append(clock())
        without = marks[1] - marks[0]
        return {"seconds": without + n_layers * (marks[2] - marks[1] - without), "extrapolated": True}

    none()  # it is short: warm it up, or its first run would count too much
    return extrapolated


def _train(
    module: nn.Module, logits: Callable[[Tensor], Tensor], model: dict[str, Any], batch: int, seq_len: int
) -> Run:
    """Prepare a training step of a module on random tokens."""
    ids = workloads.random_ids(batch, seq_len, model["vocab_size"])
    return workloads.training(module.parameters(), lambda: workloads.next_token_loss(logits(ids), ids))
