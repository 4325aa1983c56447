"""longscan as a contender. Runs in the workers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from longscan import ops
from longscan.bench.contenders import workloads
from longscan.bench.worker import Run, resident_memory, settle
from longscan.models import MODELS, LanguageModel
from longscan.models.common.growable import GrowableState
from longscan.models.common.quantization import ROUNDED, quantize_model, set_activation_bits
from longscan.ops import _native
from longscan.training.chunked_loss import chunked_loss

__all__ = [
    "cauchy",
    "conv",
    "decode",
    "decode_at",
    "decode_far",
    "diagonal",
    "evaluate_stream",
    "first_output",
    "fresh",
    "generate",
    "prefill",
    "prefill_stream",
    "ready",
    "scan",
    "ssd",
    "ssd_fallback",
    "train",
    "vandermonde",
]

CHUNK = 1024  # tokens of a very long prompt processed at a time


def scan(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare the selective scan; sizes are (batch, seq_len, d_inner, d_state)."""
    return workloads.differentiable(
        lambda *x: ops.selective_scan(*x)[0], workloads.scan_inputs(*sizes), backward
    )


def ssd(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare state space duality; sizes are (batch, seq_len, n_heads, d_head, d_state)."""
    return workloads.differentiable(lambda *x: ops.ssd(*x)[0], workloads.ssd_inputs(*sizes), backward)


def ssd_fallback(sizes: list[int], backward: bool) -> Callable[[], None]:
    """Prepare state space duality as it runs without the native library."""
    run = ssd(sizes, backward)

    def without() -> None:
        with mock.patch.object(_native, "_library", None):
            run()

    return without


def conv(sizes: list[int], d_conv: int, backward: bool) -> workloads.OpRun:
    """Prepare the causal convolution with SiLU; sizes are (batch, seq_len, d_inner)."""

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.causal_conv1d(x, weight, bias, "silu")[0]

    return workloads.differentiable(op, workloads.conv_inputs(sizes, d_conv), backward)


def diagonal(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare the recurrence of S4D; sizes are (batch, seq_len, channels, n)."""
    *shape, n = sizes
    C, z = workloads.poles(shape[-1], n)
    inputs = (workloads.signal(shape), z, C)
    return workloads.differentiable(lambda *x: ops.diagonal_ssm(*x)[0], inputs, backward)


def vandermonde(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare the kernel of S4D; sizes are (1, length, channels, n)."""
    _, length, channels, n = sizes
    inputs = workloads.poles(channels, n)
    return workloads.differentiable(
        lambda C, z: ops.vandermonde(C, z, length), inputs, backward, (channels, length)
    )


def cauchy(sizes: list[int], backward: bool) -> workloads.OpRun:
    """Prepare one of the sums in S4's kernel at half of the roots of unity; sizes are as in `vandermonde`."""
    _, length, channels, n = sizes
    v, lam = workloads.poles(channels, n)
    t = 2 * torch.tan(torch.pi * torch.arange((length + 1) // 2, dtype=torch.float64) / length)

    def op(v: Tensor, lam: Tensor) -> Tensor:
        return ops.cauchy(v[None], t, lam.to(torch.complex128))[0].real

    return workloads.differentiable(op, (v, lam), backward, (channels, len(t)))


def fresh(model: dict[str, Any], generator: torch.Generator | None = None) -> LanguageModel:
    """Return a model with random weights.

    Args:
        model: fields of its Config; "model" names it, by default a Mamba.
        generator: randomness of the initialisation; torch's global one if None.
    """
    fields = dict(model)
    entry = MODELS[fields.pop("model", "mamba")]
    lm = entry.cls(entry.config.from_dict(fields), generator)
    assert isinstance(lm, LanguageModel)
    return lm


def train(model: dict[str, Any], batch: int, seq_len: int, chunk: int = 0) -> Run:
    """Prepare a training step of a model, see `fresh`; in chunks of so many tokens if chunk is not 0."""
    lm = fresh(model)
    ids = workloads.random_ids(batch, seq_len, model["vocab_size"])

    def loss() -> Tensor:
        if 0 < chunk < seq_len:
            return chunked_loss(lm, ids, chunk=chunk)[0]
        value = lm(ids, labels=ids, return_logits=False).loss
        assert isinstance(value, Tensor)
        return value

    return workloads.training(lm.parameters(), loss)


def ready(model: dict[str, Any] | str, precision: str = "float32") -> LanguageModel:
    """Return a model for inference.

    Args:
        model: see `fresh`, for random weights that are the same in every process; or a name for `load`.
        precision: of `load`.
    """
    lm: LanguageModel
    if isinstance(model, str):
        from longscan.checkpoints.load import (
            load,  # it brings libraries that the memory of others should not show
        )

        lm, _ = load(model, offline=True)
    else:
        lm = fresh(model, torch.Generator().manual_seed(0))
    lm.eval().requires_grad_(False)
    if precision != "float32":
        quantize_model(lm, cast(ops.Kind, ROUNDED.get(precision, precision)))
    if precision in ROUNDED:
        set_activation_bits(lm, 8)
    return lm


def prefill(model: dict[str, Any], seq_len: int, precision: str = "float32") -> Run:
    """Prepare the prefill of a prompt."""
    lm = ready(model, precision)
    ids = workloads.random_ids(1, seq_len, model["vocab_size"])

    def run() -> None:
        lm.prefill(ids)

    return run


def decode(
    model: dict[str, Any], prompt: int, n_tokens: int, precision: str = "float32", batch: int = 1
) -> Run:
    """Prepare greedy decoding after a prompt, of `batch` sequences at once."""
    lm = ready(model, precision)
    logits, state = lm.prefill(workloads.random_ids(1, prompt, model["vocab_size"]))
    details: dict[str, Any] = {
        "weight_bytes": sum(tensor.nbytes for tensor in lm.state_dict().values()),
        "state_bytes": state.nbytes,
        "excerpt": workloads.excerpt(logits[0]),
    }
    state = state.fork(batch)
    steps = workloads.decoding(
        logits.argmax(-1).repeat(batch), n_tokens, lambda ids: lm.step(ids, state, True)[0]
    )
    return lambda: (steps() or {}) | details


def generate(model: dict[str, Any] | str, prompt: int, n_tokens: int, precision: str = "float32") -> Run:
    """Prepare greedy decoding through generate_ids, with the share of time outside native calls."""
    from longscan.inference.generate import generate_ids  # lazily, as `load`
    from longscan.inference.sampling import SamplingConfig

    lm = ready(model, precision)
    ids = workloads.random_ids(1, prompt, lm.config.vocab_size)[0].tolist()
    config = SamplingConfig(max_new_tokens=n_tokens + 1, temperature=0.0)

    def run() -> dict[str, Any]:
        events = generate_ids(lm, [ids], config, eos_id=None)
        next(events)  # prefill
        with _native_clock() as native:
            begin = time.perf_counter()
            for _ in events:
                pass
            seconds = time.perf_counter() - begin
        share = {"python_share": 1 - native[0] / seconds} if native[0] else {}
        return {"seconds": seconds, **share}

    return run


def decode_far(model: dict[str, Any] | str, prompt: int, n_tokens: int, precision: str = "float32") -> Run:
    """Prepare greedy decoding after a very long prompt, with the memory of state and process."""
    lm, state = ready(model, precision), None
    random, done = torch.Generator().manual_seed(0), 0
    logits = torch.empty(0)
    while done < prompt:
        n = min(CHUNK, prompt - done)  # lm chunk by chunk, so that nothing here grows with the prompt
        ids = torch.randint(lm.config.vocab_size, (1, n), generator=random)
        logits, state = lm.prefill(ids, state)
        done += n
    assert state is not None
    after = state
    settle()
    details = {"state_bytes": state.nbytes, "resident_bytes": resident_memory()}
    steps = workloads.decoding(logits.argmax(-1), n_tokens, lambda ids: lm.step(ids, after, True)[0])
    return lambda: (steps() or {}) | details


def decode_at(model: dict[str, Any], position: int, n_tokens: int) -> Run:
    """Prepare greedy decoding at a position, from a KV cache of random numbers; all runs start there."""
    lm = ready(model)
    state = lm.init_state(1)
    state.layers = [_filled(layer, position, n_tokens) for layer in state.layers]
    mark = state.mark()
    used = state.used()
    details = {"state_bytes": used.nbytes, "growth": state.growth}
    steps = workloads.decoding(torch.tensor([0]), n_tokens, lambda ids: lm.step(ids, state, True)[0])

    def run() -> dict[str, Any]:
        state.rewind(mark)
        return (steps() or {}) | details

    return run


def _filled(layer: Any, position: int, spare: int) -> Any:
    """Return the state of a layer with random entries up to a position, and capacity for more."""
    if not isinstance(layer, GrowableState):
        return layer
    random = torch.Generator().manual_seed(0)
    caches = {
        name: torch.randn(1, position + spare, *tensor.shape[2:], generator=random)
        for name, tensor in layer.growing.items()
    }
    filled: Any = layer
    return filled._replace(**caches, length=torch.full_like(layer.length, position))


def first_output(argv: list[str]) -> Run:
    """Prepare the start of a Python process, up to its first output."""

    def run() -> dict[str, Any]:
        begin = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            output = process.stdout.read(1)
            seconds = time.perf_counter() - begin
            process.stdout.read()
        if process.returncode or not output:
            raise RuntimeError(f"{' '.join(argv)} ended with code {process.returncode}")
        return {"seconds": seconds}

    return run


@contextmanager
def _native_clock() -> Iterator[list[float]]:
    """Yield the seconds spent in the native decoder so far."""
    library: Any = _native._library
    spent = [0.0]
    if library is None:
        yield spent
        return
    decode = library.ls_decode_tokens

    def timed(arguments: bytes) -> int:
        begin = time.perf_counter()
        code: int = decode(arguments)
        spent[0] += time.perf_counter() - begin
        return code

    library.ls_decode_tokens = timed
    try:
        yield spent
    finally:
        library.ls_decode_tokens = decode


def evaluate_stream(model: dict[str, Any], n_tokens: int) -> Run:
    """Prepare the evaluation of one document of n_tokens bytes, with time and memory after every chunk."""
    from longscan.evaluation.perplexity import Evaluation, evaluate
    from longscan.tokenizers.base import ByteTokenizer

    lm = fresh(model).eval()
    letters = torch.randint(97, 123, (n_tokens,), generator=torch.Generator().manual_seed(0))
    document = bytes(letters.tolist()).decode()

    def run() -> dict[str, Any]:
        marks: list[tuple[int, float, int]] = []  # tokens, seconds, resident bytes

        def mark(so_far: Evaluation) -> None:
            marks.append((so_far.tokens, time.perf_counter(), resident_memory()))

        evaluate(lm, ByteTokenizer(), [document], progress=mark)
        return {"marks": marks}

    return run


def prefill_stream(model: dict[str, Any], n_tokens: int) -> Run:
    """Prepare the prefill of one prompt of n_tokens, with time and memory after every chunk."""
    from longscan.inference.prefill import read

    lm = fresh(model).eval()
    ids = workloads.random_ids(1, n_tokens, model["vocab_size"])[0]

    def run() -> dict[str, Any]:
        marks: list[tuple[int, float, int]] = []  # tokens, seconds, resident bytes

        def mark(done: int, _: int) -> None:
            marks.append((done, time.perf_counter(), resident_memory()))

        read(lm, ids, progress=mark)
        return {"marks": marks}

    return run
