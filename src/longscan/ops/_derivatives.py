"""Derivatives beyond those of the kernels: higher orders, forward mode, and torch.func's transforms.

An op has one formula for its gradients, which is itself an op. Everything else comes from the composite, the
same function made of torch's own operations: second derivatives from the gradients of the composite, all
others by running the composite instead of the op.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

Composite: TypeAlias = Callable[..., Sequence[Tensor]]


def composed() -> bool:
    """Return whether an op must run as its composite: in forward mode and under torch.func's transforms."""
    if torch.compiler.is_compiling():
        return False
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._are_functorch_transforms_active()


def register_second(
    name: str, lib: Any, composite: Composite, n_inputs: int, indices: Sequence[int] | None = None
) -> None:
    """Register gradients of a backward op, by differentiating the composite; they are differentiable in turn.

    Args:
        name: of the backward op. It takes the op's inputs, then what only its kernel needs, then the
            gradients of the outputs, None for an output that has none; an absent input's gradient is empty.
        lib: the library to register it in.
        composite: the op's inputs -> its outputs that have gradients.
        n_inputs: number of inputs of the op.
        indices: of the inputs whose gradients the backward op returns; the first ones if None.
    """

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.given = [isinstance(x, Tensor) for x in inputs]
        ctx.set_materialize_grads(False)

    def autograd(ctx, *seconds):  # type: ignore[no-untyped-def]
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if given else x for given, x in zip(ctx.given, ctx.inputs, strict=True)]
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs, leaves = _separate(inputs, ctx.needs_input_grad)
            firsts = gradients(composite, inputs[:n_inputs], inputs[n_inputs:])
            pairs = [
                (firsts[index], second)
                for index, second in zip(indices or range(n_inputs), seconds, strict=False)
                if second is not None and index in firsts
            ]
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs:
                outputs, weights = zip(*pairs, strict=True)
                chosen = list(leaves.values())
                grads = torch.autograd.grad(outputs, chosen, weights, create_graph=further, allow_unused=True)
        of = dict(zip(leaves, grads, strict=True))
        return tuple(of.get(index) for index in range(len(inputs)))

    torch.library.register_autograd(name, autograd, setup_context=setup_context, lib=lib)


def gradients(composite: Composite, inputs: Sequence[Any], rest: Sequence[Any]) -> dict[int, Tensor]:
    """Return gradients of the composite, as functions of its inputs and of the gradients of its outputs.

    Args:
        composite: inputs -> outputs.
        inputs: of the composite; tensors and others.
        rest: ends with a gradient, or None, for each output.

    Returns:
        index of the input -> gradient.
    """
    needed = [isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in inputs]
    inputs, leaves = _separate(inputs, needed)
    outputs = composite(*inputs)
    pairs = [
        (y, dy) for y, dy in zip(outputs, rest[len(rest) - len(outputs) :], strict=True) if dy is not None
    ]
    ys, dys = zip(*pairs, strict=True)
    grads = torch.autograd.grad(ys, list(leaves.values()), dys, create_graph=True, allow_unused=True)
    of = zip(leaves, grads, strict=True)
    return {index: d for index, d in of if d is not None and d.requires_grad}


def _separate(inputs: Sequence[Any], needed: Sequence[bool]) -> tuple[list[Any], dict[int, Tensor]]:
    """Return inputs that do not depend on each other, so that partial derivatives stop at them.

    Returns:
        The inputs, and the new tensors among them by index.
    """
    leaves = {}
    for index, (x, is_needed) in enumerate(zip(inputs, needed, strict=True)):
        if is_needed:
            leaves[index] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    return [leaves.get(index, x) for index, x in enumerate(inputs)], leaves
