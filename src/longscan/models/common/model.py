"""The base of all models: a Config, a parameter count, a fingerprint, parameter groups for the optimizer."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from longscan.core.config import Config
from longscan.models.common.adapted import Adapted
from longscan.models.common.layers import WeightOnly, WeightOnlyLinear


class Model(nn.Module):
    """A network with a Config.

    Args:
        config: available as `model.config`.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        """Return the number of parameters, quantised ones included; a tied head counts once."""
        stored = [module.weight for module in self.modules() if isinstance(module, WeightOnly)]
        second_nibbles = sum(weight.numel() for weight in stored if weight.dtype == torch.uint8)
        return sum(tensor.numel() for tensor in (*self.parameters(), *stored)) + second_nibbles

    def fingerprint(self) -> str:
        """Return a short hash of weights and precision: states and caches are valid for these only."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        for name, module in self.named_modules():
            if isinstance(module, Adapted):
                digest.update(f"{name} {module.s!r}".encode())
            if isinstance(module, WeightOnlyLinear) and module.activation_bits != 16:
                digest.update(f"{name} {module.activation_bits}".encode())
        return digest.hexdigest()[:16]

    def no_decay_parameters(self) -> Iterable[nn.Parameter]:
        """Return the matrices that are exempt from weight decay; none by default."""
        return ()

    def slow(self) -> Iterable[nn.Parameter]:
        """Return the parameters with a learning rate of their own, `ssm_lr`; none by default."""
        return ()

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups: matrices with weight decay; norms, biases and exempt ones without.

        Args:
            weight_decay: of the first group.

        Returns:
            Two groups with "params" and "weight_decay".
        """
        exempt = {id(parameter) for parameter in self.no_decay_parameters()}
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups[parameter.dim() < 2 or id(parameter) in exempt].append(parameter)
        return [
            {"params": groups[0], "weight_decay": weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ]


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Increment the version counters of an optimizer's parameters after a step: fused optimizers do not.

    Models notice by these counters that results derived from their weights are stale.
    """
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_step)
