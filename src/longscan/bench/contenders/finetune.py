"""Steps of fine-tuning: ours, and transformers with PEFT. Runs in the workers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from longscan import ops
from longscan.bench.contenders import workloads
from longscan.bench.contenders.hugging_face import random_transformers
from longscan.bench.contenders.longscan import fresh
from longscan.bench.worker import Run
from longscan.models.common.lora import LoraLayer, adaptable, attach
from longscan.models.common.quantization import quantize_model

__all__ = ["RANK", "longscan", "peft"]

RANK = 16
# PEFT refuses adapters on out_proj of Mamba, and transformers ignores those on dt_proj
PEFT_TARGETS = ["in_proj", "x_proj"]


def longscan(model: dict[str, Any], seq_len: int, lora: bool, precision: str = "float32") -> Run:
    """Prepare a step of ours: adapters on all projections, or all weights."""
    lm = fresh(model, torch.Generator().manual_seed(0))
    if precision != "float32":
        quantize_model(lm, cast(ops.Kind, precision))
    if lora:
        attach(lm, dict.fromkeys(adaptable(lm), LoraLayer(RANK, 2.0)))
    ids = workloads.random_ids(1, seq_len, model["vocab_size"])

    def loss() -> Tensor:
        value: Tensor = lm(ids, labels=ids, return_logits=False).loss
        return value

    return workloads.training([p for p in lm.parameters() if p.requires_grad], loss)


def peft(model: dict[str, Any], seq_len: int, lora: bool, use_mambapy: bool = False) -> Run:
    """Prepare a step of transformers, with PEFT's adapters or of all weights."""
    peer: Any = random_transformers(model, use_mambapy=use_mambapy)
    if lora:
        from peft import LoraConfig, get_peft_model

        peer = get_peft_model(peer, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PEFT_TARGETS))
    peer.train()
    ids = workloads.random_ids(1, seq_len, model["vocab_size"])

    def loss() -> Tensor:
        return workloads.next_token_loss(peer(ids).logits, ids)

    return workloads.training([p for p in peer.parameters() if p.requires_grad], loss)
