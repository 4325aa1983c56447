"""An op against its reference in float64: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from op_inputs import tensor

# largest |ours - reference| / max(1, |reference|)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def run(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Any], double: bool
) -> dict[str, Tensor]:
    """Outputs and all gradients under fixed random output gradients."""
    leaves = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            leaves[name] = (value.double() if double else value.clone()).requires_grad_()
    y, state = function(**{**inputs, **leaves})
    g = torch.Generator().manual_seed(1)
    loss = (tensor(g, *y.shape, dtype=torch.float64) * y).sum() + (tensor(g, *state.shape) * state).sum()
    loss = loss + sum(0 * leaf.double().sum() for leaf in leaves.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {
        "y": y.detach(),
        "state": state.detach(),
        **{f"d{name}": d for name, d in zip(leaves, gradients, strict=True)},
    }


def check(op: Any, reference: Any, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = run(op, inputs, double=dtype == torch.float64), run(reference, inputs, double=True)
    for name, expected in theirs.items():
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(
            ours[name].double(),
            expected,
            rtol=0,
            atol=TOLERANCE[dtype] * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
