"""What an op must not depend on: torch's global defaults, and what lies in other sequences or in padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from longscan.models import MODELS, Model
from op_inputs import (
    cauchy_inputs,
    conv_inputs,
    diagonal_inputs,
    long_conv_inputs,
    narrow,
    scan_inputs,
    ssd_inputs,
    vandermonde_inputs,
)


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def stored(kind: ops.Kind) -> dict[str, Any]:
    g = generator()
    q, scale = ops.quantize(torch.randn(48, 64, generator=g, dtype=torch.float32), kind)
    return {"x": torch.randn(3, 64, generator=g, dtype=torch.float32), "q": q, "scale": scale}


def legs_inputs(method: str) -> dict[str, Any]:
    g, kind = generator(), {"dtype": torch.float32}
    f, state = torch.randn(2, 30, generator=g, **kind), torch.randn(2, 5, generator=g, **kind)
    return {"f": f, "state": state, "method": method, "every": 7}


def attention_inputs() -> dict[str, Any]:
    q, k, v = torch.randn(3, 2, 9, 4, 8, generator=generator(), dtype=torch.float32)
    return {"q": q, "k": k, "v": v, "causal": True}


OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "scan": (ops.selective_scan, lambda: scan_inputs((2, 37, 7, 5), 0, True)),
    "scan-packed-units": (ops.selective_scan, lambda: scan_inputs((1, 33, 64, 16), 2, True)),
    "ssd": (ops.ssd, lambda: ssd_inputs((2, 70, 4, 5, 2, 7), 1, True)),
    "conv": (ops.causal_conv1d, lambda: conv_inputs((2, 19, 7, 4), True)),
    "diagonal": (ops.diagonal_ssm, lambda: narrow(diagonal_inputs((2, 40, 7, 3), True), torch.float32)),
    "vandermonde": (ops.vandermonde, lambda: narrow(vandermonde_inputs(2, 3, 4, 50), torch.float32)),
    "cauchy": (ops.cauchy, lambda: narrow(cauchy_inputs(2, 3, 4, 50), torch.float32)),
    "long-conv": (ops.long_conv, lambda: narrow(long_conv_inputs(2, 9, 3, 9, True), torch.float32)),
    "legs": (ops.legs_scan, lambda: legs_inputs("bilinear")),
    "legs-zoh": (ops.legs_scan, lambda: legs_inputs("zoh")),
    "linear": (ops.linear, lambda: {"x": stored("int8")["x"], "weight": torch.eye(64, dtype=torch.float32)}),
    "attention": (ops.attention, attention_inputs),
    "dropout": (lambda x: ops.dropout(x, 0.0) + ops.dropout(x * 0, 0.3), lambda: {"x": stored("int8")["x"]}),
    **{
        f"quant-{kind}": (ops.quant_linear, lambda kind=kind: stored(kind))
        for kind in ("bf16", "int8", "int4")
    },
}


def everything(op: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = {
        name: x.clone().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor)
        and (x.is_floating_point() or x.is_complex())
        and name not in ("t", "q", "scale")
    }
    outputs = op(**{**inputs, **leaves})
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    parts = [torch.view_as_real(y) if y.is_complex() else y for y in outputs]
    total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in parts)
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    with torch.no_grad():
        again = op(**inputs)
    return [*outputs, *gradients, *(again if isinstance(again, tuple) else (again,))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_the_default_type_does_not_matter(name: str, dtype: torch.dtype) -> None:
    op, make = OPS[name]
    inputs = make()
    expected = everything(op, inputs)
    with default(dtype):
        got = everything(op, inputs)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_nor_does_the_default_device() -> None:
    for name, (op, make) in OPS.items():
        inputs = make()
        expected = op(**inputs)
        with torch.device("meta"):
            got = op(**inputs)
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
            assert torch.equal(a, b), name


def step_inputs() -> dict[str, tuple[Callable[..., Tensor], Tensor, dict[str, Any]]]:
    """Each step op with its state and what one token brings."""
    scan, conv = scan_inputs((2, 1, 20, 7), 0, True), conv_inputs((2, 1, 20, 4), True)
    diagonal = narrow(diagonal_inputs((2, 1, 5, 3), True), torch.float32)
    ssd = ssd_inputs((2, 1, 4, 5, 2, 7), 1, True)
    del ssd["rank"]
    found = {}
    for name, op, state, inputs in (
        ("scan", ops.selective_scan_step, "initial_state", scan),
        ("ssd", ops.ssd_step, "initial_state", ssd),
        ("conv", ops.causal_conv1d_step, "initial_state", conv),
        ("diagonal", ops.diagonal_ssm_step, "state", diagonal),
    ):
        now = {
            k: v[:, 0] if isinstance(v, Tensor) and v.shape[:2] == (2, 1) else v for k, v in inputs.items()
        }
        found[name] = op, now.pop(state), {k: v for k, v in now.items() if k != "seq_idx"}
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["scan", "ssd", "conv", "diagonal"])
def test_steps_ignore_the_default_type(name: str, dtype: torch.dtype) -> None:
    op, state, inputs = step_inputs()[name]
    after = state.clone()
    with torch.no_grad():
        expected = op(state, **inputs)
        with default(dtype):
            got = op(after, **inputs)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert torch.equal(after, state)


def built(name: str) -> Model:
    entry = MODELS[name]
    with default(torch.float32):
        return entry.cls(entry.config.from_dict(entry.presets["tiny"]), generator())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.kind == "language"])
def test_models_ignore_the_default_type(name: str, dtype: torch.dtype) -> None:
    """Loss, gradients, packed rows, prefill and steps."""

    def run() -> list[Tensor]:
        model: Any = built(name)
        ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator())
        packed = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, -1]).expand(2, -1)
        loss = model(ids, labels=ids).loss + model(ids, labels=ids, seq_idx=packed, return_logits=False).loss
        loss.backward()
        results = [loss.detach(), *(p.grad for p in model.parameters())]
        model.eval()
        logits, state = model.prefill(ids)
        results.append(logits)
        for _ in range(3):
            logits, state = model.step(logits.argmax(-1).clamp(max=model.config.vocab_size - 1), state)
            results.append(logits)
        return results

    expected = run()
    with default(dtype):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_built_in_any_default_type(name: str) -> None:
    entry = MODELS[name]
    config = entry.config.from_dict(entry.presets["tiny"])
    with default(torch.bfloat16):
        model = entry.cls(config, generator())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_orthogonal_matrices_are_rounded_last() -> None:
    entry = MODELS["bahdanau"]
    with default(torch.bfloat16):
        model: Any = entry.cls(entry.config.from_dict(entry.presets["tiny"]), generator())
    matrix = model.decoder.candidate.weight.float()
    assert (matrix @ matrix.mT - torch.eye(len(matrix))).abs().max() < 0.02


# packed rows


SPOILT = (float("nan"), float("inf"))


def spoil(inputs: dict[str, Any], where: Tensor, value: float) -> dict[str, Any]:
    """Replace what varies with time, at some tokens (batch, seq_len)."""

    def changed(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or name == "seq_idx" or x.shape[:2] != where.shape:
            return x
        return x.masked_fill(where.view(*where.shape, *[1] * (x.dim() - 2)), value)

    return {name: changed(name, x) for name, x in inputs.items()}


def leaks() -> dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]]:
    wide = {"dtype": torch.float64}

    def double(inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            k: v.to(**wide) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }

    return {
        "scan": (ops.selective_scan, lambda: scan_inputs((2, 70, 6, 5), 0, True)),
        "scan-groups": (ops.selective_scan, lambda: double(scan_inputs((2, 70, 6, 5), 2, True))),
        "scan-constant": (ops.selective_scan, lambda: scan_inputs((2, 70, 6, 5), "constant", True)),
        "scan-beyond-native": (ops.selective_scan, lambda: scan_inputs((2, 40, 3, 257), 0, True)),
        "conv": (ops.causal_conv1d, lambda: conv_inputs((2, 70, 6, 4), True)),
        "conv-beyond-native": (ops.causal_conv1d, lambda: conv_inputs((2, 70, 6, 9), True)),
        "conv-double": (ops.causal_conv1d, lambda: double(conv_inputs((2, 70, 6, 4), True))),
        "diagonal": (ops.diagonal_ssm, lambda: narrow(diagonal_inputs((2, 70, 6, 5), True), torch.float32)),
        "diagonal-double": (ops.diagonal_ssm, lambda: diagonal_inputs((2, 70, 6, 5), True)),
    }


LEAKS = leaks()
ROW = [-1] * 3 + [0] * 20 + [-1] * 2 + [1] * 9 + [2] * 36  # its middle sequence lies in one chunk with others


@pytest.mark.parametrize("value", SPOILT, ids=str)
@pytest.mark.parametrize("name", LEAKS)
def test_nothing_leaks_from_another_sequence(backend: str, name: str, value: float) -> None:
    """With the first or last sequence and all padding spoilt, the others get the same numbers."""
    op, make = LEAKS[name]
    inputs = make()
    length = inputs["seq_idx"].shape[1]
    seq_idx = torch.tensor(ROW)[:length].expand(2, -1)
    inputs["seq_idx"] = seq_idx
    along = [k for k, x in inputs.items() if isinstance(x, Tensor) and x.shape[:2] == seq_idx.shape][:-1]
    for bad in (0, 1, 2):
        results = []
        for values in (inputs, spoil(inputs, (seq_idx == bad) | (seq_idx < 0), value)):
            leaves = {k: values[k].clone().requires_grad_() for k in along}
            y, _ = op(**{**values, **leaves})
            total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()))
            good = (seq_idx >= 0) & (seq_idx != bad)
            results.append([x[good] for x in (y, *gradients)])
            assert all(not x[seq_idx < 0].any() for x in (y, *gradients))
        for clean, spoilt in zip(*results, strict=True):
            torch.testing.assert_close(spoilt, clean, rtol=1e-4, atol=1e-4)


# what comes later


CAUSAL: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    **{name: case for name, case in LEAKS.items() if name != "scan-constant"},
    "long-conv": (ops.long_conv, lambda: long_conv_inputs(2, 70, 6, 70, True)),
}


@pytest.mark.parametrize("value", SPOILT, ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_leaks_back_in_time(backend: str, name: str, value: float) -> None:
    """A token that is not finite leaves those before it, and the other row, as they were."""
    op, make = CAUSAL[name]
    inputs = {k: x for k, x in make().items() if k not in ("seq_idx", "back")}
    where = torch.zeros_like(next(x for x in inputs.values() if x.dim() == 3)[..., 0], dtype=torch.bool)
    where[0, 37] = True
    clean, spoilt = (op(**values) for values in (inputs, spoil(inputs, where, value)))
    clean, spoilt = (y[0] if isinstance(y, tuple) else y for y in (clean, spoilt))
    torch.testing.assert_close(spoilt[0, :37], clean[0, :37], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spoilt[1], clean[1], rtol=1e-4, atol=1e-4)
    assert not spoilt[0, 37].isfinite().any()


def test_two_ways_know_no_earlier() -> None:
    """With a filter for later steps NaN is in all of its channel and row, and nowhere else."""
    inputs = long_conv_inputs(2, 70, 6, 70, True)
    inputs["u"][0, 37, 2] = float("nan")
    bad = ops.long_conv(**inputs).isnan()
    assert bad[0, :, 2].all()
    assert int(bad.sum()) == 70


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.kind == "language"])
def test_no_model_lets_a_spoilt_token_back_or_across(name: str) -> None:
    """A token whose embedding is NaN, in a plain row and in a packed one."""
    model: Any = built(name).eval()
    ids = torch.randint(1, model.config.vocab_size, (2, 80), generator=generator())
    packed = torch.tensor([0] * 30 + [1] * 44 + [-1] * 6).expand(2, -1)
    for seq_idx, place, good in (
        (None, 50, slice(0, 50)),
        (packed, 50, slice(0, 50)),
        (packed, 10, slice(30, 74)),
        (packed, 77, slice(0, 74)),
    ):
        spoilt = ids.clone()
        spoilt[0, place] = 0
        with torch.no_grad():
            clean = model(spoilt, seq_idx=seq_idx)
            kept = model.backbone.embedding.weight[0].clone()
            model.backbone.embedding.weight[0] = float("nan")
            got = model(spoilt, seq_idx=seq_idx)
            model.backbone.embedding.weight[0] = kept
        clean, got = (x if isinstance(x, Tensor) else x.logits for x in (clean, got))
        for a, b in ((got[0, good], clean[0, good]), (got[1], clean[1])):  # tied, logit 0 itself is NaN
            torch.testing.assert_close(a[..., 1:], b[..., 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", SPOILT, ids=str)
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("learning", [False, True], ids=["plain", "learning"])
def test_attention_keeps_what_a_query_may_not_see(learning: bool, part: str, value: float) -> None:
    g = generator()
    inputs = {
        name: torch.randn(2, 24, heads, 8, generator=g) for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    spoilt = {name: x.clone().requires_grad_(learning) for name, x in inputs.items()}
    with torch.no_grad():
        spoilt[part][0, 9] = value
    segment = torch.arange(24) // 8
    same = (segment[:, None] == segment)[None, None]
    for mask, reached in ((None, slice(9, 24)), (same, slice(9, 16))):
        clean = ops.attention(**inputs, mask=mask, causal=True)
        got = ops.attention(**spoilt, mask=mask, causal=True).detach()
        touched = torch.zeros(2, 24, dtype=torch.bool)
        touched[0, slice(9, 10) if part == "q" else reached] = True
        assert not got[touched].isfinite().any()
        torch.testing.assert_close(got[~touched], clean[~touched])
