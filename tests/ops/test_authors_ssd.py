"""The authors' kernels and references of Mamba-2 against `ssd` and `ssd_step`: outputs, states, gradients.

    LONGSCAN_CLONES=DIR make test ARGS=tests/ops/test_authors_ssd.py
    LONGSCAN_CLONES=DIR PYTHONPATH=tests .venv/bin/python tests/ops/test_authors_ssd.py  # prints differences

What DIR holds and what has to be installed is said in `tests/authors_kernels.py`; without it these tests are
skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from authors_kernels import (
    TOLERANCE,
    Far,
    Tensors,
    authors_files,
    check,
    distances,
    draws,
    needs_clone,
    print_largest,
    results,
)
from longscan import ops

pytestmark = needs_clone
# (batch, seq_len, n_heads, d_head, n_groups, d_state), chunk_size, what else is given: the kernels take any
SCANS: dict[str, tuple[tuple[int, ...], int, set[str]]] = {
    "plain": ((2, 45, 2, 12, 1, 10), 24, set()),
    "groups": ((1, 75, 6, 5, 3, 20), 32, {"D", "initial"}),
    "limits": ((2, 64, 2, 16, 2, 16), 32, {"D", "initial", "bias", "limits"}),
    "wide D": ((1, 37, 4, 9, 2, 7), 16, {"wide D", "initial", "bias"}),
    "packed": ((2, 75, 2, 12, 1, 10), 16, {"D", "initial", "packed"}),
}


@pytest.fixture(scope="module")
def authors() -> Iterator[Any]:
    with authors_files() as found:
        yield found


def inputs_of(sizes: tuple[int, ...], extras: set[str], dtype: torch.dtype) -> Tensors:
    batch, seq_len, n_heads, d_head, n_groups, d_state = sizes
    draw = draws(sum(sizes), dtype)
    inputs = {
        "x": draw(batch, seq_len, n_heads, d_head),
        "dt": draw(batch, seq_len, n_heads),
        "A": -draw(n_heads).exp(),
        "B": draw(batch, seq_len, n_groups, d_state),
        "C": draw(batch, seq_len, n_groups, d_state),
    }
    if extras & {"D", "wide D"}:
        inputs["D"] = draw(n_heads, d_head) if "wide D" in extras else draw(n_heads)
    if "initial" in extras:
        inputs["initial_states"] = draw(batch, n_heads, d_head, d_state)
    if "bias" in extras:
        inputs["dt_bias"] = draw(n_heads)
    return inputs


def ours(
    limits: tuple[float, float] = (0.0, math.inf), seq_idx: Tensor | None = None
) -> Callable[[Tensors], Tensors]:
    """Return our scan of the authors' inputs."""

    def scan(i: Tensors) -> Tensors:
        dt = F.softplus(i["dt"] + i.get("dt_bias", 0.0)).clamp(*limits)
        x, B, C, D, initial_state = (i.get(name) for name in ("x", "B", "C", "D", "initial_states"))
        y, state = ops.ssd(x, dt, dt * i["A"], B, C, D, initial_state, seq_idx)  # type: ignore[arg-type]
        return {"y": y, "state": state}

    return scan


def packed(batch: int, seq_len: int) -> Tensor:
    """Return the seq_idx of sequences that start within chunks of 16 and with one; 0 is the first of them."""
    starts = torch.zeros(batch, seq_len, dtype=torch.int32)
    for row, positions in zip(starts, ([7, 16, 48, 70], [33, 34]), strict=True):
        row[positions] = 1
    return starts.cumsum(1, dtype=torch.int32)


def kernel(authors: Any, case: str) -> Far:
    """Compare with the kernels."""
    sizes, chunk_size, extras = SCANS[case]
    limits = (0.2, 1.5) if "limits" in extras else (0.0, math.inf)
    seq_idx = packed(*sizes[:2]) if "packed" in extras else None

    def theirs(i: Tensors) -> Tensors:
        y, state = authors.ssd_combined.mamba_chunk_scan_combined(
            **i,
            chunk_size=chunk_size,
            seq_idx=seq_idx,
            dt_softplus=True,
            dt_limit=limits,
            return_final_states=True,
        )
        return {"y": y, "state": state}

    inputs = inputs_of(sizes, extras, torch.float32)
    return distances(results(ours(limits, seq_idx), inputs), results(theirs, inputs))


