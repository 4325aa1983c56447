"""Every op against its reference on small inputs, forward and backward, for `longscan doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longscan import ops

__all__ = ["TOLERANCE", "relative_error", "run_checks"]


TOLERANCE = 1e-4  # float32 against float64, relative to the largest value; usually below 1e-5


def run_checks() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of every op, its result here in float32, and its reference's in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, seq_len, d_inner, d_state, d_conv = (
        2,
        37,
        19,
        16,
        4,
    )  # odd sizes: partial lanes and tiles are covered
    x, dt, z = (random(batch, seq_len, d_inner) for _ in range(3))
    B, C = (random(batch, seq_len, d_state) for _ in range(2))
    A = -torch.exp(random(d_inner, d_state))
    D, dt_bias = random(d_inner), random(d_inner)
    state = random(batch, d_inner, d_state)
    scan = (x, dt, A, B, C, D, z, dt_bias, True, state)
    conv = (x, random(d_inner, d_conv), random(d_inner), "silu", random(batch, d_conv - 1, d_inner))

    def waves(*shape: int) -> Tensor:
        return torch.complex(random(*shape), random(*shape))

    log_ratio = torch.complex(-random(d_inner, 5).abs(), random(d_inner, 5))
    diagonal = (x, log_ratio, waves(d_inner, 5), random(batch, d_inner, 5, 2))
    paths = torch.stack([torch.arange(seq_len), torch.arange(seq_len - 1, -1, -1)])
    along = (random(batch, seq_len, 2, d_state) for _ in range(2))
    two = (random(batch, seq_len, 2, d_inner), torch.stack([A, A]), *along, torch.stack([D, D]))
    points = torch.linspace(0.0, 5.0, 300, dtype=torch.float64)
    legs = (random(batch, 300), random(batch, 11))
    n_heads, d_head, n_groups = 4, 5, 2
    heads = (random(batch, seq_len, n_heads, d_head), random(batch, seq_len, n_heads))
    decay = -random(batch, seq_len, n_heads).exp()
    matrices = (random(batch, seq_len, n_groups, d_state) for _ in range(2))
    matrix_state = random(batch, n_heads, d_head, d_state)
    ssd = (*heads, decay, *matrices, random(n_heads), matrix_state)
    norm = (random(batch, seq_len, 6), random(6), 1e-5, random(batch, seq_len, 6), 2, True)
    groups = (random(batch, seq_len, 1, n_groups, d_state) for _ in range(2))
    biases = (random(1, n_heads, d_state) for _ in range(2))
    rotary = (*groups, random(batch, seq_len, 5), heads[1], *biases, random(batch, n_heads, 5))

    for name, op, reference, arguments in (
        ("selective_scan", ops.selective_scan, ops.selective_scan_ref, scan),
        (
            "path_scan",
            lambda *tensors: ops.path_scan(*[*tensors, None, paths]),
            lambda *tensors: ops.path_scan_ref(*[*tensors, None, paths]),
            (x, *two),
        ),
        ("ssd", ops.ssd, ops.ssd_ref, ssd),
        ("rms_norm", ops.rms_norm, ops.rms_norm_ref, norm),
        ("rotary", ops.rotary, ops.rotary_ref, rotary),
        ("causal_conv1d", ops.causal_conv1d, ops.causal_conv1d_ref, conv),
        ("diagonal_ssm", ops.diagonal_ssm, ops.diagonal_ssm_ref, diagonal),
        ("vandermonde", ops.vandermonde, ops.vandermonde_ref, (waves(d_inner, 5), log_ratio, 300)),
        (
            "cauchy",
            lambda v, lam: ops.cauchy(v, points, lam.to(torch.complex128)),
            lambda v, lam: ops.cauchy_ref(v, points, lam),
            (waves(4, d_inner, 5), log_ratio),
        ),
        ("legs_scan", ops.legs_scan, ops.legs_scan_ref, legs),
    ):
        got, expected = _with_gradients(op, arguments), _with_gradients(reference, _float64(arguments))
        yield name, got[0], expected[0]
        yield f"{name} backward", got[1], expected[1]

    stepped = state.clone()
    y = ops.selective_scan_step(stepped, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], dt_bias, True)
    first = [t[:, :1].double() for t in (x, dt, B, C, z)]
    one = ops.selective_scan_ref(
        first[0],
        first[1],
        A.double(),
        first[2],
        first[3],
        D.double(),
        first[4],
        dt_bias.double(),
        True,
        state.double(),
    )
    yield (
        "selective_scan_step",
        torch.cat([y.flatten(), stepped.flatten()]),
        torch.cat([t.flatten() for t in one]),
    )

    stepped = matrix_state.clone()
    y = ops.ssd_step(stepped, *[*(t[:, 0] for t in ssd[:5]), ssd[5]])
    one = ops.ssd_ref(*_float64((*(t[:, :1] for t in ssd[:5]), *ssd[5:])))
    yield (
        "ssd_step",
        torch.cat([y.flatten(), stepped.flatten()]),
        torch.cat([t.flatten() for t in one]),
    )

    window = conv[4].clone()
    y = ops.causal_conv1d_step(window, x[:, 0], conv[1], conv[2], "silu")
    one = ops.causal_conv1d_ref(first[0], *_float64(conv[1:]))
    yield (
        "causal_conv1d_step",
        torch.cat([y.flatten(), window.flatten()]),
        torch.cat([t.flatten() for t in one]),
    )


def _with_gradients(op: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return the outputs of an op as one flat tensor, and all its gradients as another."""
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    result = op(*leaves)
    outputs = torch.cat([_flat(output) for output in (result if isinstance(result, tuple) else [result])])
    weights = torch.linspace(-1.0, 1.0, outputs.numel(), dtype=outputs.dtype)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    gradients = torch.autograd.grad((outputs * weights).sum(), tensors)
    return outputs.detach(), torch.cat([_flat(gradient) for gradient in gradients])


def _flat(tensor: Tensor) -> Tensor:
    """Return a tensor flattened, complex numbers as real and imaginary parts."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).flatten()


def _float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with their tensors in float64."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)

    return tuple(wide(a) if isinstance(a, Tensor) else a for a in arguments)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())
