"""Derivatives that no kernel computes: second ones, forward mode, torch.func; right in every op and model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from longscan import ops
from longscan.models import MODELS, LanguageModel

# largest |ours - reference| / max(1, |reference|)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}

Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def real(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def imaginary(g: torch.Generator, *shape: int) -> Tensor:
    return torch.complex(real(g, *shape), real(g, *shape))


def decays(g: torch.Generator, *shape: int) -> Tensor:
    return torch.complex(-real(g, *shape).abs() / 4 - 0.05, 2 * real(g, *shape))


def seq_idx(g: torch.Generator, batch: int, seq_len: int) -> Tensor:
    """Packed rows with padding in front, between and behind."""
    rows = torch.randint(0, 3, (batch, seq_len), generator=g).sort(1).values
    return rows.masked_fill(torch.rand(batch, seq_len, generator=g) < 0.2, -1)


def bound(function: Callable[..., Any], *rest: Any, **fixed: Any) -> Callable[..., Any]:
    """Make a function of its differentiable arguments alone; `rest` follows them."""
    return lambda *values: function(*values, *rest, **fixed)


def cases() -> Iterator[tuple[str, Case]]:
    """Every op, with what it may get."""
    g = torch.Generator().manual_seed(0)
    u, A, B = real(g, 2, 7, 4), -real(g, 4, 3).abs() - 0.1, real(g, 2, 7, 3)
    scan = u, real(g, 2, 7, 4), A, B, real(g, 2, 7, 3)
    both = ops.selective_scan, ops.selective_scan_ref
    yield "scan", (*both, scan)
    full = *scan, real(g, 4), real(g, 2, 7, 4), real(g, 4), real(g, 2, 4, 3)
    rows = seq_idx(g, 2, 7)

    def all_of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *x: function(*x[:8], dt_softplus=True, initial_state=x[8], seq_idx=rows)

    yield "scan-full", (*map(all_of, both), full)
    long = real(g, 1, 40, 2), real(g, 1, 40, 2), A[:2], real(g, 2, 3), real(g, 1, 40, 1, 3)
    yield "scan-chunks", (*(bound(f, dt_softplus=True) for f in both), long)
    conv = real(g, 2, 7, 4), real(g, 4, 3), real(g, 4)
    both = ops.causal_conv1d, ops.causal_conv1d_ref
    yield "conv", (*both, conv[:2])
    yield (
        "conv-full",
        (
            *(lambda *x, f=f: f(*x[:3], "silu", x[3], rows) for f in both),
            (*conv, real(g, 2, 2, 4)),
        ),
    )
    diagonal = real(g, 2, 7, 4), decays(g, 4, 3), imaginary(g, 4, 3), real(g, 2, 4, 3, 2)
    both = ops.diagonal_ssm, ops.diagonal_ssm_ref
    yield "diagonal", (*both, diagonal[:3])
    yield "diagonal-full", (*(bound(f, rows) for f in both), diagonal)
    both = ops.vandermonde, ops.vandermonde_ref
    yield "vandermonde", (*(bound(f, 11) for f in both), (imaginary(g, 2, 4, 3), decays(g, 4, 3)))
    both, t = (ops.cauchy, ops.cauchy_ref), real(g, 6)
    poles = imaginary(g, 2, 4, 3), decays(g, 4, 3)
    yield "cauchy", (*(lambda v, lam, f=f: f(v, t.detach(), lam) for f in both), poles)
    filters = real(g, 2, 7, 4), real(g, 4, 9), real(g, 4), real(g, 4, 3)
    both = ops.long_conv, ops.long_conv_ref
    yield "long-conv", (*both, filters[:2])
    yield "long-conv-full", (*both, filters)
    both = ops.linear, ops.linear_ref
    yield "linear", (*both, (real(g, 2, 3, 5), real(g, 4, 5), real(g, 4)))
    yield "linear-rows", (*both, (real(g, 20, 5), real(g, 4, 5), real(g, 4)))
    for method in ("bilinear", "zoh"):
        both = ops.legs_scan, ops.legs_scan_ref
        legs = real(g, 2, 12), real(g, 2, 4)
        yield f"legs-{method}", (*(bound(f, 3, method, 5) for f in both), legs)
    heads = real(g, 2, 6, 4, 8), real(g, 2, 6, 2, 8), real(g, 2, 6, 2, 8)
    both = ops.attention, lambda *x, **y: ops.attention_ref(*x, **y)[0]
    yield "attention", (*(bound(f, causal=True) for f in both), heads)
    mask = torch.rand(2, 1, 6, 6, generator=g) < 0.6
    yield "attention-mask", (*(bound(f, mask=mask) for f in both), heads)
    pattern = ops.scan_pattern((3, 2))
    both = ops.cross_scan, ops.cross_scan_ref
    yield "cross-scan", (*(bound(f, pattern) for f in both), (real(g, 2, 3, 2, 4),))
    both = ops.cross_merge, ops.cross_merge_ref
    yield "cross-merge", (*(bound(f, pattern) for f in both), (real(g, 2, 6, 4, 4),))
    both = ops.path_scan, ops.path_scan_ref
    varying = (
        real(g, 2, 6, 3),
        real(g, 2, 6, 4, 3),
        -real(g, 4, 3, 2).abs(),
        *(real(g, 2, 6, 4, 2) for _ in "BC"),
    )
    constant = real(g, 4, 3), real(g, 4, 3)
    yield "path-scan", (*(bound(f, paths=pattern.order) for f in both), (*varying, *constant))


# torch's own, of what its forward mode and its vmap do inside
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented"),
]

CASES = dict(cases())
WEIGHTS = real(torch.Generator().manual_seed(1), 1000)
each = pytest.mark.parametrize("name", CASES)


def cast(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return x
    return x.to(torch.complex64 if x.is_complex() else dtype)


def scalar(function: Callable[..., Any], *values: Tensor) -> Tensor:
    """A loss that weighs every output, and is curved."""
    outputs = function(*values)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        y = torch.view_as_real(y) if y.is_complex() else y
        weights = WEIGHTS[: y.numel()].view(y.shape)
        total = total + (y.double() * weights).sum() + y.double().square().sum()
    return total


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    for got, expected in zip(ours, theirs, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        error = float((got.to(expected.dtype) - expected).abs().max()) / scale
        assert error <= tolerance, f"{error:.2g}"


def penalty(function: Callable[..., Any], values: tuple[Tensor, ...], order: int = 2) -> list[Tensor]:
    """Gradients of the squared norm of gradients, and so on."""
    leaves = [x.clone().requires_grad_() for x in values]
    total = scalar(function, *leaves)
    for _ in range(order - 1):
        found = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        total = sum(
            (d.abs().square().sum().double() for d in found), start=torch.zeros((), dtype=torch.float64)
        )
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def inputs(name: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs, rounded to a type, and the same numbers wide."""
    wide_pole = {"cauchy": 1}.get(name)
    values = [x if i == wide_pole else cast(x, name, dtype) for i, x in enumerate(CASES[name][2])]
    wide = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in values]
    return tuple(values), tuple(wide)


