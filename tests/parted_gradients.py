"""Compares the gradients of sequences that processes share with those of one; each process runs `compare`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.models import MODELS, LanguageModel
from longscan.training.chunked_loss import has_constant_state
from longscan.training.context_parallel import Neighbours, part_loss
from longscan.training.distributed import Group
from longscan.training.launch import joined

LIMIT = 1e-9  # of a gradient in float64, relative to the largest of its parameter
SIZES = {"d_model": 12, "n_layers": 2, "vocab_size": 11}
MORE: dict[str, dict[str, Any]] = {
    "cnn": {"d_conv": 3},
    "h3": {"d_state": 4, "d_head": 2},
    "linear_attention": {"n_heads": 2},
    "lssl": {"d_state": 5},
    "mamba2": {"d_state": 6, "d_head": 4},
    "mamba3": {"d_state": 6, "d_head": 4},
}
SEQ_LEN = 20
PADDED = [-1] * 3 + [0] * 10 + [1] * 4 + [-1] * 3
# sequences that end inside parts and at their borders, of 2 processes (10) and 3 (6, 13); and padding there
PACKED = [[0] * 6 + [1] * 4 + [2] * 3 + [3] * 7, [5] * 20, PADDED, [0] * 4 + [-1] * 9 + [1] * 7]


def constant() -> list[str]:
    """The language models whose state has a constant size."""
    return [name for name, entry in MODELS.items() if entry.kind == "language" and _is_constant(name)]


def compare(name: str, size: int) -> None:
    """Print the name of a model whose gradients agree, of plain rows and of packed ones."""
    with joined("train", "cpu", 60, size) as group:
        ids = torch.randint(11, (4, SEQ_LEN), generator=torch.Generator().manual_seed(1))
        _compare_one(_build(name), group, ids, None)
        _compare_one(_build(name), group, ids, torch.tensor(PACKED))
        _compare_one(_build(name), group, ids[:, :size], None)  # a token each, less than any convolution
        print(f"{name} agrees")


def count_bytes(seq_len: int) -> None:
    """Print how many bytes a process sends for a Mamba's layer forward and backward."""
    with joined("train", "cpu", 60, 2) as group:
        model, neighbours = _build("mamba"), Neighbours(group)
        ids = torch.randint(11, (3, seq_len), generator=torch.Generator().manual_seed(1))
        loss, _ = part_loss(model, ids, group=group, neighbours=neighbours)
        forward = neighbours.sent
        loss.backward()  # type: ignore[no-untyped-call]
        neighbours.wait()
        state = model.init_state(3).nbytes
        print(f"sent {forward / state:g} and {(neighbours.sent - forward) / state:g} states")


def _is_constant(name: str) -> bool:
    with torch.device("meta"):
        entry = MODELS[name]
        model = entry.cls(entry.config.from_dict({**entry.presets["tiny"], "vocab_size": 11}))
    assert isinstance(model, LanguageModel)
    return has_constant_state(model)


def _build(name: str) -> LanguageModel:
    """A model far from its start, so that every parameter matters."""
    entry, draw = MODELS[name], torch.Generator().manual_seed(1)
    model = entry.cls(entry.config.from_dict({**SIZES, **MORE.get(name, {})}), draw).to(torch.float64)
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return model.train()


def _compare_one(model: LanguageModel, group: Group, ids: Tensor, seq_idx: Tensor | None) -> None:
    parameters = dict(model.named_parameters())
    whole = model(ids, labels=ids, seq_idx=seq_idx, return_logits=False).loss
    expected = torch.autograd.grad(whole, list(parameters.values()), allow_unused=True)
    neighbours = Neighbours(group)
    loss, n = part_loss(model, ids, group=group, neighbours=neighbours, seq_idx=seq_idx)
    share = n / group.total(torch.tensor(n)).item()
    (loss * share).backward()  # type: ignore[no-untyped-call]
    neighbours.wait()
    assert abs(group.total((loss * share).detach()) - whole) <= LIMIT * whole
    mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    flat = group.total(torch.cat([gradient.flatten() for gradient in mine]))
    total = torch.split(flat, [gradient.numel() for gradient in mine])
    for name, own, gradient, other in zip(parameters, mine, total, expected, strict=True):
        gradient = gradient.view_as(own)
        if other is not None:
            error = (gradient - other).abs().max() / other.abs().max().clamp(min=1e-6)
            assert error <= LIMIT, f"{name}: {error:.1e}"
