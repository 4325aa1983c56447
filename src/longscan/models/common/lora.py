"""LoRA: low-rank adapters beside frozen matrices (Hu et al. 2021, arXiv 2106.09685).

    y = W x + s B A x        s = alpha / rank        A (rank, n_in), B (n_out, rank), B = 0 at the start

W stays as it is, also quantised; A and B are trained. Merged into W + s B A, an adapter costs nothing when
the model is used. rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) has s = alpha / sqrt(rank).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from longscan.errors import LongscanError
from longscan.models.common.adapted import KINDS, PLAIN, Adapted
from longscan.models.common.layers import WeightOnlyLinear
from longscan.models.common.model import Model

__all__ = ["Adapted", "LoraLayer", "adaptable", "adapted", "attach", "detach", "merge", "shape_of", "sharing"]

ModelT = TypeVar("ModelT", bound=Model)


class LoraLayer(NamedTuple):
    """The adapter of one matrix.

    Attributes:
        rank: of B A.
        scale: s.
    """

    rank: int
    scale: float


def adaptable(model: Model) -> dict[str, nn.Module]:
    """Return the matrices that can have an adapter, by name: all but the embedding and the head.

    Args:
        model: without adapters.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in KINDS and name.rpartition(".")[2] != "lm_head"
    }


def adapted(model: Model) -> Iterator[tuple[str, Adapted]]:
    """Yield the matrices that have an adapter, with their names.

    Args:
        model: any.
    """
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))


def attach(
    model: Model,
    layers: Mapping[str, LoraLayer],
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Freeze a model and give matrices adapters, which change nothing before they are trained.

    Args:
        model: without adapters; its modules are replaced in place.
        layers: name of a matrix -> its adapter; see `adaptable`.
        dropout: see `Adapted`.
        generator: randomness of A; torch's global one if None.

    Raises:
        LongscanError: there is no such matrix.
    """
    known = adaptable(model)
    for name in layers:
        if name not in known:
            raise LongscanError(
                f"{name}: expected one of the model's {len(known)} matrices, got none of them."
            )
    model.requires_grad_(False)
    for name, layer in layers.items():
        module = known[name]
        # the object stays, as a layer of some models is in two places: it gets another class
        module.__class__ = KINDS[type(module)]
        assert isinstance(module, Adapted)
        n_out, n_in = shape_of(module)
        empty = torch.empty(layer.rank, n_in, device=model.device)
        module.lora_A = nn.Parameter(nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator))
        module.lora_B = nn.Parameter(torch.zeros(n_out, layer.rank, device=model.device))
        module.s, module.dropout = layer.scale, dropout


@torch.no_grad()
def merge(model: Model) -> None:
    """Add the adapters to their matrices, W + s B A, and remove them.

    Args:
        model: changed in place.

    Raises:
        LongscanError: a matrix with an adapter is quantised.
    """
    layers = dict(adapted(model))
    for name, module in layers.items():
        if isinstance(module, WeightOnlyLinear):
            raise LongscanError(
                f"{name} is quantised ({module.kind}), and rounding it again would lose more than the "
                "adapter adds. Merge into the original weights, then quantise those."
            )
    for module in layers.values():
        weight = cast(Tensor, module.weight)
        weight += (module.s * module.lora_B.double() @ module.lora_A.double()).to(weight.dtype)
    detach(model)


def detach(model: Model) -> None:
    """Remove the adapters; the model is what it was before.

    Args:
        model: changed in place.
    """
    for _, module in list(adapted(model)):
        del module.lora_A, module.lora_B, module.s, module.dropout
        module.__class__ = PLAIN[type(module)]  # type: ignore[assignment]


def sharing(model: ModelT) -> ModelT:
    """Return a second model on the same weights, for an adapter of its own: they are in memory once.

    Args:
        model: without adapters; a change of its weights in place is one of both.
    """
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return the (n_out, n_in) of a matrix.

    Args:
        module: of `adaptable`.
    """
    n_out, n_in = cast(Tensor, module.weight).shape
    return n_out, 2 * n_in if cast(Tensor, module.weight).dtype == torch.uint8 else n_in  # two in a byte
