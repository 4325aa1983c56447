"""Weight-only quantisation of a model: quantise, recognise, dequantise, and rebuild from a file.

Quantised are in_proj, x_proj, dt_proj, out_proj, the embedding and the head. The convolution, A_log, D, the
norms, biases, activations and states stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.layers import DtProjection, WeightOnly, WeightOnlyEmbedding, WeightOnlyLinear
from longscan.models.common.model import Model

__all__ = [
    "DELICATE",
    "KINDS",
    "ROUNDED",
    "dequantized",
    "kind_of",
    "precision",
    "quantize_model",
    "set_activation_bits",
    "store_like",
]


ModelT = TypeVar("ModelT", bound=Model)


@torch.no_grad()
def dequantized(model: ModelT) -> ModelT:
    """Return an equivalent model with float32 weights, which can be trained.

    Args:
        model: quantised or not.

    Returns:
        A new model, or the same one if nothing in it is quantised.
    """
    if kind_of(model) is None:
        return model
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, WeightOnly):
            tensors[f"{name}.weight"] = ops.dequantize(module.weight, module.scale)
            tensors.pop(f"{name}.scale", None)
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


KINDS: tuple[ops.Kind, ...] = ("bf16", "int8", "int4")

ROUNDED: dict[str, ops.Kind] = {"w8a8": "int8", "w4a8": "int4"}  # with activations of 8 bits -> the weights

DELICATE = ("x_proj", "dt_proj")  # small, and their outputs are exponentiated: at least 8 bits


def precision(model: Model) -> str:
    """Return the precision of a model's matrices: "float32", "bfloat16", ..., or one of `load`.

    Args:
        model: any. "bf16" means quantised weights with float32 activations, "bfloat16" a model of that dtype;
            "w8a8" and "w4a8" are int8 and int4 after `set_activation_bits`.
    """
    kind = kind_of(model)
    if any(
        isinstance(module, WeightOnlyLinear) and module.activation_bits == 8 for module in model.modules()
    ):
        return next(name for name, weights in ROUNDED.items() if weights == kind)
    return kind or str(model.dtype).removeprefix("torch.")


def kind_of(model: Model) -> ops.Kind | None:
    """Return the format of a model's matrices, the narrowest if they are mixed; None if none is quantised.

    Args:
        model: any.
    """
    kinds = {module.kind for module in model.modules() if isinstance(module, WeightOnly)}
    return next((kind for kind in reversed(KINDS) if kind in kinds), None)


@torch.no_grad()
def quantize_model(model: Model, kind: ops.Kind) -> None:
    """Quantise a model's matrices in place.

    Args:
        model: with float32, float16 or bfloat16 weights. Afterwards it is for inference only, with its other
            parameters in float32.
        kind: "bf16", "int8" (a scale per row) or "int4" (a scale per 32 weights; int8 where 32 does not
            divide the width, and for x_proj and dt_proj).

    Raises:
        LongscanError: the format is unknown, or the model is quantised already or has NaN or infinite
            weights.
    """
    if kind not in KINDS:
        raise LongscanError(f"format: expected {', '.join(KINDS)}, got {kind!r}.")
    if kind_of(model):
        raise LongscanError(
            f"the model is quantised already ({precision(model)}), and rounding twice loses more. "
            "Start from the original weights."
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise LongscanError(f"{name}: expected finite numbers, got NaN or infinity.")
    for name, module in _matrices(model):
        try:
            q, scale = ops.quantize(cast(Tensor, module.weight), _kind_of(name, module, kind))
        except ValueError as error:
            raise LongscanError(f"{name}.{error}") from error
        _replace(model, name, _stored(module, q, scale))
    model.float().eval().requires_grad_(False)


def set_activation_bits(model: Model, bits: int) -> None:
    """Choose the precision of the activations that int8 and int4 weights meet in prefill.

    The native decoder rounds them to 16 bits. Those of x_proj, dt_proj and the head are always rounded to 16.

    Args:
        model: quantised.
        bits: 16, or 8: W8A8 and W4A8.

    Raises:
        LongscanError: bits is something else, or the model's matrices are no integers.
    """
    if bits not in (8, 16):
        raise LongscanError(f"activation bits: expected 8 or 16, got {bits}.")
    if kind_of(model) not in ("int8", "int4"):
        raise LongscanError(
            f"activation bits: expected weights in int8 or int4, got {precision(model)}. Quantise them first."
        )
    for name, module in model.named_modules():
        if isinstance(module, WeightOnlyLinear) and not name.endswith(DELICATE):
            module.activation_bits = bits


def store_like(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Replace layers of a model, usually on the meta device, by those that a file has quantised weights for.

    Args:
        model: unquantised; layers whose weights are not quantised in the file stay.
        tensors: by the names of `state_dict`; bfloat16, int8 and uint8 ones are quantised.

    Raises:
        LongscanError: a weight and its scale are not of a known format.
    """
    for name, module in _matrices(model):
        q, scale = tensors.get(f"{name}.weight"), tensors.get(f"{name}.scale")
        if q is None or q.dtype not in (torch.bfloat16, torch.int8, torch.uint8):
            continue
        n_out, n_in = cast(Tensor, module.weight).shape
        check_stored(name, q, scale, (n_out, n_in))
        blank_scale = None if scale is None else torch.empty_like(scale, device="meta")
        _replace(model, name, _stored(module, torch.empty_like(q, device="meta"), blank_scale))


