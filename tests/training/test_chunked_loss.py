"""The loss in chunks: for every model, the gradients of one pass or a refusal, and runs that use it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_tensors
from torch import Tensor

from longscan.checkpoints.load import load
from longscan.core.progress import Display
from longscan.core.random import RandomStream
from longscan.data.token_files import open_tokens
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, LanguageModel, State
from longscan.models.common.lora import LoraLayer, adaptable, attach
from longscan.training import language_model
from longscan.training import run as run_module
from longscan.training.chunked_loss import chunked_loss, has_constant_state
from longscan.training.config import TrainConfig
from longscan.training.language_model import LanguageRun
from longscan.training.run_directory import read_settings, write_settings
from tiny_runs import TINY, Recorder, assert_same, interrupt, metrics, resume, train

# largest difference allowed, relative to the largest gradient of a parameter
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SIZES = {"d_model": 12, "n_layers": 2, "vocab_size": 11}
MORE: dict[str, dict[str, object]] = {
    "cnn": {"d_conv": 3},
    "gau": {"d_attention": 4},
    "h3": {"d_state": 4, "d_head": 2},
    "hyena": {"d_filter": 4, "max_positions": 400},
    "linear_attention": {"n_heads": 2},
    "llama": {"n_heads": 2},
    "lssl": {"d_state": 5},
    "mamba2": {"d_state": 6, "d_head": 4},
    "mamba3": {"d_state": 6, "d_head": 4},
}
LANGUAGE = [name for name, entry in MODELS.items() if entry.kind == "language"]
GROWING = ("gau", "hyena", "llama", "hybrid", "zamba2")
CONSTANT = [name for name in LANGUAGE if name not in GROWING]


def build(name: str, dtype: torch.dtype = torch.float64, **fields: object) -> LanguageModel:
    entry, draw = MODELS[name], torch.Generator().manual_seed(1)
    preset = {} if name not in ("hybrid", "zamba2") else entry.presets["tiny"]
    sizes = {**preset, **({} if preset else {**SIZES, **MORE.get(name, {})}), **fields}
    model = entry.cls(entry.config.from_dict(sizes), draw).to(dtype)
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, so that every one matters
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=dtype)
    return model.train()


def drawn(batch: int, seq_len: int) -> Tensor:
    return torch.randint(11, (batch, seq_len), generator=torch.Generator().manual_seed(2))


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def norm(state: State) -> Tensor:
    return torch.stack([tensor.square().sum() for _, tensor in state.named_tensors()]).sum()


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        error = (got[name] - grad).abs().max() / grad.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONSTANT)
def test_gradients_are_those_of_one_pass(name: str, dtype: torch.dtype) -> None:
    model, ids = build(name, dtype), drawn(3, 53)
    whole = model(ids, labels=ids, return_logits=False).loss
    expected = gradients(model, whole)
    for chunk in (7, 13, 26, 53, 60):
        loss, _ = chunked_loss(model, ids, chunk=chunk)
        assert loss.item() == pytest.approx(whole.item(), rel=TOLERANCE[dtype] / 10)
        assert_close(gradients(model, loss), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", GROWING)
def test_a_state_that_grows_is_refused(name: str) -> None:
    model = build(name)
    assert not has_constant_state(model)
    with pytest.raises(LongscanError, match=f"that of {type(model).__name__} grows with every token"):
        chunked_loss(model, drawn(1, 9), chunk=4)


def test_a_hybrid_without_attention_is_exact() -> None:
    sizes = {**SIZES, "n_layers": 4, "d_state": 4, "d_ssm_head": 4, "d_ff": 5}
    config = MODELS["hybrid"].config.from_dict({**sizes, "pattern": "Mm-m"})
    model = MODELS["hybrid"].cls(config, torch.Generator().manual_seed(0)).double()
    assert isinstance(model, LanguageModel)
    ids = drawn(2, 31)
    expected = gradients(model, model(ids, labels=ids, return_logits=False).loss)
    assert_close(gradients(model, chunked_loss(model, ids, chunk=9)[0]), expected, 1e-10)


@pytest.mark.parametrize("name", ["mamba", "mamba3", "s4", "lstm", "cnn", "h3"])
def test_gradients_pass_through_the_states_at_both_ends(name: str) -> None:
    """Of the loss and of the final state, with respect to the initial state and the weights."""
    model, ids = build(name), drawn(2, 29)
    draw = torch.Generator().manual_seed(3)
    start = model.init_state(2).map(lambda t: torch.randn(t.shape, generator=draw, dtype=t.dtype))
    results = []
    for chunk in (None, 8):
        state = start.map(lambda t: t.clone().requires_grad_())
        if chunk is None:
            output = model(ids, state=state, labels=ids, return_logits=False)
            loss, after = output.loss, output.state
        else:
            loss, after = chunked_loss(model, ids, chunk=chunk, state=state)
        total = loss + 0.1 * norm(after)
        ends = dict(state.named_tensors())
        found = dict(zip(ends, torch.autograd.grad(total, ends.values(), retain_graph=True), strict=True))
        results.append({**found, **gradients(model, total)})
    assert_close(results[1], results[0], 1e-10)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "s4", "lstm", "hippo"])
def test_packed_and_padded_rows(name: str) -> None:
    """Sequences begin at the border of a chunk, next to it and within; one row ends in padding."""
    model, ids = build(name), drawn(3, 24)
    seq_idx = torch.tensor([[0] * 8 + [1] * 16, [0] * 7 + [3] * 2 + [4] * 15, [-1] * 3 + [2] * 14 + [-1] * 7])
    whole = model(ids, labels=ids, seq_idx=seq_idx, return_logits=False)
    expected = gradients(model, whole.loss)
    for chunk in (1, 8, 11):
        loss, after = chunked_loss(model, ids, chunk=chunk, seq_idx=seq_idx)
        assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
        assert_close(gradients(model, loss), expected, 1e-10)
        for (_, one), (_, other) in zip(after.named_tensors(), whole.state.named_tensors(), strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_only_some_labels_count() -> None:
    model, ids = build("mamba"), drawn(2, 30)
    labels = ids.masked_fill(torch.arange(30) < 25, -100)  # the first chunks predict nothing
    expected = gradients(model, model(ids, labels=labels, return_logits=False).loss)
    assert_close(gradients(model, chunked_loss(model, ids, labels, chunk=6)[0]), expected, 1e-10)
    nothing, _ = chunked_loss(model, ids, torch.full_like(ids, -100), chunk=6)
    assert nothing.item() == 0
    assert all(not grad.any() for grad in gradients(model, nothing).values())


def test_dropout_draws_the_same_numbers_again() -> None:
    model, ids = build("mamba"), drawn(2, 40)
    attach(model, dict.fromkeys(adaptable(model), LoraLayer(2, 4.0)), 0.5)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    state, total = model.init_state(2), torch.zeros(())
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    for part in (slice(0, 16), slice(16, 32), slice(32, 40)):  # all in one graph, which draws once
        hidden, state = model.backbone(ids[:, part], state)
        total = total + model.token_losses(hidden, targets[:, part]).sum() / 78
    expected, end = gradients(model, total), torch.get_rng_state()
    torch.manual_seed(7)
    loss, _ = chunked_loss(model, ids, chunk=16)
    found = gradients(model, loss)
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert_close(found, expected, 1e-10)
    assert torch.equal(torch.get_rng_state(), end)  # the backward pass leaves no trace


def test_many_states_go_to_a_file(tmp_path: Path) -> None:
    model = build("mamba", d_state=512, d_model=32)
    ids = drawn(16, 17)
    assert 8 * model.init_state(16).nbytes > 2**24
    expected = gradients(model, model(ids, labels=ids, return_logits=False).loss)
    assert_close(gradients(model, chunked_loss(model, ids, chunk=2, directory=tmp_path)[0]), expected, 1e-10)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No such file"):
        chunked_loss(model, ids, chunk=2, directory=tmp_path / "absent")


def test_without_autograd_it_is_the_loss_alone() -> None:
    model, ids = build("s4d"), drawn(2, 20)
    with torch.inference_mode():
        loss, state = chunked_loss(model, ids, chunk=6)
        whole = model(ids, labels=ids)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    assert torch.allclose(state.layers[0].ssm, whole.state.layers[0].ssm, rtol=1e-10)


def test_autocast_is_that_of_the_forward_pass() -> None:
    model, ids = build("mamba", torch.float32), drawn(2, 40)
    grads = []
    for chunk in (40, 11):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = chunked_loss(model, ids, chunk=chunk)
        grads.append(gradients(model, loss))
    exact = gradients(model, chunked_loss(model, ids, chunk=11)[0])
    assert_close(grads[1], grads[0], 0.05)
    assert any(not torch.equal(grads[1][name], exact[name]) for name in exact)


@pytest.mark.parametrize("which", ["ids", "labels", "seq_idx"])
def test_what_changes_before_the_backward_pass_is_noticed(which: str) -> None:
    model, given = build("mamba"), {name: drawn(2, 9) for name in ("ids", "labels")}
    given["seq_idx"] = torch.zeros_like(given["ids"])
    loss, _ = chunked_loss(model, given["ids"], given["labels"], chunk=4, seq_idx=given["seq_idx"])
    given[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_progress_counts_both_passes() -> None:
    model, ids, seen = build("mamba"), drawn(2, 20), list[tuple[int, int]]()
    loss, _ = chunked_loss(model, ids, chunk=6, progress=lambda *each: seen.append(each))
    assert seen == [(done, 8) for done in range(1, 5)]
    loss.backward()  # type: ignore[no-untyped-call]
    assert seen == [(done, 8) for done in range(1, 9)]
    with torch.inference_mode():
        chunked_loss(model, ids, chunk=6, progress=lambda *each: seen.append(each))
    assert seen[8:] == [(done, 4) for done in range(1, 5)]


@pytest.mark.parametrize("at", [2, 6], ids=["forward", "backward"])
def test_progress_may_end_the_work(at: int) -> None:
    model = build("mamba")

    def stop(done: int, _: int) -> None:
        if done == at:
            raise LongscanError("stopped")

    with pytest.raises(LongscanError, match="stopped"):
        chunked_loss(model, drawn(2, 20), chunk=6, progress=stop)[0].backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_full_disk_says_what_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.write", full)
    with pytest.raises(OSError, match="No space left on device for the states before each chunk") as error:
        chunked_loss(build("mamba"), drawn(2, 9), chunk=4, directory=tmp_path)
    assert error.value.filename == str(tmp_path)


def test_impossible_arguments_are_refused() -> None:
    model, ids = build("lstm"), drawn(2, 20)
    with pytest.raises(UsageError, match="chunk: expected"):
        chunked_loss(model, ids, chunk=0)
    with pytest.raises(ValueError, match="non-empty"):
        chunked_loss(model, ids[:, :0], chunk=4)
    with pytest.raises(ValueError, match=r"labels: expected \(2, 20\)"):
        chunked_loss(model, ids, ids[:, 1:], chunk=4)
    with pytest.raises(ValueError, match=r"seq_idx: expected shape \(2, 20\), got \(20,\)"):
        chunked_loss(model, ids, chunk=4, seq_idx=ids[0])
    loss, _ = chunked_loss(model, ids, chunk=4)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Runs


LONG = {"seq_len": 40, "backward_chunk": 7}


def test_a_run_in_chunks_is_one_in_a_single_pass(config: TrainConfig, tmp_path: Path) -> None:
    display = Recorder()
    train(config.replace(**LONG), tmp_path / "chunks", display)
    train(config.replace(**LONG | {"backward_chunk": 0}), tmp_path / "whole")
    assert any("in chunks of 7" in line for line in display.lines)
    chunks, whole = (load_tensors(tmp_path / run / "model/model.safetensors") for run in ("chunks", "whole"))
    for name, weight in whole.items():
        assert torch.allclose(chunks[name], weight, rtol=1e-3, atol=1e-4), name
    valid = [metrics(tmp_path / run)[-2]["valid_loss"] for run in ("chunks", "whole")]
    assert valid[0] == pytest.approx(valid[1], rel=1e-3)


def test_it_resumes_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    train(config.replace(**LONG), tmp_path / "whole")
    train(config.replace(**LONG), tmp_path / "run", Recorder(3, interrupt(signal.SIGINT)))
    assert resume(tmp_path / "run").stopped_by is None
    assert_same(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(UsageError, match="backward_chunk cannot change in the middle of a run"):
        resume(tmp_path / "run", {"backward_chunk": 8, "steps": 9})


class Within(Recorder):
    """Sends a signal at a given share of a step in progress, once."""

    def __init__(self, what: str, done: int) -> None:
        super().__init__()
        self.what, self.done, self.seen = what, done, list[tuple[str, int, int]]()

    def within(self, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))
        if (what, done) == (self.what, self.done):
            self.done = 0
            interrupt(signal.SIGINT)()


@pytest.mark.parametrize("carry", [False, True], ids=["shuffled", "carried"])
@pytest.mark.parametrize("done", [3, 19, 24], ids=["forward", "second-part", "last-but-none"])
def test_a_signal_within_a_long_step(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, carry: bool
) -> None:
    """The step is discarded unless it is nearly done, and resuming gives the bits of an undisturbed run."""
    monkeypatch.setattr(run_module, "PATIENCE", -1)  # every step is a long one
    monkeypatch.setattr(run_module, "GRACE", 0)
    long = config.replace(**LONG, carry_state=carry)
    train(long, tmp_path / "whole")
    display = Within("next step", done)
    stopped = train(long, tmp_path / "run", display)
    assert (stopped.step, stopped.stopped_by) == (int(done == 24), signal.SIGINT)
    assert display.seen[-1] == ("next step", done, 24)
    assert any("resuming repeats" in line for line in display.lines) == (done < 24)
    assert resume(tmp_path / "run").stopped_by is None
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_short_step_is_finished(config: TrainConfig, tmp_path: Path) -> None:
    display = Recorder(3, interrupt(signal.SIGINT))
    assert train(config.replace(**LONG), tmp_path / "run", display).step == 3


def test_a_signal_within_a_long_validation(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", -1)
    monkeypatch.setattr(run_module, "GRACE", 0)
    train(config.replace(**LONG), tmp_path / "whole")
    stopped = train(config.replace(**LONG), tmp_path / "run", Within("validation", 2))
    assert (stopped.step, stopped.stopped_by) == (3, signal.SIGINT)
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_the_default_chunk_is_written_down(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.json has the chunk, so a later default neither changes a run nor stops it from resuming."""
    monkeypatch.setattr(language_model, "ONE_PASS", 20)
    monkeypatch.setattr(language_model, "CHUNK", 7)
    default = config.replace(seq_len=40)
    train(default, tmp_path / "whole")
    train(default, tmp_path / "run", Recorder(3, interrupt(signal.SIGINT)))
    train(config.replace(steps=1), tmp_path / "short")
    chunks = [read_settings(tmp_path / name, "train")["backward_chunk"] for name in ("run", "short")]
    assert chunks == [7, 0]
    settings = read_settings(tmp_path / "run", "train")  # as an earlier version wrote them
    write_settings(tmp_path / "run", "train", {**settings, "backward_chunk": None})
    assert resume(tmp_path / "run", {"steps": 8}).step == 8
    assert read_settings(tmp_path / "run", "train")["backward_chunk"] == 7
    assert_same(tmp_path / "run", tmp_path / "whole")
    monkeypatch.setattr(language_model, "CHUNK", 5)
    display = Recorder()
    resume(tmp_path / "run", {"steps": 9}, display)
    assert any("in chunks of 7" in line for line in display.lines)


