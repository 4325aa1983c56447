"""Derivatives that no kernel has: beyond the first, in forward mode, and under torch.func's transforms.

An op has one formula for its gradients, itself an op. What lies beyond torch derives from the composite, the
same function made of torch's own operations: second derivatives from the gradients of the composite, all else
by running the composite in the place of the op.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

Composite: TypeAlias = Callable[..., Sequence[Tensor]]


def composed() -> bool:
    """Whether an op must run as its composite: in forward mode and under vmap, grad and jvp of torch.func."""
    if torch.compiler.is_compiling():
        return False
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._are_functorch_transforms_active()


def register_second(
    name: str, lib: Any, composite: Composite, n_inputs: int, places: Sequence[int] | None = None
) -> None:
    """Give the backward op of an op its own gradients, by composition; they are differentiable in turn.

    Args:
        name: of the backward op. It takes the op's inputs, then what only its kernel needs, then the
            gradients of the outputs, None for an output that has none; an absent input's gradient is empty.
        lib: where it is registered.
        composite: the op's inputs -> its outputs that have gradients.
        n_inputs: how many inputs the op has.
        places: of the inputs whose gradients the backward op returns; the first ones if None.
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
                (firsts[place], second)
                for place, second in zip(places or range(n_inputs), seconds, strict=False)
                if second is not None and place in firsts
            ]
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs:
                outputs, weights = zip(*pairs, strict=True)
                chosen = list(leaves.values())
                found = torch.autograd.grad(outputs, chosen, weights, create_graph=further, allow_unused=True)
        of = dict(zip(leaves, found, strict=True))
        return tuple(of.get(place) for place in range(len(inputs)))

    torch.library.register_autograd(name, autograd, setup_context=setup_context, lib=lib)


def gradients(composite: Composite, inputs: Sequence[Any], rest: Sequence[Any]) -> dict[int, Tensor]:
    """Compute gradients of the composite that depend on its inputs and on the gradients of its outputs.

    Args:
        composite: inputs -> outputs.
        inputs: of the composite; tensors and others.
        rest: ends with a gradient, or None, for each output.

    Returns:
        Gradients by the place of the input.
    """
    needed = [isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in inputs]
    inputs, leaves = _separate(inputs, needed)
    outputs = composite(*inputs)
    pairs = [
        (y, dy) for y, dy in zip(outputs, rest[len(rest) - len(outputs) :], strict=True) if dy is not None
    ]
    ys, dys = zip(*pairs, strict=True)
    found = torch.autograd.grad(ys, list(leaves.values()), dys, create_graph=True, allow_unused=True)
    of = zip(leaves, found, strict=True)
    return {place: d for place, d in of if d is not None and d.requires_grad}


def _separate(inputs: Sequence[Any], needed: Sequence[bool]) -> tuple[list[Any], dict[int, Tensor]]:
    """Cut inputs that may depend on each other apart: partial derivatives stop at the new tensors.

    Returns:
        The inputs, and the new ones among them by their place.
    """
    leaves = {}
    for place, (x, wanted) in enumerate(zip(inputs, needed, strict=True)):
        if wanted:
            leaves[place] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    return [leaves.get(place, x) for place, x in enumerate(inputs)], leaves
