"""State space duality against its literal recurrence: forward, gradients, states, at odd sizes."""

from __future__ import annotations

import pytest
import torch

from longscan import ops
from op_checks import check
from op_inputs import ssd_inputs

# (batch, seq_len, n_heads, d_head, n_groups, d_state), rank
CASES = {
    "tiny": ((1, 1, 1, 1, 1, 1), 1),
    "odd": ((2, 37, 6, 5, 2, 7), 1),
    "chunk": ((1, 64, 4, 16, 1, 16), 1),
    "beyond": ((1, 65, 4, 32, 4, 33), 1),
    "chunks": ((2, 203, 3, 9, 1, 20), 1),
    "usual": ((1, 150, 4, 64, 1, 128), 1),
    "rank": ((2, 132, 4, 6, 2, 5), 4),
    "odd-rank": ((1, 69, 2, 8, 1, 16), 3),
}


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_recurrence(backend: str, case: str, extras: bool) -> None:
    sizes, rank = CASES[case]
    check(ops.ssd, ops.ssd_ref, ssd_inputs(sizes, rank, extras), torch.float32)


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_recurrence_f64(case: str) -> None:
    sizes, rank = CASES[case]
    check(ops.ssd, ops.ssd_ref, ssd_inputs(sizes, rank, True), torch.float64)