def test_rows_read_on_in_their_state(config: TrainConfig, tmp_path: Path) -> None:
    """A step starts where the one before ended: with a rate of 0, losses are those of one long pass."""
    still = config.replace(carry_state=True, lr=1e-30, min_lr=0, weight_decay=0, sample_every=0, steps=3)
    for chunk in (0, 5):
        run = tmp_path / f"chunk-{chunk}"
        train(still.replace(backward_chunk=chunk), run)
        model, _ = load(run / "model")
        tokens = torch.from_numpy(open_tokens(run / "data/train.bin").astype("int64"))
        first = int(RandomStream(config.seed, 0).raw(1)[0]) % len(tokens)
        starts = [first + row * len(tokens) // 4 for row in range(4)]
        long = torch.stack([tokens[(start + torch.arange(49)) % len(tokens)] for start in starts])
        with torch.no_grad():
            hidden, _ = model.backbone(long[:, :48])
            losses = model.token_losses(hidden, long[:, 1:49]).view(4, 3, 16).mean((0, 2))
        found = [record["loss"] for record in metrics(run) if "loss" in record]
        assert found == pytest.approx(losses.tolist(), rel=1e-5)


@pytest.mark.parametrize("chunk", [0, 7], ids=["one-pass", "chunks"])
def test_carried_states_resume_bit_for_bit(config: TrainConfig, tmp_path: Path, chunk: int) -> None:
    carried = config.replace(carry_state=True, backward_chunk=chunk)
    train(carried, tmp_path / "whole")
    train(carried, tmp_path / "run", Recorder(3, interrupt(signal.SIGINT)))
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")
    stored = load_tensors(tmp_path / "run/checkpoints/step-000008/optimizer.safetensors")
    assert any(name.startswith("carried.") and tensor.any() for name, tensor in stored.items())


def test_the_default_depends_on_length_and_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("all of it " * 2000)
    long = {"data": [str(tmp_path / "text.txt")], "batch_size": 1, "accumulate": 1, "steps": 1}
    settings = TrainConfig.from_dict({**TINY, **long, "sample_every": 0, "valid_fraction": 0})
    for name, seq_len, more, chunk in (
        ("mamba", 9000, {}, 2048),
        ("mamba", 64, {}, 0),
        ("llama", 9000, {"d_state": None, "option": ("max_positions=9001",)}, 0),
    ):
        directory = tmp_path / f"{name}-{seq_len}"
        directory.mkdir()
        write_settings(directory, "train", settings.to_dict())
        run = LanguageRun(directory, settings.replace(model=name, seq_len=seq_len, **more), Display())
        run.metrics.close()
        assert run.chunk == chunk


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama"], "--backward-chunk: expected a model whose state has a constant size"),
        (["--model", "llama", "--backward-chunk", 0, "--carry-state"], "--carry-state: expected a model"),
        (["--model", "bert", "--tokenizer", "bpe"], "bert reads in both directions"),
        (["--backward-chunk", "-1"], "--backward-chunk: expected 0 or more, got -1"),
        (
            ["--model", "llama", "--backward-chunk", 0, "--seq-len", 9000, "--batch-size", 10**7],
            "one pass retains",
        ),
        (["--seq-len", "1048576"], "one sequence needs seq_len + 1 = 1,048,577"),
    ],
    ids=["attention", "attention-carried", "bert", "negative", "memory", "too-little-text"],
)
def test_bad_input(tmp_path: Path, cli: Callable[..., Any], flags: list[object], message: str) -> None:
    run, long = tmp_path / "run", tmp_path / "long.txt"
    long.write_text("all of it " * 1500)
    usual = ["--tokenizer", "bytes", "--preset", "tiny", "--backward-chunk", 8]
    done = cli("train", long, "--out", run, *usual, *flags)
    assert done.code in (1, 2)
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert not run.exists()
