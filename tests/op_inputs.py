"""Random inputs of every op, at odd sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensor(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def packed(generator: torch.Generator, batch: int, seq_len: int) -> Tensor:
    """Random packed rows: sequences of random lengths, padding in front, between and behind."""
    seq_idx = torch.randint(0, 4, (batch, seq_len), generator=generator).sort(1).values
    return seq_idx.masked_fill(torch.rand(batch, seq_len, generator=generator) < 0.2, -1)


def scan_inputs(
    sizes: tuple[int, int, int, int], groups: int | str, extras: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Inputs of selective_scan; groups: "constant", 0 for (batch, seq_len, d_state), or n_groups."""
    batch, seq_len, d_inner, d_state = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    shape = (batch, seq_len, d_state) if groups == 0 else (batch, seq_len, groups, d_state)
    shape = (d_inner, d_state) if groups == "constant" else shape
    wide = (batch, seq_len, d_inner)
    inputs: dict[str, Any] = {
        "u": tensor(g, *wide, dtype=dtype),
        "dt": tensor(g, *wide, dtype=dtype),
        "A": -tensor(g, d_inner, d_state).abs() - 0.05,
        "B": tensor(g, *shape, dtype=dtype),  # type: ignore[misc]
        "C": tensor(g, *shape, dtype=dtype),  # type: ignore[misc]
        "dt_softplus": True,
    }
    if extras:
        inputs |= {
            "D": tensor(g, d_inner),
            "z": tensor(g, *wide, dtype=dtype),
            "dt_bias": tensor(g, d_inner) - 1,
            "initial_state": tensor(g, batch, d_inner, d_state),
            "seq_idx": packed(g, batch, seq_len),
        }
    return inputs


def path_inputs(sizes: tuple[int, int, int, int, int], shared: bool, extras: bool) -> dict[str, Any]:
    """Inputs of path_scan for (batch, n, n_paths, d_inner, d_state), with random paths."""
    batch, n, n_paths, d_inner, d_state = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    u = (batch, n, d_inner) if shared else (batch, n, n_paths, d_inner)
    matrix = (batch, n, n_paths, d_state)
    return {
        "u": tensor(g, *u),
        "dt": tensor(g, batch, n, n_paths, d_inner),
        "A": -tensor(g, n_paths, d_inner, d_state).abs() - 0.05,
        "B": tensor(g, *matrix),
        "C": tensor(g, *matrix),
        "D": tensor(g, n_paths, d_inner) if extras else None,
        "dt_bias": tensor(g, n_paths, d_inner) - 1 if extras else None,
        "paths": torch.stack([torch.randperm(n, generator=g) for _ in range(n_paths)]),
    }


def conv_inputs(
    sizes: tuple[int, int, int, int], extras: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    batch, seq_len, d_inner, d_conv = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    inputs: dict[str, Any] = {
        "x": tensor(g, batch, seq_len, d_inner, dtype=dtype),
        "weight": tensor(g, d_inner, d_conv),
    }
    if extras:
        inputs |= {
            "bias": tensor(g, d_inner),
            "activation": "silu",
            "initial_state": tensor(g, batch, d_conv - 1, d_inner),
            "seq_idx": packed(g, batch, seq_len),
        }
    return inputs


Inputs = dict[str, Any]


def generator(*sizes: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(sizes))


def real(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def poles(g: torch.Generator, channels: int, n: int) -> Tensor:
    """Logarithms of a step: slow and fast decays, any frequency."""
    return torch.complex(-real(g, channels, n).abs() / 4, 2 * real(g, channels, n))


def cauchy_inputs(j: int, channels: int, n: int, k: int) -> Inputs:
    g = generator(j, channels, n, k)
    v = torch.complex(real(g, j, channels, n), real(g, j, channels, n))
    lam = torch.complex(-real(g, channels, n).abs() - 0.05, 5 * real(g, channels, n).abs())
    return {"v": v, "t": 5 * real(g, k), "lam": lam}


def diagonal_inputs(sizes: tuple[int, int, int, int], extras: bool) -> Inputs:
    batch, seq_len, channels, n = sizes
    g = generator(*sizes)
    inputs: Inputs = {
        "u": real(g, batch, seq_len, channels),
        "z": poles(g, channels, n),
        "C": torch.complex(real(g, channels, n), real(g, channels, n)),
    }
    if extras:
        seq_idx = torch.randint(0, 4, (batch, seq_len), generator=g).sort(1).values
        inputs["seq_idx"] = seq_idx.masked_fill(torch.rand(batch, seq_len, generator=g) < 0.2, -1)
        inputs["state"] = real(g, batch, channels, n, 2)
    return inputs


def narrow(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs in a type; what cauchy wants wide stays so."""
    complex_type = {torch.float64: torch.complex128}.get(dtype, torch.complex64)

    def cast(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name in ("t", "lam"):
            return value
        return value.to(complex_type if value.is_complex() else dtype) if value.dtype.itemsize > 4 else value

    return {k: v if k == "seq_idx" else cast(k, v) for k, v in inputs.items()}


def vandermonde_inputs(m: int, channels: int, n: int, length: int) -> Inputs:
    g = generator(m, channels, n, length)
    shape = (m, channels, n)
    C = torch.complex(real(g, *shape), real(g, *shape))
    return {"C": C, "z": poles(g, channels, n), "length": length}


def long_conv_inputs(batch: int, seq_len: int, channels: int, k_len: int, extras: bool) -> Inputs:
    g = generator(batch, seq_len, channels, k_len)
    inputs: Inputs = {"u": real(g, batch, seq_len, channels), "kernel": real(g, channels, k_len)}
    if extras:
        inputs |= {"D": real(g, channels), "back": real(g, channels, k_len)}
    return inputs


def ssd_inputs(sizes: tuple[int, int, int, int, int, int], rank: int, extras: bool) -> Inputs:
    """Inputs of ssd for (batch, seq_len, n_heads, d_head, n_groups, d_state); decays slow, fast and total."""
    batch, seq_len, n_heads, d_head, n_groups, d_state = sizes
    g = generator(*sizes)
    log_decay = -tensor(g, batch, seq_len, n_heads).exp() / 4
    log_decay = torch.where(torch.rand(log_decay.shape, generator=g) < 0.02, -80.0, log_decay)
    inputs: Inputs = {
        "x": tensor(g, batch, seq_len, n_heads, d_head),
        "dt": tensor(g, batch, seq_len, n_heads),
        "log_decay": log_decay,
        "B": tensor(g, batch, seq_len, n_groups, d_state) / d_state**0.5,
        "C": tensor(g, batch, seq_len, n_groups, d_state),
        "rank": rank,
    }
    if extras:
        inputs |= {
            "D": tensor(g, *((n_heads,) if n_heads % 2 else (n_heads, d_head))),
            "initial_state": tensor(g, batch, n_heads, d_head, d_state),
            "seq_idx": packed(g, batch, seq_len // rank).repeat_interleave(rank, 1),
        }
    return inputs
