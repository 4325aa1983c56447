"""The authors' kernels, references and module of Mamba-3 against ours: outputs, states, gradients.

    LONGSCAN_CLONES=DIR make test ARGS=tests/models/test_authors_mamba3.py
    LONGSCAN_CLONES=DIR PYTHONPATH=tests .venv/bin/python tests/models/test_authors_mamba3.py  # how far

What DIR holds and what has to be installed is said in `tests/authors_kernels.py`; without it these tests are
skipped. The kernels of SISO need a d_head and a d_state that are powers of two. Those of MIMO need a GPU: the
authors' reference stands in for them, in their module too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from authors_kernels import (
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
from longscan.models.common.trapezoid import Past, Tokens, advance, last, trapezoid
from longscan.models.mamba3 import Mamba3Config, Mamba3Mixer
from longscan.ops.rotary import accumulate, rotate

pytestmark = needs_clone
Sizes = tuple[int, int, int, int, int, int]  # batch, seq_len, n_heads, d_head, n_groups, d_state
ODD: Sizes = (2, 24, 6, 5, 3, 12)
KERNEL: Sizes = (2, 45, 4, 16, 2, 32)
PACKED: Sizes = (1, 75, 2, 32, 1, 16)
STARTS = [0, 7, 32, 70]  # of the packed sequences
# the authors' names of the inputs, in the order in which they take them
SISO = ("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles", "D", "Z")
MIMO_STEP = (*SISO[:9], "MIMO_V", "MIMO_Out", "D", "Z", "MIMO_Z")
STATES = ("Angle_State", "SSM_State", "K_State", "V_State")


@pytest.fixture(scope="module")
def authors() -> Iterator[Any]:
    with authors_files() as found:
        yield found


def inputs_of(sizes: Sizes, rank: int | None, n_angles: int, states: bool, dtype: torch.dtype) -> Tensors:
    """Return inputs by the authors' names and in their layouts; those of SISO have no axis of the rank."""
    batch, seq_len, n_heads, d_head, n_groups, d_state = sizes
    draw, ranks = draws(sum(sizes), dtype), () if rank is None else (rank,)
    inputs = {
        "Q": draw(batch, seq_len, *ranks, n_groups, d_state),
        "K": draw(batch, seq_len, *ranks, n_groups, d_state),
        "V": draw(batch, seq_len, n_heads, d_head),
        "ADT": -0.3 * draw(batch, n_heads, seq_len).abs(),
        "DT": draw(batch, n_heads, seq_len).abs(),
        "Trap": draw(batch, n_heads, seq_len),
        "Q_bias": draw(n_heads, *ranks, d_state),
        "K_bias": draw(n_heads, *ranks, d_state),
        "Angles": draw(batch, seq_len, n_heads, n_angles),
        "D": draw(n_heads),
        "Z": draw(batch, seq_len, n_heads, d_head),
    }
    if rank is not None:
        inputs |= {name: draw(n_heads, rank, d_head) for name in ("MIMO_V", "MIMO_Z", "MIMO_Out")}
    if states:
        shapes = (n_angles,), (d_head, d_state), (*ranks, d_state), (*ranks, d_head)
        inputs |= {name: draw(batch, n_heads, *shape) for name, shape in zip(STATES, shapes, strict=True)}
    return inputs


def circle(angle: Tensor) -> Tensor:
    """Return points of the circle: codes differ in the whole turns of their angles."""
    return torch.stack([angle.cos(), angle.sin()], -1)


# --- ours ---------------------------------------------------------------------------------------------------


def packed(seq_len: int) -> Past:
    starts = torch.zeros(1, seq_len, dtype=torch.int32)
    starts[0, STARTS[1:]] = 1
    return Past.of(starts.cumsum(1, dtype=torch.int32))


