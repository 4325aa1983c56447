"""The contenders of `longscan bench`: every job at toy size, and peers that compute the same."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import longscan
from longscan.bench.contenders import ceilings, hugging_face, llama, peers, workloads
from longscan.bench.contenders import longscan as ours
from longscan.bench.suites import generate, train
from longscan.bench.suites.work import ssd_operations, work_of
from longscan.models import Mamba, MambaConfig


def clock(*ticks: float) -> Callable[[], float]:
    """A clock that shows these times, and then goes on in steps of the last one."""
    return itertools.chain(ticks, itertools.count(2 * ticks[-1], ticks[-1])).__next__


def prepare(job: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    module, name = job.split(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def output(job: str, arguments: dict[str, Any]) -> Tensor:
    """What the op of a contender computes, after a run with its gradients."""
    run: workloads.OpRun = prepare(f"longscan.bench.contenders.{job}", arguments | {"backward": True})
    run()
    return run.op(*run.inputs).detach()


@pytest.mark.parametrize("at_once", [False, True])
def test_loops_compute_the_scan(at_once: bool) -> None:
    sizes: dict[str, Any] = {"sizes": [2, 19, 5, 3]}
    ours = output("longscan:scan", sizes)
    torch.testing.assert_close(output("peers:scan_loop", sizes | {"at_once": at_once}), ours)


@pytest.mark.parametrize(
    ("theirs", "package"),
    [("ssd_loop", "torch"), ("ssd_mambapy", "mambapy"), ("ssd_transformers", "transformers")],
)
def test_peers_compute_ssd(theirs: str, package: str) -> None:
    pytest.importorskip(package)
    sizes: dict[str, Any] = {"sizes": [2, 19, 3, 4, 5]}
    ours = output("longscan:ssd", sizes)
    torch.testing.assert_close(output(f"peers:{theirs}", sizes), ours, rtol=1e-4, atol=1e-5)


def test_mambapy_computes_the_scan() -> None:
    pytest.importorskip("mambapy")
    sizes: dict[str, Any] = {"sizes": [2, 16, 5, 3]}
    ours = output("longscan:scan", sizes)
    torch.testing.assert_close(output("peers:scan_mambapy", sizes), ours, rtol=1e-4, atol=1e-4)


def test_torch_computes_the_convolution() -> None:
    sizes: dict[str, Any] = {"sizes": [2, 19, 5], "d_conv": 4}
    ours = output("longscan:conv", sizes)
    torch.testing.assert_close(output("peers:conv_torch", sizes), ours)


def test_training_learns() -> None:
    model = {"d_model": 16, "n_layers": 1, "vocab_size": 32}
    lm = peers.TiedLM(32, 16, peers.Transformer(16, 1, 2, 32, 8), torch.nn.LayerNorm(16))
    ids = workloads.random_ids(4, 8, model["vocab_size"])
    losses: list[float] = []

    def loss() -> Tensor:
        value = workloads.next_token_loss(lm(ids), ids)
        losses.append(value.item())
        return value

    step = workloads.training(lm.parameters(), loss)
    for _ in range(30):
        step()
    assert losses[-1] < losses[0]


def test_the_transformer_is_causal() -> None:
    body = peers.Transformer(16, 2, 2, 32, 8)
    x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(body(changed)[:, :5], body(x)[:, :5])
    assert not torch.allclose(body(changed)[:, 5:], body(x)[:, 5:])


def test_equal_sizes() -> None:
    d_model, vocab_size = train.SHAPE["d_model"], train.SHAPE["vocab_size"]
    with torch.device("meta"):
        mamba = Mamba(MambaConfig(**train.SHAPE))
        bodies = (
            peers.Transformer(d_model, **train.TRANSFORMER, seq_len=8),
            peers.LSTM(d_model, **train.LSTM),
        )
        lms = [peers.TiedLM(vocab_size, d_model, body, torch.nn.LayerNorm(d_model)) for body in bodies]
        lms += [ours.fresh(train.SHAPE | more) for more in (train.LLAMA, train.MAMBA2, train.MAMBA3)]
    for lm in lms:
        assert sum(p.numel() for p in lm.parameters()) == pytest.approx(mamba.num_parameters(), rel=0.011)


def test_matrix_parameters_are_those_of_the_model() -> None:
    with torch.device("meta"):
        mamba = Mamba(MambaConfig(**train.SHAPE))
    shapes = [(m.in_features, m.out_features) for m in mamba.modules() if isinstance(m, torch.nn.Linear)]
    head = mamba.backbone.embedding.weight.numel()
    work = work_of(train.SHAPE)
    assert work.parameters == sum(a * b for a, b in shapes) + head
    assert work.updates == train.SHAPE["n_layers"] * 512 * 16
    assert work.mixing(7) == 0


def test_work_of_a_hybrid() -> None:
    work = work_of(generate.tiny("falcon-h1").model)
    assert work.updates == 0
    assert work.ssd == ((6, 16, 16, 1),)
    assert work.attention == (64,)
    assert work.mixing(10) == ssd_operations((1, 10, 6, 16, 16), False) + 2 * 10 * 10 * 64
    assert (64, 512) not in work.matrices  # the head
    assert work.shapes == [[a, b, n] for (a, b), n in work.matrices.items()]


@pytest.mark.parametrize(
    "job",
    [
        "peers:train_mambapy",
        "peers:train_transformers",
        "hugging_face:prefill_llama",
        "hugging_face:decode_llama",
    ],
)
@pytest.mark.parametrize("more_of_it", [{}, {"model": "llama", "n_heads": 2}], ids=["mamba", "llama"])
def test_peers_run(job: str, more_of_it: dict[str, Any]) -> None:
    pytest.importorskip("mambapy" if "mambapy" in job else "transformers")
    if "mambapy" in job and more_of_it:
        return  # it has no Transformer
    arguments: dict[str, Any] = {"model": {"d_model": 16, "n_layers": 2, "vocab_size": 32} | more_of_it}
    more: dict[str, dict[str, int]] = {
        "train": {"batch": 2, "seq_len": 8},
        "prefill": {"seq_len": 8},
        "decode": {"prompt": 4, "n_tokens": 2},
    }
    phase = job.split(":")[1].split("_")[0]
    prepare(f"longscan.bench.contenders.{job}", arguments | more[phase])()


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of transformers
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("job", ["longscan", "peft"])
def test_fine_tuning_steps_run(job: str, lora: bool) -> None:
    pytest.importorskip("peft")
    model = {"d_model": 16, "n_layers": 2, "vocab_size": 32}
    prepare(f"longscan.bench.contenders.finetune:{job}", {"model": model, "seq_len": 8, "lora": lora})()


@pytest.mark.parametrize("shape", ["130m", "mamba2", "falcon-h1", "granite-h"])
def test_transformers_computes_the_same(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = generate.tiny(shape).model
    here = {"vocab_size": model["vocab_size"], "prompt": 9, "n_tokens": 2}
    directory = str(hugging_face.export(model, tmp_path / "model"))
    expected = ours.decode(model, 9, 2)()["excerpt"]
    for precision, error in (("float32", 1e-5), ("bf16", 5e-2)):
        details = hugging_face.decode_transformers(directory, **here, precision=precision)()
        assert generate.distance(expected, details["excerpt"]) < error
    hugging_face.prefill_transformers(directory, model["vocab_size"], 9)()


SMALL: dict[str, Any] = {"d_model": 64, "n_layers": 2, "vocab_size": 512}
# the error of the logits that a format may cause; llama.cpp also rounds the activations of quantised layers
LOGITS = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2, "q8_0": 5e-2, "q4_0": 0.5, "q4_K": 0.5}


def test_llama_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    assert set(LOGITS) == set(llama.FORMATS)
    here = {"prompt": 40, "n_tokens": 2}
    expected = ours.decode(SMALL, **here)()["excerpt"]
    for name, path in llama.export(SMALL, tmp_path).items():
        details = llama.decode(str(path), SMALL["vocab_size"], **here)()
        assert generate.distance(expected, details["excerpt"]) < LOGITS[name], name
        assert details["weight_bytes"] == pytest.approx(path.stat().st_size, rel=0.05), name


def test_llama_keeps_rows_apart(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    path = llama.export(SMALL, tmp_path, ("f32",))["f32"]
    session, ids = llama._Session(str(path), rows=3), np.arange(40)
    session.prefill(ids)
    session.fork()
    for tokens in np.array([[5, 6, 7], [1, 2, 3]]):
        last = session.step(tokens).copy()
    model = ours.ready(SMALL)
    for row, tokens in enumerate(([5, 1], [6, 2], [7, 3])):
        logits, _ = model.prefill(torch.tensor([*ids, *tokens])[None])
        torch.testing.assert_close(torch.from_numpy(last[row]), logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", generate.PRECISIONS)
def test_decoding_reads_what_it_says(precision: str) -> None:
    details = ours.decode(SMALL, 8, 2, precision, 3)()
    bits = {"float32": 32, "bf16": 16, "int8": 8, "int4": 4}[precision]
    parameters = work_of(SMALL).parameters
    least = parameters * bits // 8
    assert least < details["weight_bytes"] < least + parameters
    assert details["state_bytes"] == ours.ready(SMALL).init_state(1).nbytes


def test_decoding_at_a_position_starts_there_each_time() -> None:
    model = generate.tiny("falcon-h1").model
    run = ours.decode_at(model, position=50, n_tokens=3)
    first, second = run(), run()
    empty = ours.ready(model).init_state(1)
    assert first == second
    assert first["growth"] == empty.growth > 0
    assert first["state_bytes"] == empty.nbytes + 50 * empty.growth
    assert ours.decode_at(SMALL, 50, 3)()["state_bytes"] == ours.ready(SMALL).init_state(1).nbytes


def test_the_loop_knows_its_share_of_python() -> None:
    found = ours.generate(SMALL, prompt=4, n_tokens=16)()
    assert ("python_share" in found) == (longscan.ops.backend() != "reference")
    assert 0 < found.get("python_share", 0.5) < 1
    assert "timed" not in repr(getattr(longscan.ops._native._library, "ls_decode_tokens", None))


def test_a_process_is_timed_to_its_first_output() -> None:
    slow_end = "import sys, time; print('x', flush=True); time.sleep(0.5)"
    assert ours.first_output(["-c", slow_end])()["seconds"] < 0.5
    with pytest.raises(RuntimeError, match="ended with code 1"):
        ours.first_output(["-c", "raise SystemExit(1)"])()


def test_extrapolation_adds_up() -> None:
    pytest.importorskip("transformers")
    model = {"d_model": 16, "n_layers": 50, "vocab_size": 32}
    ticks = clock(100.0, 101.0, 104.0)  # 1 s without layers, 3 s with one
    run = peers.train_transformers(model, batch=1, seq_len=8, one_layer=True, clock=ticks)
    assert run() == {"seconds": 1.0 + 50 * 2.0, "extrapolated": True}


@pytest.mark.parametrize(
    ("job", "theirs", "sizes"),
    [
        ("diagonal", "diagonal_loop", [2, 50, 8, 4]),
        ("diagonal", "diagonal_fft", [2, 50, 8, 4]),
        ("vandermonde", "vandermonde_torch", [1, 51, 8, 4]),
        ("cauchy", "cauchy_torch", [1, 51, 8, 4]),
    ],
)
def test_peers_compute_the_same(job: str, theirs: str, sizes: list[int]) -> None:
    expected, y = (output(name, {"sizes": sizes}) for name in (f"longscan:{job}", f"peers:{theirs}"))
    assert (y - expected).abs().max() < 2e-6 * expected.abs().max()


def test_without_the_backward_pass_no_gradient_is_computed() -> None:
    x = torch.ones(3, requires_grad=True)
    outputs: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        outputs.append(2 * x)
        return outputs[-1]

    workloads.differentiable(double, (x,), backward=False)()
    assert [y.requires_grad for y in outputs] == [False]


@pytest.mark.parametrize("precision", generate.PREFILLED)
def test_each_precision_has_its_own_ceiling(precision: str) -> None:
    measure = ceilings.matmul(8, [[16, 24, 1.5]], backward=True, precision=precision)
    assert 0 < measure()["seconds"] < 1
