"""`longscan bench`: the harness on contenders of a few milliseconds, and every job at toy size."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import longscan
from longscan.bench import figure, report, runner, worker
from longscan.bench.contenders import ceilings, llama, peers, workloads
from longscan.bench.contenders import longscan as ours
from longscan.bench.measure import Contender, Measurement, Settings, compare, faster
from longscan.bench.suites import generate, ops, stream, train
from longscan.models import Mamba, MambaConfig

JOBS = """
import os

def write(path, word):
    with open(path, "a") as file:
        file.write(word)

def note(path, word):
    return lambda: write(path, word)

def slow(path, word):
    def run():
        write(path, word)
        return {"seconds": 99.0}
    return run

def noisy():
    print("hello from a peer", flush=True)
    return lambda: {"seconds": 7.0, "detail": "kept"}

def broken():
    def run():
        raise ArithmeticError("no more numbers")
    return run

def killed():
    return lambda: os.kill(os.getpid(), 9)

def hungry(megabytes):
    def run():
        bytearray(b"x" * (megabytes << 20))
    return run

def environment():
    return lambda: {"threads": os.environ["OMP_NUM_THREADS"]}
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of jobs that the workers find, and a log that these write to."""
    (tmp_path / "toy_jobs.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "log"


def contender(name: str, job: str, **more: Any) -> Contender:
    settings = {key: more.pop(key) for key in tuple(more) if key in Contender.__dataclass_fields__}
    return Contender(name=name, job=f"toy_jobs:{job}", arguments=more, **settings)


def test_contenders_take_turns(jobs: Path) -> None:
    log = str(jobs)
    both = [contender("a", "note", path=log, word="a"), contender("b", "note", path=log, word="b")]
    found = compare("letters", both, Settings(repeats=3, budget=0.0))
    assert jobs.read_text() == "ab" + "ab" * 3
    assert list(found) == ["a", "b"]
    assert all(len(m.seconds) == 3 and m.warm and m.median > 0 for m in found.values())
    assert found["a"].peak_bytes > 1e6


def test_what_is_slow_runs_once(jobs: Path) -> None:
    log = str(jobs)
    slow = contender("slow", "slow", path=log, word="s", patience=98.0)
    found = compare(
        "letters", [slow, contender("a", "note", path=log, word="a")], Settings(repeats=2, budget=0.0)
    )
    assert jobs.read_text() == "sa" + "aa"
    assert found["slow"].seconds == (99.0,)
    assert not found["slow"].warm


def test_one_failure_does_not_stop_the_others(jobs: Path) -> None:
    three = [contender(name, name) for name in ("broken", "noisy", "killed")]
    found = compare("mixed", three, Settings(repeats=1, budget=0.0))
    assert found["broken"].note == "failed: ArithmeticError: no more numbers"
    assert "killed it" in found["killed"].note
    assert math.isnan(found["broken"].median)
    assert found["broken"].as_row()["seconds"] is None
    assert found["noisy"].seconds == (7.0,)
    assert found["noisy"].as_row()["detail"] == "kept"


def test_who_is_left_out(jobs: Path) -> None:
    everyone = [
        contender("ours", "noisy"),
        contender("peer", "noisy", peer=True),
        contender("absent", "noisy", packages=("no-such-package",)),
        contender("huge", "noisy", needs_bytes=10**18),
    ]
    found = compare("few", everyone, Settings(repeats=1, budget=0.0, peers=False))
    assert list(found) == ["ours", "huge"]
    assert found["huge"].note.startswith("not run: needs about 1000000000 GB")
    assert not found["huge"].seconds


def test_extra_memory_is_that_of_one_run_and_of_one_contender(jobs: Path) -> None:
    both = [contender("much", "hungry", megabytes=96), contender("little", "hungry", megabytes=1)]
    found = compare("memory", both, Settings(repeats=1, budget=0.0), memory=True)
    assert 90 < found["much"].extra_bytes / 2**20 < 250  # the constant and the array may overlap
    assert found["little"].extra_bytes / 2**20 < 10


def test_threads_reach_the_worker(jobs: Path) -> None:
    found = compare("threads", [contender("a", "environment")], Settings(repeats=1, budget=0.0, threads=3))
    assert found["a"].details == {"threads": "3"}


def clock(*ticks: float) -> Callable[[], float]:
    """A clock that shows these times, and then goes on in steps of the last one."""
    return itertools.chain(ticks, itertools.count(2 * ticks[-1], ticks[-1])).__next__


def test_a_turn_of_something_short_is_a_median() -> None:
    ticks = clock(0.001)
    seconds = itertools.chain([9.0, 1.0, 5.0], itertools.repeat(2.0))
    assert worker.turn(lambda: {"seconds": next(seconds)}, 0.05, ticks)["seconds"] == 2.0
    assert worker.turn(lambda: {"seconds": 7.0}, 0.002, ticks) == {"seconds": 7.0}  # no time for more


# --- the contenders, in this process ------------------------------------------------------------------------


def prepare(job: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    module, name = job.split(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def run_here(
    title: str, contenders: Sequence[Contender], settings: Settings, *, memory: bool = False
) -> dict[str, Measurement]:
    """Stand in for `compare`: run each contender that needs no package once, in this process."""
    found = {}
    for one in contenders:
        if one.packages or (one.peer and not settings.peers):
            continue
        begin = time.perf_counter()
        details = prepare(one.job, one.arguments)() or {}
        seconds = details.pop("seconds", time.perf_counter() - begin)
        extra = 4096 if memory else None
        found[one.name] = Measurement(
            name=one.name, seconds=(seconds,), peak_bytes=10**8, extra_bytes=extra, details=details
        )
    return found


@pytest.fixture(scope="module")
def reports() -> Iterator[list[report.Report]]:
    """The quick report of every suite, measured in this process, where no peer is installed."""
    settings = Settings(compare=run_here, installed=lambda _: False)
    with pytest.MonkeyPatch.context() as patch:
        # for the processes that a suite starts to time them
        patch.setenv("PYTHONPATH", str(Path(longscan.__file__).parent.parent))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sizes this small only wait for a second
        yield [runner.run(suite, settings, quick=True) for suite in runner.SUITES]
        torch.set_num_threads(threads)


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
        lms.append(ours.fresh(train.SHAPE | train.LLAMA))
    for lm in lms:
        assert sum(p.numel() for p in lm.parameters()) == pytest.approx(mamba.num_parameters(), rel=0.01)


def test_matrix_parameters_are_those_of_the_model() -> None:
    with torch.device("meta"):
        mamba = Mamba(MambaConfig(**train.SHAPE))
    shapes = [(m.in_features, m.out_features) for m in mamba.modules() if isinstance(m, torch.nn.Linear)]
    assert shapes == train.matrices(train.SHAPE["d_model"]) * train.SHAPE["n_layers"]
    head = mamba.backbone.embedding.weight.numel()
    assert train.matrix_parameters(**train.SHAPE) == sum(a * b for a, b in shapes) + head


@pytest.mark.parametrize(
    "job", ["train_mambapy", "train_transformers", "prefill_transformers", "decode_transformers"]
)
@pytest.mark.parametrize("more_of_it", [{}, {"model": "llama", "n_heads": 2}], ids=["mamba", "llama"])
def test_peers_run(job: str, more_of_it: dict[str, Any]) -> None:
    pytest.importorskip("mambapy" if job == "train_mambapy" else "transformers")
    if job == "train_mambapy" and more_of_it:
        return  # it has no Transformer
    arguments: dict[str, Any] = {"model": {"d_model": 16, "n_layers": 2, "vocab_size": 32} | more_of_it}
    more: dict[str, dict[str, int]] = {
        "train": {"batch": 2, "seq_len": 8},
        "prefill": {"seq_len": 8},
        "decode": {"prompt": 4, "n_tokens": 2},
    }
    prepare(f"longscan.bench.contenders.peers:{job}", arguments | more[job.split("_")[0]])()


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
    least = train.matrix_parameters(**SMALL) * bits // 8
    assert least < details["weight_bytes"] < least + train.matrix_parameters(**SMALL)
    assert details["state_bytes"] == ours.ready(SMALL).init_state(1).nbytes


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


# --- the command --------------------------------------------------------------------------------------------


def test_ops_for_real_as_json(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flags = ("--json", "--no-peers", "--repeats", 1, "--threads", 1, "--figure", tmp_path / "ops.png")
    done = cli("bench", "ops", "--quick", *flags)
    assert done.code == 0, done.err
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(done.out)
    assert found["machine"]["threads"] == 1
    assert {"torch", "longscan", "python"} <= set(found["versions"])
    assert found["repeats"] == 1
    assert found["quick"] is True
    (suite,) = found["suites"]
    assert suite["suite"] == "ops"
    ours = [row for row in suite["rows"] if row["contender"] == ops.OURS]
    assert len(ours) == 10  # scan, convolution and three ops of state spaces, forward and with backward
    for row in ours:
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["rate"] > 0
        floor = (
            1 if row["case"].startswith(("selective", "causal")) else 0
        )  # a tiny kernel may fit in what is there
        assert row["peak_bytes"] > row["extra_bytes"] >= floor
        assert row["note"] == ""
    assert {"case", "unit", "warm", "repeats", "shape", "backward", "u_bytes"} <= set(ours[0])
    assert all({"what", "measured", "goal"} == set(ratio) for ratio in suite["ratios"])
    assert "selective_scan forward" in done.err


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


def test_everything_prints_without_peers(reports: list[report.Report]) -> None:
    text = "\n".join(found.text() for found in reports)
    for title in (
        "selective_scan forward",
        "causal_conv1d",
        "training: tokens/s",
        "prefill: tokens/s",
        "decode, by batch size",
        "seconds from the start of the process",
        "decoding after a prompt",
        "training a translator",
        "evaluate: 20,000 tokens",
    ):
        assert title in text
    assert "longscan" in text
    assert "\x1b" not in text


def test_a_suite_for_real_as_text(cli: Any) -> None:
    done = cli("bench", "stream", "--quick", "--repeats", 1, "--threads", 1)
    assert done.code == 0, done.err
    assert "medians (lowest–highest)" in done.out
    assert "evaluate: 20,000 tokens" in done.out
    absent = runner.missing_peers(Settings())
    assert ("not installed" in done.out) == bool(absent)
    assert not absent or runner.install_peers(absent) in done.out


def test_peers_that_are_not_installed() -> None:
    absent = runner.missing_peers(Settings(installed=lambda package: package == "transformers"))
    assert absent == ["mambapy", "llama-cpp-python"]
    assert runner.missing_peers(Settings(installed=lambda _: False, peers=False)) == []
    assert runner.install_peers(runner.missing_peers(Settings(installed=lambda _: False))) == (
        "not installed: mambapy, transformers, llama-cpp-python; to compare with them: "
        "pip install 'longscan[peers,llama]'"
    )


def test_figure(reports: list[report.Report], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    figure.draw(reports, runner.heading(runner.about(Settings(), quick=True)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("opps",), 2, "did you mean 'ops'"),
        (("ops", "--repeats", 0), 2, "--repeats: expected 1 or more, got 0"),
        (("generate", "--shape", "131m"), 2, "131m"),
        (("ops", "--threads", -1), 2, "--threads: expected 1 or more, got -1"),
        (("ops", "--figure", "bench.txt"), 2, "ends in .png, .svg or .pdf"),
        (("ops", "--figure", "nowhere/bench.png"), 1, "there is no directory"),
    ],
    ids=["suite", "repeats", "shape", "threads", "suffix", "directory"],
)
def test_misuse(cli: Any, argv: tuple[object, ...], code: int, words: str) -> None:
    done = cli("bench", *argv)
    assert (done.code, done.out) == (code, "")
    assert words in done.err


# --- the report ---------------------------------------------------------------------------------------------


def measurement(name: str, *seconds: float, **more: Any) -> Measurement:
    return Measurement(name=name, seconds=seconds, peak_bytes=10**9, **more)


def test_goals_stand_beside_ratios() -> None:
    def fake(title: str, contenders: Sequence[Contender], settings: Settings) -> dict[str, Measurement]:
        slow = {train.MAMBAPY: 20.0, train.HF_MAMBAPY: 25.0, train.HF: 200.0}
        return {c.name: measurement(c.name, slow.get(c.name, 1.0)) for c in contenders}

    found = train.run(Settings(compare=fake), quick=False)
    ratios = {ratio.what: ratio for ratio in found.ratios}
    assert ratios["512: faster than mambapy"].measured == 20.0
    assert ratios["512: faster than the faster path of transformers"].measured == 25.0
    assert ratios["2048: speed, share of that at 512"].measured == 1.0
    assert ratios["8192: speed, share of that at 512"].measured == 2.0  # twice the tokens in the same second
    assert ratios["512: faster than mambapy"].goal == "≥ 10 ×"
    text = found.text()
    assert "20 ×" in text
    assert "2048" in text
    assert not [row for row in found.rows if row["contender"] == train.HF and row["seq_len"] > 512]


def test_generation_beside_its_goals() -> None:
    slow = {"llama.cpp f32": 3.0, "llama.cpp q4_0": 2.0, "llama.cpp q4_K": 1.8, generate.HF: 10.0}
    slow |= {"longscan int4": 0.5, "longscan int8 × 8": 2.0, generate.UPDATES: 0.2}
    products = {"float32": 0.5, "bf16": 0.4, "int8": 0.3, "int4": 0.3}
    slow |= {f"{generate.PRODUCTS}, {precision}": seconds for precision, seconds in products.items()}
    slow |= {generate.READING: 0.9}
    weights = 4 * train.matrix_parameters(**generate.SHAPES["130m"].model)

    def fake(title: str, contenders: Sequence[Contender], settings: Settings) -> dict[str, Measurement]:
        details: dict[str, Any] = {"weight_bytes": weights, "state_bytes": 0, "python_share": 0.04}
        if title == "decode":
            details["excerpt"] = [1.0, 3.0]
        return {c.name: measurement(c.name, slow.get(c.name, 1.0), details=dict(details)) for c in contenders}

    def export(model: dict[str, Any], folder: Path) -> dict[str, Path]:
        return {name: folder / name for name in llama.FORMATS}

    settings = Settings(compare=fake, installed=lambda _: True)
    found = generate.run(settings, quick=False, export=export)
    ratios = {ratio.what: ratio for ratio in found.ratios}

    def shown(what: str) -> tuple[float, str]:
        return pytest.approx(ratios[what].measured), ratios[what].goal

    assert shown("prefill 512: float32 over llama.cpp f32") == (3.0, "≥ 2.2 ×")
    assert shown("prefill 2048: int4 over llama.cpp q4_0") == (4.0, "≥ 2.5 ×")
    assert shown("prefill 512: our slowest over the fastest llama.cpp") == (1.0, "")
    assert shown("prefill 512: int8, share of both ceilings in turn") == (0.5, "")
    assert shown("prefill 512: float32, share of both ceilings in turn") == (0.7, "")  # each has its own
    assert shown("decode 1: int4 over llama.cpp q4_0 or q4_K") == (3.6, "≥ 1.6 ×")
    assert shown("decode 1: float32, share of reading the weights") == (0.9, "≥ 90 %")
    assert shown("decode 1: int4, share of Python in generate_ids") == (0.04, "≤ 5 %")
    assert shown("decode 8: int8 over one sequence") == (4.0, "≥ 4 ×")
    assert shown("decode 32: int8 over one sequence") == (32.0, "≥ 8 ×")
    cases = [row["case"] for row in found.rows if row["contender"] == "longscan int8"]
    assert cases == ["prefill 512", "prefill 2048", "decode 1", "decode 8", "decode 32"]
    checked = [row for row in found.rows if row["case"] == "decode 1" and "Llama" not in row["contender"]]
    assert {row["logits_error"] for row in checked} == {0.0}
    assert "excerpt" not in json.dumps(found.as_dict(), allow_nan=False)
    larger = generate.run(settings, quick=False, shape="370m", export=export)
    assert {r.what: r.goal for r in larger.ratios}["decode 1: int8 over llama.cpp q8_0"] == "≥ 1.26 ×"


def test_marks_of_single_and_extrapolated_runs() -> None:
    found = report.Report(suite="train")
    cold = measurement("cold", 2.0, warm=False)
    guess = measurement("guess", 4.0, warm=False, details={"extrapolated": True})
    found.add("512", [cold, guess, measurement("warm", 1.0, 2.0, 3.0)], 4096, "tokens/s")
    found.tables.append(report.rate_table("speeds", found.rows, report.rate))
    text = found.text()
    assert "2,048¹" in text
    assert "1,024²¹" in text
    assert "2,048 (1,365–4,096)" in text
    assert "¹ a single first run" in text
    assert "² extrapolated" in text


def test_failures_show_in_table_and_notes() -> None:
    found = report.Report(suite="train")
    found.add("512", [measurement("broken", note="failed: out of memory")], 4096, "tokens/s")
    found.tables.append(report.rate_table("speeds", found.rows, report.rate))
    assert "broken  failed" in found.text()
    assert "512: broken: failed: out of memory" in found.text()
    json.dumps(found.as_dict(), allow_nan=False)


def test_quarters() -> None:
    marks = [[1000 * i, 0.5 * i, 10**8 + i] for i in range(1, 41)]
    quarters = stream._quarters(marks)
    assert [quarter["tokens"] for quarter in quarters] == [10_000, 20_000, 30_000, 40_000]
    assert all(quarter["rate"] == pytest.approx(2000) for quarter in quarters)
    assert quarters[-1]["resident_bytes"] == 10**8 + 40


def test_faster_takes_the_best_of_the_others() -> None:
    found = {name: measurement(name, s) for name, s in (("ours", 1.0), ("a", 30.0), ("b", 20.0))}
    assert faster(found, "ours", "a", "b", "absent") == 20.0
    assert math.isnan(faster(found, "ours", "absent"))


@pytest.mark.parametrize("precision", generate.PRECISIONS)
def test_each_precision_has_its_own_ceiling(precision: str) -> None:
    shapes = [[16, 24]]
    measure = ceilings.matmul(8, shapes, backward=True, operations=3 * 2 * 8 * 16 * 24, precision=precision)
    assert 0 < measure()["seconds"] < 1
