"""The bridge from a model to the native decoder: whether a step may take it, and that it never goes stale.

The decoder reads the weights where they are, so it must notice when they are replaced, moved or changed where
it holds a copy, and leave models alone whose modules are adapted or watched by hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .layers import DtProjection, Linear, RMSNorm, WeightOnly, WeightOnlyEmbedding, WeightOnlyLinear

_VERSION = attrgetter("_version")
USUAL = (Linear, DtProjection, RMSNorm, WeightOnlyLinear, WeightOnlyEmbedding, nn.Embedding, nn.Conv1d)


class Decoder:
    """The native decoder of one model as it is now.

    Args:
        stack: the weights.
        model: whose they are.
        copied: the parameters that the stack holds in another form.
    """

    def __init__(self, stack: ops.MambaStack, model: nn.Module, copied: list[Tensor]) -> None:
        self._stack = stack
        self._memory = [
            tensor.detach() for tensor in model.state_dict().values()
        ]  # stays while it is pointed at
        modules = list(model.modules())
        owners = [owner for module in modules for owner in (module._parameters, module._buffers)]
        self._owners: list[dict[str, Tensor | None]] = [owner for owner in owners if owner]  # type: ignore[misc]
        self._owned: list[Tensor | None] = [tensor for owner in self._owners for tensor in owner.values()]
        self._tensors = [tensor for tensor in self._owned if tensor is not None]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._copied = [tensor for tensor in copied if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._copied]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def fresh(self) -> bool:
        """Whether the model still is what it was, and nobody watches its modules; asked at every token."""
        return (
            not any(self._hooks)
            and all(map(is_, chain.from_iterable(map(dict.values, self._owners)), self._owned))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._pointers))
            and all(map(eq, map(_VERSION, self._copied), self._versions))
        )

    def run(self, ids: Tensor, state: Any) -> Tensor | None:
        """Read tokens.

        Args:
            ids: (batch, steps) int64.
            state: a State of as many rows; it advances in place.

        Returns:
            (batch, steps, padded_vocab_size) logits; None if the decoder does not take such ids or states.
        """
        known = getattr(state, "native", None)
        if known is None or known[0] is not self._stack or not all(map(is_, known[1], state.layers)):
            addresses = self._stack.states(state.layers)
            if addresses is None:
                return None
            known = state.native = (self._stack, list(state.layers), addresses)
        if ids.dtype != torch.int64 or ids.device.type != "cpu" or not ids.is_contiguous():
            ids = ids.to("cpu", torch.int64).contiguous()
        if len(known[1][0][0]) != len(ids):
            return None
        return self._stack.run(ids, known[2])

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has other tensors and makes its own decoder."""
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Likewise a pickled one."""
        return _nothing, ()


def _nothing() -> None:
    return None


def usual(model: nn.Module) -> bool:
    """Whether all leaves of a model are of the types the decoder knows: no adapter, no parametrisation.

    Args:
        model: any.
    """
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    return all(type(leaf) in USUAL for leaf in leaves)


def matrix(module: nn.Module) -> ops.Matrix | None:
    """Describe the weight of a layer, if the decoder can use it where it is."""
    weight, bias = module.weight, getattr(module, "bias", None)
    scale = module.scale if isinstance(module, WeightOnly) else None
    assert isinstance(weight, Tensor)
    if not (bias is None or plain(bias)) or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if scale is None and not isinstance(module, WeightOnly) and not plain(weight):
        return None
    if scale is not None and not scale.is_contiguous():
        return None
    return ops.Matrix(weight, scale, bias)


def plain(*tensors: Tensor | None) -> bool:
    """Whether tensors are float32 and contiguous on the CPU."""
    return all(
        t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous())
        for t in tensors
    )
