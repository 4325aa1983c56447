"""The layers every model is made of: a Linear through the fast multiplication, stored weights, the norm."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from longscan import ops

ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 at least and returned in the weight's type."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token.

        Args:
            x: (..., d_model).

        Returns:
            (..., d_model).
        """
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class Linear(nn.Linear):
    """torch's Linear, through the multiplication that is fast on this processor."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return ops.linear(input, self.weight, self.bias)


class DtProjection(nn.Linear):
    """A Linear that leaves adding its bias to the scan, where it enters the softplus in float32, once."""

    def forward(self, input: Tensor) -> Tensor:
        """Project without the bias.

        Args:
            input: (..., rank).

        Returns:
            (..., d_inner).
        """
        return ops.linear(input, self.weight)


def linear(d_in: int, d_out: int, bias: bool, generator: torch.Generator | None = None) -> nn.Linear:
    """Make a Linear as the official code starts it: torch's own weights, zero bias.

    Args:
        d_in: input width.
        d_out: output width.
        bias: whether it has one.
        generator: randomness; torch's global one if None.

    Returns:
        The layer.
    """
    layer = blank(Linear, d_in, d_out, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def untouched(module: nn.Module) -> bool:
    """Whether calling a Linear or convolution is what its class says, so that its weight may be used instead.

    Args:
        module: any; one that is adapted, replaced, parametrised or watched by a hook must be called.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) in (Linear, nn.Conv1d) and not hooks and "forward" not in module.__dict__


class Derived:
    """What was computed from a few small tensors, computed again once their numbers are others.

    The numbers themselves are compared: a change through `.data`, as swapping in averaged weights makes it,
    moves neither address nor version. A copied or pickled model leaves it behind.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[list[Tensor], Any]] = {}

    def get(self, name: str, tensors: Iterable[Tensor], make: Callable[[], T]) -> T:
        """Return what was made under a name, or make it.

        Args:
            name: of the result.
            tensors: all that it is made from.
            make: makes it, without gradients.
        """
        tensors = list(tensors)
        known = self._made.get(name)
        if known is None or not all(map(_same, known[0], tensors)):
            with torch.no_grad():
                known = self._made[name] = ([tensor.detach().clone() for tensor in tensors], make())
        made: T = known[1]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "Derived":
        """Begin with nothing."""
        return Derived()

    def __reduce__(self) -> tuple[type["Derived"], tuple[()]]:
        """Likewise."""
        return Derived, ()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class _Unset(TorchFunctionMode):
    """Turns torch.nn.init off; torch's skip_init would, through the meta device, import a second of code."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def blank(kind: type[ModuleT], *args: Any, **kwargs: Any) -> ModuleT:
    """Make a torch module without its random start, which would draw from the global generator.

    Args:
        kind: its class.
        args: as for the class.
        kwargs: as for the class.

    Returns:
        The module, its parameters allocated and not yet set.
    """
    with _Unset():
        return kind(*args, **kwargs)


class WeightOnly(nn.Module):
    """A weight in a stored format of ops/quant.py, as buffers: it is used and saved, not trained.

    Attributes:
        weight: the stored matrix.
        scale: its scales, or None.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @property
    def kind(self) -> ops.Kind:
        """The format."""
        kinds: dict[torch.dtype, ops.Kind] = {torch.bfloat16: "bf16", torch.int8: "int8"}
        return kinds.get(self.weight.dtype, "int4")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never cast: the format is the type, and a bias stays as wide as the activations."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self


class WeightOnlyLinear(WeightOnly):
    """A Linear whose weight is stored in fewer bits; activations and bias stay wide.

    Args:
        weight: see `ops.quantize`.
        scale: likewise.
        bias: (n_out,), or None.
        adds_bias: whether `forward` adds it; dt_proj leaves that to the scan.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: nn.Parameter | None, adds_bias: bool = True
    ) -> None:
        super().__init__(weight, scale)
        self.bias, self.adds_bias = bias, adds_bias

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out)."""
        return ops.quant_linear(input, self.weight, self.scale, self.bias if self.adds_bias else None)


class WeightOnlyEmbedding(WeightOnly):
    """An embedding, and a tied head, stored in fewer bits."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up (...) ids: (..., d_model) float32."""
        flat = ids.flatten()
        scale = None if self.scale is None else self.scale[flat]
        return ops.dequantize(self.weight[flat], scale).view(*ids.shape, -1)


def project(hidden: Tensor, embedding: nn.Module) -> Tensor:
    """Use an embedding as a head.

    Args:
        hidden: (..., d_model).
        embedding: torch's, or a stored one.

    Returns:
        (..., vocab_size).
    """
    if isinstance(embedding, WeightOnly):
        return ops.quant_linear(hidden, embedding.weight, embedding.scale)
    assert isinstance(embedding.weight, Tensor)
    return ops.linear(hidden, embedding.weight)
