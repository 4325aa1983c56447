"""Compares the gradients of models in several processes with those of one; each process runs `compare`."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor

from longscan.models import MODELS, LanguageModel
from longscan.training.distributed import Group
from longscan.training.launch import joined
from longscan.training.replicas import replica

ROUNDING = 1e-3  # of a gradient, relative to the largest of its parameter: S4's of dt are differences


EXPERTS = {"pattern": "ME*E", "n_experts": 8, "n_active_experts": 2, "d_expert": 12}
MODELS_AND_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, entry in MODELS.items() if entry.kind == "language"),
    ("hybrid", EXPERTS),  # of which a process may use others than its neighbour
]


def compare() -> None:
    """Print the name of each model whose gradients agree, with DDP and with FSDP2."""
    with joined("train", "cpu", 60) as group:
        for name, settings in MODELS_AND_SETTINGS:
            entry = MODELS[name]
            config = entry.config.from_dict({**entry.presets["tiny"], "vocab_size": 257, **settings})
            model = entry.cls(config, torch.Generator().manual_seed(0))
            assert isinstance(model, LanguageModel)
            for sharded in (False, True):
                _compare_one(copy.deepcopy(model), group, sharded)
            print(f"{name} agrees")


def _compare_one(model: LanguageModel, group: Group, sharded: bool) -> None:
    """Two processes add up gradients of one pass each, in the order of one process, and of two each."""
    ids = torch.randint(0, 257, (2 * group.size, 24), generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(model)
    trained = replica(model, group, sharded)
    # a model whose blocks use the embedding too may add up its gradients in another order when it is sharded
    for rows, limit in ((2, 1e-6 if sharded else 0.0), (1, ROUNDING)):
        for passes, module in ((group.slices(len(ids), rows), trained.module), (_all(ids, rows), expected)):
            module.zero_grad(set_to_none=True)
            for part in passes:
                last = module is expected or part is passes[-1]
                with trained.passing(last) if module is trained.module else contextlib.nullcontext():
                    loss = module(ids[part], labels=ids[part], return_logits=False).loss
                    (loss * (rows / len(ids))).backward()
        for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            if parameter.grad is None or other.grad is None:
                continue
            gradient = trained.collect(parameter.grad)
            if group.first:
                error = (gradient - other.grad).abs().max() / other.grad.abs().max().clamp(min=1e-6)
                assert error <= limit, f"{name}: {error:.1e}, {sharded=}, {rows=}"


def _all(ids: Tensor, rows: int) -> list[slice]:
    return [slice(begin, begin + rows) for begin in range(0, len(ids), rows)]
