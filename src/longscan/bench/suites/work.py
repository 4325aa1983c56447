"""What a model computes for each token: matrix products, state updates and attention, for the ceilings."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from longscan.bench.contenders.longscan import fresh
from longscan.models.common.attention import Attention
from longscan.models.mamba import MambaMixer
from longscan.models.mamba2 import Mamba2Mixer

__all__ = ["SSD_CHUNK", "Work", "probe", "ssd_operations", "work_of"]

SSD_CHUNK = 64  # rows of a tile in the kernel of ssd
SIDE = 1024  # of the square matrices that a probe multiplies


class Work(NamedTuple):
    """The work of a language model without experts.

    Attributes:
        matrices: (width in, width out) -> how many weight matrices of these sizes the layers have.
        head: parameters of the head's matrix.
        updates: states of the selective scans, each updated with an exponential for every token.
        ssd: (n_heads, d_head, d_state, n_groups) of each layer with state space duality.
        attention: channels of the queries of each layer with attention.
    """

    matrices: dict[tuple[int, int], int]
    head: int
    updates: int
    ssd: tuple[tuple[int, int, int, int], ...]
    attention: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Parameters in matrix products, the head included; each takes 2 operations per token."""
        return self.head + sum(n * n_in * n_out for (n_in, n_out), n in self.matrices.items())

    @property
    def shapes(self) -> list[list[int]]:
        """(width in, width out, how many) of the layers' matrices, for `ceilings.matmul`."""
        return [[*sizes, n] for sizes, n in self.matrices.items()]

    def mixing(self, seq_len: int) -> int:
        """Return the operations of ssd and causal attention in the products along a prompt.

        Args:
            seq_len: tokens of the prompt.
        """
        scans = sum(ssd_operations((1, seq_len, *sizes[:3]), False, sizes[3]) for sizes in self.ssd)
        return scans + 2 * seq_len**2 * sum(self.attention)


def work_of(model: dict[str, Any]) -> Work:
    """Return the work of a model.

    Args:
        model: see `contenders.longscan.fresh`.
    """
    with torch.device("meta"):
        lm = fresh(model)
    layers = [module for module in lm.modules() if isinstance(module, nn.Linear) and module is not lm.lm_head]
    mixers = list(lm.modules())
    ssd = (mixer.layer for mixer in mixers if isinstance(mixer, Mamba2Mixer))
    attention = (mixer.layer for mixer in mixers if isinstance(mixer, Attention))
    return Work(
        matrices=dict(Counter((linear.in_features, linear.out_features) for linear in layers)),
        head=lm.backbone.embedding.weight.numel(),
        updates=sum(mixer.A_log.numel() for mixer in mixers if isinstance(mixer, MambaMixer)),
        ssd=tuple((layer.n_heads, layer.d_head, layer.d_state, layer.n_groups) for layer in ssd),
        attention=tuple(layer.n_heads * layer.d_head for layer in attention),
    )


def probe(operations: float) -> dict[str, Any]:
    """Return the arguments of `ceilings.matmul` for products that large matrices would take, float32.

    Args:
        operations: floating-point operations of the products.
    """
    return {"n_rows": SIDE, "shapes": [[SIDE, SIDE, operations / (2 * SIDE**3)]], "backward": False}


def ssd_operations(shape: tuple[int, ...], backward: bool, n_groups: int = 1) -> int:
    """Return the floating-point operations of state space duality in tiles.

    Per row and head: to write and to read the state 2 d_state d_head each, and half the weights of a tile
    times x; the scores are shared within a group. The backward pass takes twice those, and the scores once
    more.

    Args:
        shape: (batch, seq_len, n_heads, d_head, d_state).
        backward: whether to count the backward pass too.
        n_groups: of the heads.
    """
    batch, seq_len, n_heads, d_head, d_state = shape
    heads, scores = n_heads * d_head * (4 * d_state + SSD_CHUNK), n_groups * SSD_CHUNK * d_state
    return batch * seq_len * (3 * heads + 4 * scores if backward else heads + scores)
