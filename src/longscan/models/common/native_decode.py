"""The bridge from a model to the native decoder: when it applies, and when it is stale.

The decoder uses the weights in place, so it must notice when they are replaced or moved, or change where it
holds a copy. Adapters it knows; it does not apply to models whose modules are replaced or hooked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import chain, starmap
from operator import attrgetter, contains, eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from longscan import ops
from longscan.models.common.adapted import Adapted
from longscan.models.common.layers import (
    GatedRMSNorm,
    PlainRMSNorm,
    RMSNorm,
    WeightOnly,
)

NORMS = (PlainRMSNorm, RMSNorm, GatedRMSNorm)
# constants beside the weights
FACTORS = ("embedding_multiplier", "hidden_multiplier", "inward", "outward", "multipliers")
HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)  # of all modules

_EPS = attrgetter("eps")
_differ = ctypes.CDLL(None).memcmp  # torch.equal takes five times as long
_differ.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Decoder:
    """The native decoder of a model in its present state.

    Args:
        stack: the weights.
        model: the model.
        copied: the parameters that the stack holds in another form, contiguous. They are compared by
            content: a change through `.data` alters neither address nor version.

    Attributes:
        longest: tokens of the longest KV cache after the last run; 0 if there is none.
    """

    longest = 0

    def __init__(self, stack: ops.Stack, model: nn.Module, copied: Sequence[Tensor]) -> None:
        self._stack = stack
        # keeps the memory alive that the stack points to
        self._memory = [tensor.detach() for tensor in model.state_dict().values()]
        self._all = list(model.modules())
        self._types = list(map(type, self._all))
        self._parents = [module._modules for module in self._all if module._modules]
        self._children = list(chain.from_iterable(map(dict.values, self._parents)))
        # an instance with its own forward, step or head no longer does what its class does
        self._methods = [(module.__dict__, "forward") for module in self._all]
        self._methods += [(module.__dict__, "step") for module in self._all if hasattr(module, "step")]
        self._methods.append((model.__dict__, "head"))
        self._norms = [module for module in self._all if isinstance(module, NORMS)]
        self._eps = list(map(_EPS, self._norms))
        self._factors = [(m, name) for m in self._all for name in FACTORS if hasattr(m, name)]
        self._factors += [(m, name) for m in self._all if isinstance(m, Adapted) for name in ("s", "dropout")]
        self._values = list(starmap(getattr, self._factors))
        owners = [owner for module in self._all for owner in (module._parameters, module._buffers)]
        self._owners: list[dict[str, Tensor | None]] = [owner for owner in owners if owner]  # type: ignore[misc]
        self._owned: list[Tensor | None] = [tensor for owner in self._owners for tensor in owner.values()]
        self._tensors = [tensor for tensor in self._owned if tensor is not None]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._snapshots = [tensor.detach().clone() for tensor in copied]
        self._compared = (
            [tensor.data_ptr() for tensor in copied],
            [tensor.data_ptr() for tensor in self._snapshots],
            [tensor.nbytes for tensor in copied],
        )
        self._hooks = [hooks for m in self._all for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += HOOKS

    def fresh(self) -> bool:
        """Return whether the model is unchanged and no hook is set; called for every token."""
        return (
            not any(self._hooks)
            and list(map(type, self._all)) == self._types
            and list(chain.from_iterable(map(dict.values, self._parents))) == self._children
            and not any(starmap(contains, self._methods))
            and list(map(_EPS, self._norms)) == self._eps
            and list(starmap(getattr, self._factors)) == self._values
            and all(map(is_, chain.from_iterable(map(dict.values, self._owners)), self._owned))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._pointers))
            and not any(map(_differ, *self._compared))
        )

    def run(self, ids: Tensor, state: Any) -> Tensor | None:
        """Return the logits after each token, and advance the state.

        Args:
            ids: (batch, steps) int64.
            state: a State of as many rows, updated in place.

        Returns:
            (batch, steps, padded_vocab_size), or None if the decoder does not support these ids or states.
        """
        state.reserve(ids.shape[1])
        known = getattr(state, "native", None)
        if known is None or known[0] is not self._stack or not all(map(is_, known[1], state.layers)):
            addresses = self._stack.states(state.layers)
            if addresses is None:
                return None
            known = state.native = (self._stack, list(state.layers), addresses)
        if ids.dtype != torch.int64 or ids.device.type != "cpu" or not ids.is_contiguous():
            ids = ids.to("cpu", torch.int64).contiguous()
        if state.batch_size != len(ids):
            return None
        if known[2].lengths:
            self.longest = int(known[2].lengths[0].max()) + ids.shape[1]
        return self._stack.run(ids, known[2])

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copy as None: a copied model has other tensors and builds its own decoder."""
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Pickle as None, likewise."""
        return _nothing, ()


def _nothing() -> None:
    return None


def matrix(module: nn.Module) -> ops.Matrix | None:
    """Return the weight of a layer for the decoder, or None if it cannot be used in place."""
    weight, bias = module.weight, getattr(module, "bias", None)
    scale = module.scale if isinstance(module, WeightOnly) else None
    assert isinstance(weight, Tensor)
    if not (bias is None or plain(bias)) or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if scale is None and not isinstance(module, WeightOnly) and not plain(weight):
        return None
    if scale is not None and not scale.is_contiguous():
        return None
    if not isinstance(module, Adapted):
        return ops.Matrix(weight, scale, bias)
    if module.dropout or len(module.lora_A) > ops.MAX_ADAPTER or not plain(module.lora_A, module.lora_B):
        return None
    return ops.Matrix(weight, scale, bias, ops.Adapter(module.lora_A, module.lora_B, module.s))


def plain(*tensors: Tensor | None) -> bool:
    """Return whether tensors are contiguous float32 on the CPU, and no subclass with other storage."""
    return all(
        t is None
        or (
            type(t) in (Tensor, nn.Parameter)
            and t.dtype == torch.float32
            and t.device.type == "cpu"
            and t.is_contiguous()
        )
        for t in tensors
    )