def tokens_of(i: Tensors, halves: bool, past: Past | None) -> tuple[Tokens, Tensor]:
    """Return what `trapezoid` takes, and the angles."""
    mimo, n_heads = "MIMO_V" in i, i["V"].shape[2]
    dt, trap, log_decay = (i[name].mT for name in ("DT", "Trap", "ADT"))
    turn = math.pi * i["Angles"].tanh() * dt[..., None]
    seq_idx = None if past is None else past.seq_idx
    angle, _ = accumulate(turn, i.get("Angle_State", torch.zeros_like(turn[:, 0])), seq_idx)
    pair = []
    for name in ("Q", "K"):
        x, bias = i[name], i[f"{name}_bias"]
        x, bias = (x, bias.transpose(0, 1)) if mimo else (x[:, :, None], bias[None])
        pair.append(x.repeat_interleave(n_heads // x.shape[3], 3) + bias)
    q, k = rotate(tuple(pair), angle, halves)
    v, late = i["V"][:, :, None], trap.sigmoid() * dt
    v = v * i["MIMO_V"].transpose(0, 1) if mimo else v
    return Tokens(q, k, v, log_decay, dt - late, late), angle


def ours(i: Tensors, halves: bool = False, past: Past | None = None, single_steps: bool = False) -> Tensors:
    """Return the output and the states after `trapezoid`, or after steps by `advance`, in their layouts."""
    tokens, angle = tokens_of(i, halves, past)
    mimo = "MIMO_V" in i
    k, v = torch.zeros_like(tokens.k[:, 0]), torch.zeros_like(tokens.v[:, 0])
    state = v.new_zeros(*i["V"][:, 0].shape, k.shape[-1])
    if "SSM_State" in i:
        state = i["SSM_State"]
        k, v = (i[x].transpose(1, 2) if mimo else i[x][:, None] for x in ("K_State", "V_State"))
    if single_steps:
        ys, state = [], state.clone()
        for t in range(angle.shape[1]):
            now = Tokens(*(x[:, t] for x in tokens))
            ys.append(advance(state, now, k, v, i["D"]))
            k, v = now.k, now.v
        y = torch.stack(ys, 1)
    else:
        y, state = trapezoid(tokens, k, v, i["D"], state, past)
        k, v = last(tokens.k, k, past), last(tokens.v, v, past)
    z = i["Z"][:, :, None]
    if mimo:
        y, z = y * i["MIMO_Out"].transpose(0, 1), z * i["MIMO_Z"].transpose(0, 1)
    k, v = (x.transpose(1, 2) if mimo else x[:, 0] for x in (k, v))
    theta = circle(last(angle, angle[:, 0], past)).to(y.dtype)
    return {"y": (y * F.silu(z)).sum(2), "angle": theta, "ssm": state, "k": k, "v": v}


# --- theirs -------------------------------------------------------------------------------------------------


def initial(i: Tensors) -> tuple[Tensor, ...] | None:
    return tuple(i[name] for name in STATES) if "SSM_State" in i else None


def named(y: Tensor, states: tuple[Tensor, ...]) -> Tensors:
    """Return their outputs by our names; of packed sequences, the states of the last one."""
    angle, ssm, k, v = (state[-len(y) :] for state in states)
    return {"y": y, "angle": circle(angle), "ssm": ssm, "k": k, "v": v}


def siso(function: Callable[..., Any], i: Tensors, is_packed: bool = False, **options: Any) -> Tensors:
    """Run a function of SISO over sequences."""
    states = initial(i)
    if is_packed:
        options["cu_seqlens"] = torch.tensor([*STARTS, i["Q"].shape[1]], dtype=torch.int32)
        if states is not None:  # ours are those of the first sequence
            zeros = (state.new_zeros(len(STARTS) - 1, *state.shape[1:]) for state in states)
            states = tuple(torch.cat(pair) for pair in zip(states, zeros, strict=True))
    found = function(*(i[name] for name in SISO), states, **options)
    return named(found[0], found[1] if len(found) == 2 else found[1:])


def siso_step_kernel(authors: Any, i: Tensors) -> Tensors:
    """Run the kernel of single steps."""
    ys, states = [], initial(i)
    for t in range(i["Q"].shape[1]):
        now = {k: i[k][:, t] for k in ("Q", "K", "V", "Angles", "Z")}
        now |= {k: i[k][:, :, t] for k in ("ADT", "DT", "Trap")}
        now |= {k: i[k] for k in ("Q_bias", "K_bias", "D")}
        y, states = authors.siso.mamba3_siso_step(**now, Input_States=states)
        ys.append(y)
    assert states is not None
    return named(torch.stack(ys, 1), states)


def mimo_chunks(authors: Any, i: dict[str, Any], chunk_size: int, divisor: int, **options: Any) -> Tensors:
    """Run the reference of MIMO in chunks, which has no initial state and does not return v."""
    log_decay = i["ADT"].unflatten(2, (-1, chunk_size))
    total, angles = log_decay.cumsum(-1), authors.mimo.apply_angle_dt_reference(i["Angles"], i["DT"].mT)
    y, ssm, k = authors.mimo.mamba3_MIMO_chunk_ref(
        *(i[k] for k in ("Q", "K", "V", "Q_bias", "K_bias", "MIMO_V", "MIMO_Out", "Z", "MIMO_Z")),
        angles,
        total.flatten(2),
        (total[..., -1:] - total).flatten(2),
        *(i[k] for k in ("DT", "Trap", "D")),
        chunk_size,
        divisor,
        True,
        torch.float64,
        **options,
    )
    return {"y": y, "angle": circle(angles[:, -1]), "ssm": ssm.mT, "k": k.transpose(1, 2)}


# --- how far they are from each other -----------------------------------------------------------------------


def siso_reference(authors: Any, is_packed: bool, states: bool) -> Far:
    sizes = PACKED if is_packed else ODD
    inputs, past = inputs_of(sizes, None, 3, states, torch.float64), packed(sizes[1]) if is_packed else None
    theirs = results(lambda i: siso(authors.siso.mamba3_siso_fwd_ref, i, is_packed), inputs)
    return distances(results(lambda i: ours(i, past=past), inputs), theirs)


def siso_kernel(authors: Any, is_packed: bool, states: bool) -> Far:
    sizes = PACKED if is_packed else KERNEL
    inputs, past = inputs_of(sizes, None, 4, states, torch.float32), packed(sizes[1]) if is_packed else None
    function, options = authors.siso.mamba3_siso_combined, {"chunk_size": 16, "return_final_states": True}
    theirs = results(lambda i: siso(function, i, is_packed, **options), inputs)
    return distances(results(lambda i: ours(i, past=past), inputs), theirs)


def siso_step(authors: Any) -> Far:
    """Compare the kernel of single steps with ours; neither has gradients."""
    inputs = inputs_of((2, 9, *KERNEL[2:]), None, 4, True, torch.float32)
    return distances(ours(inputs, single_steps=True), siso_step_kernel(authors, inputs))


def step_reference(authors: Any, rank: int | None) -> Far:
    """Compare the reference that goes step by step with `trapezoid`, and with single steps by `advance`."""
    inputs = inputs_of(ODD, rank, 3, True, torch.float64)

    def run(i: Tensors) -> Tensors:
        if rank is None:
            return siso(authors.siso.mamba3_siso_step_ref, i)
        return named(*authors.mimo.mamba3_MIMO_step_ref(*(i[k] for k in MIMO_STEP), initial(i)))

    theirs, stepped = results(run, inputs), ours(inputs, single_steps=True)
    single = distances(stepped, {name: theirs[name] for name in stepped})
    return distances(results(ours, inputs), theirs) | {f"step's {name}": far for name, far in single.items()}


def mimo_reference(authors: Any, divisor: int) -> Far:
    """Compare the rotation in halves; divisor is d_state / n_angles."""
    inputs = inputs_of(ODD, 3, ODD[-1] // divisor, False, torch.float64)
    theirs = results(lambda i: mimo_chunks(authors, i, 8, divisor), inputs)
    mine = results(lambda i: {k: x for k, x in ours(i, halves=True).items() if k != "v"}, inputs)
    return distances(mine, theirs)


def module(authors: Any, rank: int | None, norm: bool, fused: bool, rope_fraction: float) -> Far:
    """Compare the authors' module with the mixer, with gradients of the input and of all weights."""
    chunk_size, seq_len = (16, 21) if rank is None else (8, 24)
    sizes: dict[str, Any] = {"d_model": 16, "d_state": 16, "d_head": 16, "n_groups": 2, "expand": 4}
    sizes |= {"mimo_rank": rank, "outproj_norm": norm, "rope_fraction": rope_fraction}
    config = Mamba3Config(n_layers=1, vocab_size=8, **sizes)
    mixer, draw = Mamba3Mixer(config, torch.Generator().manual_seed(2)), draws(3, torch.float32)
    inputs = {name: x.detach() + 0.3 * draw(*x.shape) for name, x in mixer.named_parameters()}
    inputs["u"] = draw(2, seq_len, config.d_model)

    def mimo(**i: Any) -> Tensor:
        options = {name: i[name] for name in ("outproj_norm_weight", "outproj_norm_eps")}
        options |= {"fused_norm": i["fuse_pregate_headwise_rms_norm"]}
        options |= {"contract_mimo_out": i["MIMO_Out"] is not None}
        return mimo_chunks(authors, i, i["chunk_size"], i["rotary_dim_divisor"], **options)["y"].to(
            i["dtype"]
        )

    authors.mamba3.mamba3_mimo_combined = mimo
    net = authors.mamba3.Mamba3(
        config.d_model,
        **{"d_state": 16, "headdim": 16, "ngroups": 2, "expand": 4, "chunk_size": chunk_size},
        **{"is_mimo": rank is not None, "mimo_rank": config.rank, "rope_fraction": rope_fraction},
        **{"is_outproj_norm": norm, "fuse_pregate_headwise_norm": fused},
    )

    def run(of: nn.Module, i: Tensors) -> Tensors:
        y = torch.func.functional_call(of, {k: x for k, x in i.items() if k != "u"}, i["u"], strict=True)
        return {"y": y[0] if isinstance(y, tuple) else y}

    theirs = results(lambda i: run(net, i), inputs)
    return distances(results(lambda i: run(mixer, i), inputs), theirs)


PACKINGS = {"plain": (False, False), "initial": (False, True), "packed": (True, False), "both": (True, True)}
RANKS = {"siso": None, "mimo": 3}
MODULES: dict[str, tuple[int | None, bool, bool, float]] = {
    "siso": (None, False, False, 0.5),
    "siso, norm": (None, True, False, 1.0),
    "mimo": (2, False, False, 0.5),
    "mimo, norm": (2, True, False, 0.5),
    "mimo, fused norm": (2, True, True, 1.0),
}


@pytest.mark.parametrize("case", PACKINGS)
def test_the_trapezoid_agrees_with_the_reference(authors: Any, case: str) -> None:
    check(siso_reference(authors, *PACKINGS[case]), torch.float64)


@pytest.mark.parametrize("case", PACKINGS)
def test_the_trapezoid_agrees_with_the_kernels(authors: Any, case: str) -> None:
    check(siso_kernel(authors, *PACKINGS[case]), torch.float32)


@pytest.mark.parametrize("case", RANKS)
def test_steps_agree_with_the_reference(authors: Any, case: str) -> None:
    check(step_reference(authors, RANKS[case]), torch.float64)


def test_steps_agree_with_the_kernel(authors: Any) -> None:
    check(siso_step(authors), torch.float32)


@pytest.mark.parametrize("divisor", [2, 4])
def test_halves_rotate_as_in_the_reference(authors: Any, divisor: int) -> None:
    check(mimo_reference(authors, divisor), torch.float64)


@pytest.mark.parametrize("case", MODULES)
def test_the_mixer_agrees_with_the_module(authors: Any, case: str) -> None:
    check(module(authors, *MODULES[case]), torch.float32)


def print_all() -> None:
    """Print the largest differences."""
    with authors_files() as authors:
        for case, arguments in PACKINGS.items():
            print_largest(f"mamba3_siso_fwd_ref, {case}", siso_reference(authors, *arguments))
        for case, arguments in PACKINGS.items():
            print_largest(f"mamba3_siso_combined, {case}", siso_kernel(authors, *arguments))
        for case, rank in RANKS.items():
            print_largest(f"mamba3_{case}_step_ref", step_reference(authors, rank))
        print_largest("mamba3_siso_step", siso_step(authors))
        for divisor in (2, 4):
            print_largest(f"mamba3_MIMO_chunk_ref, 1/{divisor}", mimo_reference(authors, divisor))
        for case, settings in MODULES.items():
            print_largest(f"Mamba3, {case}", module(authors, *settings))


if __name__ == "__main__":
    print_all()