def minimal(authors: Any) -> Far:
    """Compare with the listing of the paper, which discretises outside and has no groups."""
    inputs = inputs_of((2, 72, 6, 5, 6, 7), {"initial"}, torch.float64)

    def theirs(i: Tensors) -> Tensors:
        dt, initial = F.softplus(i["dt"]), i["initial_states"][:, None]
        y, state = authors.ssd_minimal.ssd_minimal_discrete(
            i["x"] * dt[..., None], dt * i["A"], i["B"], i["C"], 24, initial
        )
        return {"y": y, "state": state}

    return distances(results(ours(), inputs), results(theirs, inputs))


def chunked(authors: Any) -> Far:
    """Compare with the reference of the kernels, which returns no state."""
    inputs = inputs_of((2, 72, 6, 5, 3, 7), {"D", "bias"}, torch.float64)

    def theirs(i: Tensors) -> Tensors:
        return {"y": authors.ssd_combined.ssd_chunk_scan_combined_ref(**i, chunk_size=24, dt_softplus=True)}

    return distances(results(lambda i: {"y": ours()(i)["y"]}, inputs), results(theirs, inputs))


def steps(authors: Any, dtype: torch.dtype) -> Far:
    """Compare steps with the kernel, in float64 with its reference; the channels of a head share dt, A, D."""
    module = authors.selective_state_update
    update = module.selective_state_update_ref
    if dtype == torch.float32:
        update = module.selective_state_update
    sizes = batch, seq_len, n_heads, d_head, _, d_state = 3, 9, 6, 5, 2, 7
    i = inputs_of(sizes, {"D", "initial", "bias"}, dtype)
    our_state, their_state = i["initial_states"].clone(), i["initial_states"].clone()
    A = i["A"][:, None, None].expand(n_heads, d_head, d_state)
    D, dt_bias = (i[name][:, None].expand(n_heads, d_head) for name in ("D", "dt_bias"))
    our_y, their_y = [], []
    for t in range(seq_len):
        x, dt, B, C = (i[name][:, t] for name in ("x", "dt", "B", "C"))
        step = F.softplus(dt + i["dt_bias"])
        our_y.append(ops.ssd_step(our_state, x, step, step * i["A"], B, C, i["D"]))
        tied = dt[..., None].expand(batch, n_heads, d_head)
        their_y.append(update(their_state, x, tied, A, B, C, D, None, dt_bias, True))
    theirs = {"y": torch.stack(their_y), "state": their_state}
    return distances({"y": torch.stack(our_y), "state": our_state}, theirs)


@pytest.mark.parametrize("case", SCANS)
def test_ssd_agrees_with_the_kernels(authors: Any, case: str) -> None:
    check(kernel(authors, case), torch.float32)


@pytest.mark.parametrize("reference", [minimal, chunked], ids=lambda f: f.__name__)
def test_ssd_agrees_with_the_references(authors: Any, reference: Callable[[Any], Far]) -> None:
    check(reference(authors), torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ssd_step_agrees_with_the_step(authors: Any, dtype: torch.dtype) -> None:
    check(steps(authors, dtype), dtype)


def print_all() -> None:
    """Print the largest differences."""
    with authors_files() as authors:
        for case in SCANS:
            print_largest(f"mamba_chunk_scan_combined, {case}", kernel(authors, case))
        print_largest("ssd_minimal_discrete", minimal(authors))
        print_largest("ssd_chunk_scan_combined_ref", chunked(authors))
        for dtype in TOLERANCE:
            print_largest(f"selective_state_update, {dtype}", steps(authors, dtype))


if __name__ == "__main__":
    print_all()
