"""A model with its matrices stored in fewer bits: how it is made, recognised, built around a file.

Stored are in_proj, x_proj, dt_proj, out_proj, the embedding and the head. The convolution, A_log, D, the
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

__all__ = ["DELICATE", "KINDS", "dequantized", "kind_of", "precision", "quantize_model", "store_like"]


ModelT = TypeVar("ModelT", bound=Model)


@torch.no_grad()
def dequantized(model: ModelT) -> ModelT:
    """Return a model with plain float32 weights that computes the same.

    Args:
        model: quantised or not.

    Returns:
        A new model, which can be trained; the same one if nothing in it is quantised.
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

DELICATE = ("x_proj", "dt_proj")  # small, and what they compute is exponentiated: never less than 8 bits


def precision(model: Model) -> str:
    """Say how a model's weights are stored: "float32", "bfloat16", ..., or a format of `quantize_model`.

    Args:
        model: any. "bf16" means stored weights under float32 activations, "bfloat16" a model of that type.
    """
    return kind_of(model) or str(model.dtype).removeprefix("torch.")


def kind_of(model: Model) -> ops.Kind | None:
    """Say in which format a model is stored: the narrowest of its matrices', as a file may mix them.

    Args:
        model: any.

    Returns:
        None if no matrix is stored.
    """
    kinds = {module.kind for module in model.modules() if isinstance(module, WeightOnly)}
    return next((kind for kind in reversed(KINDS) if kind in kinds), None)


@torch.no_grad()
def quantize_model(model: Model, kind: ops.Kind) -> None:
    """Store a model's matrices in fewer bits, in place.

    Args:
        model: with float32, float16 or bfloat16 weights; it becomes one for inference, its other
            parameters float32.
        kind: "bf16", "int8" (a scale per row) or "int4" (a scale per 32 weights; int8 where 32 does not
            divide the width, and for x_proj and dt_proj).

    Raises:
        LongscanError: the model is quantised already, or its weights are not finite.
    """
    if kind not in KINDS:
        raise LongscanError(f"format: expected {', '.join(KINDS)}, got {kind!r}.")
    if kind_of(model):
        raise LongscanError(
            f"the model is quantised already ({precision(model)}): a second rounding would only lose more. "
            "Start from the original weights."
        )
    for name, module in _matrices(model):
        try:
            q, scale = ops.quantize(cast(Tensor, module.weight), _kind_of(name, module, kind))
        except ValueError as error:
            raise LongscanError(f"{name}.{error}") from error
        _replace(model, name, _stored(module, q, scale))
    model.float().eval().requires_grad_(False)


def store_like(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Give a model, mostly one on the meta device, the stored layers that tensors of a file are for.

    Args:
        model: unquantised; a layer stays as it is unless its tensor is stored.
        tensors: by the names of `state_dict`; one that is int8 or uint8, or bfloat16 if all matrices
            are, is stored. Their shapes are not checked here: they decide those of the layers.

    Raises:
        LongscanError: a stored tensor has no scale, or one that no format has.
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
    """Insist that a stored matrix has a format of ops/quant.py.

    Args:
        name: for the error.
        q: the stored matrix.
        scale: its scales.
        shape: (n_out, n_in) of what it stands for.

    Raises:
        LongscanError: it has not.
    """
    n_out, n_in = shape
    blocks = (torch.float16, (n_out, n_in // 32)) if n_in % 32 == 0 else None
    expected: dict[torch.dtype, tuple[tuple[int, int], list[object]]] = {
        torch.bfloat16: ((n_out, n_in), [None]),
        torch.int8: ((n_out, n_in), [(torch.float32, (n_out, 1)), blocks]),
        torch.uint8: ((n_out, n_in // 2), [blocks]),
    }
    stored, scales = expected[q.dtype]
    found = None if scale is None else (scale.dtype, tuple(scale.shape))
    if tuple(q.shape) != stored or (found is None and None not in scales) or found not in scales:
        what = "none" if found is None else f"{str(found[0]).removeprefix('torch.')} {found[1]}"
        raise LongscanError(
            f"{name}: {str(q.dtype).removeprefix('torch.')} {tuple(q.shape)} with scales {what} is no format "
            f"of a weight of {n_out} x {n_in}: the file is damaged or of another version."
        )


def _matrices(model: Model) -> list[tuple[str, nn.Module]]:
    """List the layers whose weights are stored, with their names."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]


def _kind_of(name: str, module: nn.Module, kind: ops.Kind) -> ops.Kind:
    """Choose the format of one layer."""
    delicate = name.rpartition(".")[2] in DELICATE or cast(Tensor, module.weight).shape[1] % 32
    return "int8" if kind == "int4" and delicate else kind


def _stored(module: nn.Module, q: Tensor, scale: Tensor | None) -> WeightOnly:
    """Make the stored twin of a layer; it takes over the bias."""
    if isinstance(module, nn.Embedding):
        return WeightOnlyEmbedding(q, scale)
    bias = cast(nn.Parameter | None, module.bias)
    if bias is not None:
        bias.data = bias.data.float()  # as wide as the activations
    return WeightOnlyLinear(q, scale, bias, adds_bias=not isinstance(module, DtProjection))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