def check_stored(name: str, q: Tensor, scale: Tensor | None, shape: tuple[int, int]) -> None:
    """Raise LongscanError unless a quantised matrix is of a format of ops/quant.py.

    Args:
        name: for the error.
        q: the quantised matrix.
        scale: its scales.
        shape: (n_out, n_in) of the weight.
    """
    n_out, n_in = shape
    blocks = (torch.float16, (n_out, n_in // 32)) if n_in % 32 == 0 else None
    expected: dict[torch.dtype, tuple[tuple[int, int], list[object]]] = {
        torch.bfloat16: ((n_out, n_in), [None]),
        torch.int8: ((n_out, n_in), [(torch.float32, (n_out, 1)), blocks]),
        torch.uint8: ((n_out, n_in // 2), [blocks]),
    }
    stored, scales = expected[q.dtype]
    got = None if scale is None else (scale.dtype, tuple(scale.shape))
    if tuple(q.shape) != stored or (got is None and None not in scales) or got not in scales:
        what = "none" if got is None else f"{str(got[0]).removeprefix('torch.')} {got[1]}"
        raise LongscanError(
            f"{name}: {str(q.dtype).removeprefix('torch.')} {tuple(q.shape)} with scales {what} is no format "
            f"of a weight of {n_out} x {n_in}: the file is damaged or of another version. Quantise the model "
            "again."
        )


def _matrices(model: Model) -> list[tuple[str, nn.Module]]:
    """Return the names and layers of the matrices to quantise."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]


def _kind_of(name: str, module: nn.Module, kind: ops.Kind) -> ops.Kind:
    """Return the format of one layer."""
    delicate = name.rpartition(".")[2] in DELICATE or cast(Tensor, module.weight).shape[1] % 32
    return "int8" if kind == "int4" and delicate else kind


def _stored(module: nn.Module, q: Tensor, scale: Tensor | None) -> WeightOnly:
    """Return the quantised counterpart of a layer; it takes over the bias."""
    if isinstance(module, nn.Embedding):
        return WeightOnlyEmbedding(q, scale)
    bias = cast(nn.Parameter | None, module.bias)
    if bias is not None:
        bias.data = bias.data.float()  # the dtype of the activations
    return WeightOnlyLinear(q, scale, bias, adds_bias=not isinstance(module, DtProjection))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
