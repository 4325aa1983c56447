"""longscan as a contender. Runs in the workers."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from longscan import ops
from longscan.bench import tasks
from longscan.bench.worker import Run, resident_memory
from longscan.models import Mamba, MambaConfig

__all__ = ["conv", "decode", "prefill", "scan", "stream", "train"]


def scan(sizes: list[int], backward: bool) -> Run:
    """Prepare the selective scan; sizes are (batch, seq_len, d_inner, d_state)."""
    return tasks.differentiable(lambda *x: ops.selective_scan(*x)[0], tasks.scan_inputs(*sizes), backward)


def conv(sizes: list[int], d_conv: int, backward: bool) -> Run:
    """Prepare the causal convolution with SiLU; sizes are (batch, seq_len, d_inner)."""

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.causal_conv1d(x, weight, bias, "silu")[0]

    return tasks.differentiable(op, tasks.conv_inputs(sizes, d_conv), backward)


def train(model: dict[str, Any], batch: int, seq_len: int) -> Run:
    """Prepare a training step of the Mamba that MambaConfig's fields describe."""
    mamba = Mamba(MambaConfig(**model))
    ids = tasks.random_ids(batch, seq_len, model["vocab_size"])

    def loss() -> Tensor:
        value = mamba(ids, labels=ids, return_logits=False).loss
        assert isinstance(value, Tensor)
        return value

    return tasks.training(mamba.parameters(), loss)


def prefill(model: dict[str, Any], seq_len: int) -> Run:
    """Prepare the reading of a prompt."""
    mamba = Mamba(MambaConfig(**model)).eval()
    ids = tasks.random_ids(1, seq_len, model["vocab_size"])

    def run() -> None:
        mamba.prefill(ids)

    return run


def decode(model: dict[str, Any], prompt: int, n_tokens: int) -> Run:
    """Prepare greedy decoding after a prompt."""
    mamba = Mamba(MambaConfig(**model)).eval()
    logits, state = mamba.prefill(tasks.random_ids(1, prompt, model["vocab_size"]))
    return tasks.decoding(logits.argmax(-1), n_tokens, lambda ids: mamba.step(ids, state)[0])


def stream(model: dict[str, Any], n_tokens: int) -> Run:
    """Prepare the evaluation of one document of n_tokens bytes, with time and memory after every chunk."""
    # imported here: it brings libraries that the memory of the other jobs should not show
    from longscan.evaluate import Evaluation, evaluate
    from longscan.tokenizer import ByteTokenizer

    mamba = Mamba(MambaConfig(**model)).eval()
    letters = torch.randint(97, 123, (n_tokens,), generator=torch.Generator().manual_seed(0))
    document = bytes(letters.tolist()).decode()

    def run() -> dict[str, Any]:
        marks: list[tuple[int, float, int]] = []  # tokens read, seconds, resident bytes

        def mark(so_far: Evaluation) -> None:
            marks.append((so_far.tokens, time.perf_counter(), resident_memory()))

        evaluate(mamba, ByteTokenizer(), [document], progress=mark)
        return {"marks": marks}

    return run
