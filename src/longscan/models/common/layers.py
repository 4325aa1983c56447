"""The layers that models share: the linear map, RMSNorm, and layers with quantised weights."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from longscan import ops

ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in at least float32, returned in the weight's dtype."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tokens, (..., d_model), of x (..., d_model)."""
        return ops.rms_norm(x, self.weight, self.eps).to(self.weight.dtype)


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), computed in at least float32, returned in the dtype of x."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised vectors of x (..., width)."""
        return ops.rms_norm(x, None, self.eps)


class GatedRMSNorm(nn.Module):
    """norm(y silu(z)) weight, or norm(y) weight silu(z); norm divides each group of channels by its RMS.

    Args:
        d_inner: channels.
        eps: added to the mean square.
        n_groups: of adjacent channels, each with an RMS of its own.
        norm_first: whether the gate comes after the norm.
    """

    def __init__(self, d_inner: int, eps: float, n_groups: int = 1, norm_first: bool = False) -> None:
        super().__init__()
        self.eps, self.n_groups, self.norm_first = eps, n_groups, norm_first
        self.weight = nn.Parameter(torch.ones(d_inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Return (..., d_inner) in the weight's dtype, computed in at least float32; y and z are alike."""
        y, z = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (y, z))
        normed = ops.rms_norm(y, self.weight, self.eps, z, self.n_groups, self.norm_first)
        return normed.to(self.weight.dtype)


class Recurrent(nn.Module):
    """A module with a recurrence, which stays float32 at least.

    Attributes:
        recurrence: names of the parameters that set the time scales: at least float32, no weight decay.
    """

    recurrence: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module; under `.bfloat16()` and `.half()` the recurrence stays float32."""
        wide = [self.get_parameter(name) for name in self.recurrence]

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.itemsize < 4 and any(tensor is p or tensor is p.grad for p in wide):
                return tensor.to(moved.device, torch.float32)
            return moved

        super()._apply(careful, recurse)  # type: ignore[no-untyped-call]
        return self


class Linear(nn.Linear):
    """torch's Linear through `ops.linear`, which picks the fastest multiplication on this processor."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return ops.linear(input, self.weight, self.bias)


class DtProjection(nn.Linear):
    """A Linear whose bias is added by the scan, in float32, inside the softplus."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the projection (..., d_inner) of input (..., rank), without the bias."""
        return ops.linear(input, self.weight)


def linear(d_in: int, d_out: int, bias: bool, generator: torch.Generator | None = None) -> nn.Linear:
    """Return a Linear with the official code's initialisation: torch's for the weight, a bias of zero.

    Args:
        d_in: input width.
        d_out: output width.
        bias: whether it has one.
        generator: randomness; torch's global one if None.
    """
    layer = blank(Linear, d_in, d_out, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def normal_linear(
    d_in: int, d_out: int, generator: torch.Generator | None = None, *, bias: bool = False, depth: int = 1
) -> nn.Linear:
    """Return a Linear with GPT-2's initialisation: normal of 0.02, biases of zero.

    Args:
        d_in: input width.
        d_out: output width.
        generator: randomness; torch's global one if None.
        bias: whether it has one.
        depth: terms like its output that add up in the residual stream; divides the variance.
    """
    layer = blank(Linear, d_in, d_out, bias=bias)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, std=0.02 / math.sqrt(depth), generator=generator)
        if bias:
            nn.init.zeros_(layer.bias)
    return layer


def untouched(module: nn.Module) -> bool:
    """Return whether a layer does no more than its class does, so that its weight may be used directly.

    Args:
        module: a Linear or convolution. If it is adapted (LoRA), parametrised, replaced or hooked, it must be
            called.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) in (Linear, nn.Conv1d) and not hooks and "forward" not in module.__dict__


class Derived:
    """A cache of results derived from a few small tensors, recomputed once their values change.

    The values themselves are compared: a change through `.data`, as when averaged weights are swapped in,
    alters neither address nor version. Copies and pickles of a model start with an empty cache.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[list[Tensor], Any]] = {}

    def get(self, name: str, tensors: Iterable[Tensor], make: Callable[[], T]) -> T:
        """Return a cached result, or compute it.

        Args:
            name: of the result.
            tensors: everything it depends on.
            make: computes it, without gradients.
        """
        tensors = list(tensors)
        known = self._made.get(name)
        if known is None or not all(map(_same, known[0], tensors)):
            with torch.no_grad():
                known = self._made[name] = ([tensor.detach().clone() for tensor in tensors], make())
        made: T = known[1]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "Derived":
        """Return an empty cache."""
        return Derived()

    def __reduce__(self) -> tuple[type["Derived"], tuple[()]]:
        """Pickle as an empty cache."""
        return Derived, ()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class _Unset(TorchFunctionMode):
    """Turns torch.nn.init off; torch's own skip_init uses the meta device, whose import takes a second."""

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
    """Return a torch module with uninitialised parameters; the global generator is not touched.

    Args:
        kind: its class.
        args: of the constructor.
        kwargs: likewise.
    """
    with _Unset():
        return kind(*args, **kwargs)


class WeightOnly(nn.Module):
    """A weight in a storage format of ops/quant.py, held in buffers: used and saved, not trained.

    Attributes:
        weight: the quantised matrix.
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
        """Move, but never cast: the dtype is the format, and the bias has the dtype of the activations."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self


class WeightOnlyLinear(WeightOnly):
    """A Linear with a quantised weight.

    Attributes:
        activation_bits: see `ops.quant_linear`.

    Args:
        weight: see `ops.quantize`.
        scale: likewise.
        bias: (n_out,), or None.
        adds_bias: whether `forward` adds the bias; that of dt_proj is added by the scan.
    """

    activation_bits = 16

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: nn.Parameter | None, adds_bias: bool = True
    ) -> None:
        super().__init__(weight, scale)
        self.bias, self.adds_bias = bias, adds_bias

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out)."""
        bias = self.bias if self.adds_bias else None
        return ops.quant_linear(input, self.weight, self.scale, bias, self.activation_bits)


class WeightOnlyEmbedding(WeightOnly):
    """A quantised embedding, which may also be the tied head."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., d_model) float32 of ids (...)."""
        flat = ids.flatten()
        scale = None if self.scale is None else self.scale[flat]
        return ops.dequantize(self.weight[flat], scale).view(*ids.shape, -1)


def project(hidden: Tensor, embedding: nn.Module) -> Tensor:
    """Return the logits of a tied head.

    Args:
        hidden: (..., d_model).
        embedding: torch's, or a quantised one.

    Returns:
        (..., vocab_size).
    """
    if isinstance(embedding, WeightOnly):
        return ops.quant_linear(hidden, embedding.weight, embedding.scale)
    assert isinstance(embedding.weight, Tensor)
    return ops.linear(hidden, embedding.weight)