@each
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradient_penalty(name: str, dtype: torch.dtype) -> None:
    op, reference, _ = CASES[name]
    values, wide = inputs(name, dtype)
    close(penalty(op, values), penalty(reference, wide), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["scan-full", "diagonal", "conv-full", "legs-bilinear"])
def test_third_derivatives(name: str) -> None:
    op, reference, values = CASES[name]
    values = tuple(x / 4 if x.is_floating_point() else x for x in values)
    close(penalty(op, values, 3), penalty(reference, values, 3), 1e-7)


@each
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_mode(name: str, dtype: torch.dtype) -> None:
    op, reference, _ = CASES[name]
    values, wide = inputs(name, dtype)
    close(
        [jvp(lambda *x: scalar(op, *x), values, values)[1]],
        [jvp(lambda *x: scalar(reference, *x), wide, wide)[1]],
        TOLERANCE[dtype],
    )
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x) for x in values]
        tangent = forward_ad.unpack_dual(scalar(op, *duals)).tangent
    assert tangent is not None
    close([tangent], [jvp(lambda *x: scalar(reference, *x), wide, wide)[1]], TOLERANCE[dtype])


@each
def test_func_grad_and_vmap(name: str) -> None:
    op, reference, values = CASES[name]
    places = tuple(range(len(values)))
    expected = torch.func.grad(lambda *x: scalar(reference, *x), places)(*values)
    close(grad(lambda *x: scalar(op, *x), places)(*values), expected, 1e-9)
    stacked = tuple(torch.stack([x, x / 2]) for x in values)
    each_grad = vmap(grad(lambda *x: scalar(op, *x), places))(*stacked)
    close([d[0] for d in each_grad], expected, 1e-9)


