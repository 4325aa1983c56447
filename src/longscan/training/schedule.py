"""Learning rate as a function of the step: linear warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

from longscan.training.config import RunConfig

__all__ = ["learning_rate", "slow_rate"]


def learning_rate(config: RunConfig, step: int, total: int, d_model: int = 1) -> float:
    """Return the learning rate of one step.

    Cosine and linear rise to `lr` in `warmup` steps and fall to `final_lr`. Noam, of "Attention Is All You
    Need" (Vaswani et al. 2017), section 5.3, is lr d_model^-1/2 min(s^-1/2, s warmup^-3/2), s from 1.

    Args:
        config: the run.
        step: steps done so far, from 0.
        total: steps in the run.
        d_model: width of the model; only noam needs it.

    Returns:
        The rate for the step after `step`.
    """
    if config.schedule == "noam":
        rise = (step + 1) * max(config.warmup, 1) ** -1.5
        return float(config.lr * d_model**-0.5 * min((step + 1) ** -0.5, rise))
    warmup = min(config.warmup, total // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step + 1 - warmup) / (total - warmup)
    left = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.final_lr + (config.lr - config.final_lr) * left


def slow_rate(config: RunConfig, rate: float) -> float:
    """Return the learning rate of A, B and dt: the same schedule with the peak min(ssm_lr, lr).

    S4's appendix and official code use min(0.001, lr) and no weight decay for them (Gu et al. 2021).

    Args:
        config: the run.
        rate: of all other parameters; under noam, where lr is a factor, ssm_lr bounds it.
    """
    if config.schedule == "noam":
        return min(rate, config.ssm_lr)
    return rate * min(1.0, config.ssm_lr / config.lr)
