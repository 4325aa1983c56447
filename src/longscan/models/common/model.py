"""What all models have in common: a Config, a count, a fingerprint, groups for the optimizer."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from longscan.core.config import Config
from longscan.models.common.layers import WeightOnly


class Model(nn.Module):
    """A network with a Config, of whatever kind.

    Args:
        config: the model's Config, kept as `model.config`.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """The type of most weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        """Count the numbers that were learnt, stored ones too; a tied head is the embedding, counted once."""
        stored = [module.weight for module in self.modules() if isinstance(module, WeightOnly)]
        two_a_byte = sum(weight.numel() for weight in stored if weight.dtype == torch.uint8)
        return sum(tensor.numel() for tensor in (*self.parameters(), *stored)) + two_a_byte

    def fingerprint(self) -> str:
        """Return a short hash of the weights: a state or a cache made with others is of no use to this model.

        Another type of the same weights is another fingerprint.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def undecayed(self) -> Iterable[nn.Parameter]:
        """Return the matrices that do not decay all the same; none, unless a model says otherwise."""
        return ()

    def slow(self) -> Iterable[nn.Parameter]:
        """Return the parameters that learn at a rate of their own, `ssm_lr`; none, unless a model says so."""
        return ()

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Sort the trainable parameters for AdamW: matrices decay; norms, biases and `undecayed` do not.

        Args:
            weight_decay: for those that decay.

        Returns:
            Two groups with "params" and "weight_decay".
        """
        kept = {id(parameter) for parameter in self.undecayed()}
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups[parameter.dim() < 2 or id(parameter) in kept].append(parameter)
        return [
            {"params": groups[0], "weight_decay": weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ]


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count an optimizer's step as a change of its parameters: what is kept of them is made anew after it.

    Models know by torch's version counters that their weights changed, and fused optimizers do not count.
    """
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_step)