# models

MODEL_NAMES = [name for name, entry in MODELS.items() if entry.kind == "language"]
of_models = pytest.mark.parametrize("name", MODEL_NAMES)


def small(name: str) -> tuple[LanguageModel, Tensor]:
    """A model in float64, and ids."""
    entry = MODELS[name]
    g = torch.Generator().manual_seed(0)
    model = entry.cls(entry.config.from_dict(entry.presets["tiny"]), g)
    assert isinstance(model, LanguageModel)
    return model.double(), torch.randint(0, model.config.vocab_size, (2, 7), generator=g)


PACKED = torch.tensor([0, 0, 0, 1, 1, 1, -1]).expand(2, -1)


@of_models
@pytest.mark.parametrize(
    "extra", [{}, {"return_logits": False}, {"seq_idx": PACKED}], ids=["logits", "pieces", "packed"]
)
def test_second_derivatives_of_models(name: str, extra: dict[str, Any]) -> None:
    """A product with the Hessian, against differences of gradients."""
    model, ids = small(name)
    parameters = list(model.parameters())
    g = torch.Generator().manual_seed(1)
    directions = [real(g, *p.shape) * p.detach().abs().mean() for p in parameters]

    def gradients(**how: Any) -> list[Tensor]:
        loss = model(ids, labels=ids, **extra).loss
        return list(torch.autograd.grad(loss, parameters, materialize_grads=True, **how))

    along = sum((d * v).sum() for d, v in zip(gradients(create_graph=True), directions, strict=True))
    got = torch.autograd.grad(along, parameters, materialize_grads=True)  # type: ignore[arg-type]
    sides, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p.add_(sign * step * v)
        sides.append(gradients())
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p.sub_(sign * step * v)
    differences = [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
    scale = max(float(d.norm()) for d in differences)
    for d, expected in zip(got, differences, strict=True):
        assert float((d - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-5 * scale


@of_models
@pytest.mark.parametrize("pieces", [False, True], ids=["logits", "pieces"])
@pytest.mark.parametrize("learning", [True, False], ids=["train", "no_grad"])
def test_torch_func_of_models(name: str, pieces: bool, learning: bool) -> None:
    """Forward mode and torch.func.grad, against the backward pass."""
    model, ids = small(name)
    weights = {key: p.detach() for key, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(  # type: ignore[no-any-return]
            model, weights, (ids,), {"labels": ids, "return_logits": not pieces}
        ).loss

    found = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), materialize_grads=True)
    expected = dict(zip(weights, found, strict=True))
    for key, d in grad(loss)(weights).items():
        torch.testing.assert_close(d, expected[key], rtol=1e-8, atol=1e-10)
    g = torch.Generator().manual_seed(1)
    directions = {key: real(g, *p.shape) for key, p in weights.items()}
    with torch.set_grad_enabled(learning):
        tangent = jvp(loss, (weights,), (directions,))[1]
    along = sum((expected[key] * directions[key]).sum() for key in weights)
    torch.testing.assert_close(tangent, along, rtol=1e-8, atol=1e-10)
