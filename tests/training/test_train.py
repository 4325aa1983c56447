"""Training: it learns, a finished run becomes longer, and what may change in between."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_tensors

from longscan.checkpoints.load import load
from longscan.core.progress import Display
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.base import ByteTokenizer
from longscan.training.config import TrainConfig
from longscan.training.language_model import LanguageRun
from longscan.training.run_directory import lock
from longscan.training.schedule import learning_rate
from longscan.training.train import train as train_with_figures
from stand_ins import ctrl_c
from tiny_runs import TINY, Recorder, assert_same, interrupt, metrics, resume, train

FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


# What a run does


def test_it_learns(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/poem.txt").write_text("round and round the ragged rock " * 200)
    (tmp_path / "held.txt").write_text("the ragged rock round and round " * 5)
    paths = {"data": [str(tmp_path / "text")], "valid": [str(tmp_path / "held.txt")]}
    pace = {"steps": 120, "lr": 3e-2, "seq_len": 48, "accumulate": 1, "save_every": 1000}
    quiet = {"eval_every": 0, "sample_every": 0}
    result = train(TrainConfig.from_dict({**TINY, **paths, **pace, **quiet}), tmp_path / "run")
    assert result.valid is not None
    assert result.valid < 1.0  # 8 before, 3.5 for one who knows how frequent each letter is


def test_the_records(whole: Path, config: TrainConfig) -> None:
    records = metrics(whole)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert steps[-1]["tokens"] == 8 * 2 * 2 * 16
    assert steps[-1]["lr"] == pytest.approx(config.final_lr)
    assert [record["step"] for record in records if "valid_bits_per_byte" in record] == [3, 6, 8]
    assert [record["step"] for record in records if "sample" in record] == [4, 8]
    assert (whole / "loss.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_the_exported_model_is_the_last_one(whole: Path) -> None:
    model, tokenizer = load(whole / "model")
    assert isinstance(tokenizer, ByteTokenizer)
    last = metrics(whole)[-2]
    assert "valid_loss" in last
    held_out = torch.frombuffer(bytearray((whole / "data/valid.bin").read_bytes()), dtype=torch.uint16).long()
    predicted, total = len(held_out) - 1, 0.0
    for start in range(0, predicted, 16):
        ids = held_out[None, start : start + 17]
        loss = model(ids, labels=ids).loss
        assert loss is not None
        total += loss.item() * (ids.shape[1] - 1)
    assert total / predicted == pytest.approx(last["valid_loss"], rel=1e-5)


def test_the_seed_decides_every_bit(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "same")
    assert_same(tmp_path / "same", whole)
    train(config.replace(seed=1), tmp_path / "other")
    assert metrics(tmp_path / "other")[0]["loss"] != metrics(whole)[0]["loss"]


def test_accumulation_is_a_larger_batch(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    train(config.replace(batch_size=4, accumulate=1), tmp_path / "run")
    losses = [
        [record["loss"] for record in metrics(run) if "loss" in record] for run in (tmp_path / "run", whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_a_bpe_and_taking_it_again(text: Path, config: TrainConfig, tmp_path: Path) -> None:
    display = Recorder()
    train(config.replace(tokenizer="bpe", vocab_size=280, steps=1), tmp_path / "one", display)
    assert display.lines[0].startswith("tokenizer  BPE of 280 tokens")
    again = config.replace(tokenizer=str(tmp_path / "one/model"), steps=1)
    train(again, tmp_path / "two")
    assert load(tmp_path / "two/model")[0].config.vocab_size == 280
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")


def test_training_goes_on_from_a_checkpoint(
    config: TrainConfig, whole: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    source, once, twice = tmp_path / "source", tmp_path / "once", tmp_path / "twice"
    shutil.copytree(whole / "model", source)
    usual = {
        name: getattr(TrainConfig(), name)
        for name in ("preset", "tokenizer", "model", "option", *config.sizes)
    }
    changes = {"pretrained": str(source), "steps": 8, "save_every": 2}
    display = Recorder()
    train(config.replace(**usual, **changes), once, display)
    assert any(str(source) in line for line in display.lines)
    losses = [record["loss"] for record in metrics(whole) if "loss" in record]
    assert metrics(once)[0]["loss"] < (losses[0] + losses[-1]) / 2  # not that of a new model
    model = load(once / "model")[0]
    assert model.config == load(source)[0].config
    done = cli("train", source / "config.json", "--out", tmp_path / "new", "--from", source, "--d-model", 3)
    assert done.code == 2
    assert "has its own d_model" in done.err
    assert not (tmp_path / "new").exists()
    shutil.rmtree(source)  # the run has what it needs
    shutil.copytree(once, twice)
    shutil.rmtree(twice / "model")
    shutil.rmtree(twice / "checkpoints/step-000008")
    resume(twice)
    assert_same(twice, once)


def test_fixed_parameters_have_no_moments(config: TrainConfig, tmp_path: Path) -> None:
    """The state matrix of an LSSL may stay as it is; such a run resumes too."""
    fixed = config.replace(model="lssl", d_state=None, option=("fixed=true",), steps=3, sample_every=0)
    train(fixed, tmp_path / "whole")
    train(fixed.replace(steps=2), tmp_path / "run")
    resume(tmp_path / "run", {"steps": 3})
    moments = load_tensors(tmp_path / "run" / "checkpoints" / "step-000003" / "optimizer.safetensors")
    assert moments
    assert not [name for name in moments if ".A." in name or name.endswith(".A")]


def test_few_documents_teach_how_a_text_begins(config: TrainConfig, whole: Path) -> None:
    seen: list[torch.Tensor] = []
    run = importlib.import_module("longscan.training.language_model").LanguageRun(whole, config, Display())
    run.metrics.close()
    seen = [ids[:, 0] for step in range(8) for (ids, _), _ in run.batch(step)]
    assert (torch.cat(seen) == 256).nonzero()[:, 0].tolist() == [0, 16]


# Longer runs


def rates(directory: Path) -> list[float]:
    return [record["lr"] for record in metrics(directory) if "lr" in record]


@pytest.mark.parametrize("changes", [{"steps": 12}, {"epochs": 1.0}], ids=["steps", "epochs"])
def test_a_finished_run_becomes_longer(
    changes: dict[str, Any], config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    run, display = tmp_path / "run", Recorder()
    shutil.copytree(whole, run)
    result = resume(run, changes, display)
    total = result.total
    assert result.step == total > 8
    assert rates(run)[:8] == rates(whole)
    now = [learning_rate(config, step, total) for step in range(8, total)]
    assert rates(run)[8:] == pytest.approx(now)
    [line] = [line for line in display.lines if line.startswith("extended")]
    assert line == (
        f"extended   {total} steps instead of 8: the learning rate goes from {rates(whole)[-1]:.2g} "
        f"to {now[0]:.2g}, as in a run of {total} steps"
    )
    assert resume(run).total == total  # which it remembers
    assert resume(run, {"steps": total}).total == total
    assert resume(run).total == total


def test_a_longer_run_goes_on_bit_for_bit_wherever_it_stops(whole: Path, tmp_path: Path) -> None:
    for name in ("once", "stopped"):
        shutil.copytree(whole, tmp_path / name)
    resume(tmp_path / "once", {"steps": 14})
    resume(tmp_path / "stopped", {"steps": 14}, Recorder(11, interrupt(signal.SIGTERM)))
    shutil.rmtree(max((tmp_path / "stopped/checkpoints").iterdir()))
    resume(tmp_path / "stopped")
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("once", "stopped"))
    assert one.read_bytes() == other.read_bytes()
    assert metrics(tmp_path / "once") == metrics(tmp_path / "stopped")


def test_a_longer_run_whose_newest_checkpoint_is_lost_repeats_the_old_schedule(
    whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    resume(run, {"steps": 10}, Recorder(9, interrupt(signal.SIGTERM)))
    for step in (8, 9):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    shutil.copytree(whole / "checkpoints/step-000006", run / "checkpoints/step-000006")
    resume(run)
    assert rates(run)[:8] == rates(whole)
    assert len(rates(run)) == 10


def test_a_run_never_becomes_shorter(cli: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    done = cli("train", "--resume", run, "--steps", 7)
    assert done.code == 2
    assert "--steps: expected at least the 8 steps of the run, got 7." in done.err
    assert_same(run, whole)
    done = cli("train", "--resume", run, "--steps", 9)
    assert done.code == 0, done.err
    assert done.out.startswith("trained 9 steps · ")


def test_a_finished_run_has_nothing_left_to_do(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    assert resume(tmp_path / "run").step == 8
    assert_same(tmp_path / "run", whole)


def test_a_damaged_checkpoint_is_passed_over(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    weights = run / "checkpoints/step-000008/model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    display = Recorder()
    resume(run, display=display)
    assert any("skipping" in line and "step-000008" in line for line in display.lines)
    assert_same(run, whole)
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    with pytest.raises(LongscanError, match=r"no checkpoint in .* is intact"):
        resume(run)
    assert len(list(run.glob("checkpoints/*"))) == 2  # nothing is thrown away


def test_a_full_disk(
    config: TrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("longscan.training.trainer")
    write = module.save_file

    def fail(tensors: dict[str, torch.Tensor], path: Path, **extra: Any) -> None:
        if "step-000004" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(tensors, path, **extra)

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(
        LongscanError, match=r"(?s)No space left.*last intact checkpoint is .*step-000002.*--resume"
    ):
        train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run(config: TrainConfig, tmp_path: Path, what: str) -> None:
    class Poisoned(LanguageRun):
        def loss(self, model: Any, part: tuple[torch.Tensor, int]) -> torch.Tensor:
            weight = model.backbone.norm_f.weight
            if self.trainer.step_number == 5 and what == "loss":
                weight.data.fill_(math.nan)
            elif self.trainer.step_number == 5:
                weight.register_hook(lambda gradient: gradient * math.inf)
            return super().loss(model, part)

    with pytest.raises(LongscanError, match=rf"(?s){what}.* step 6 .*last intact .*step-000004.*lower --lr"):
        Poisoned.begin(config, tmp_path / "run", figures=False)
    assert metrics(tmp_path / "run")[-1]["step"] == 5
    weights = load_tensors(tmp_path / "run/checkpoints/step-000004/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_what_may_change_when_resuming_and_what_may_not(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(UsageError, match=r"^lr cannot change"):
        resume(run, {"lr": 1.0})
    resume(run, {"eval_every": 1, "threads": 1})
    settings = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps({**settings, "seed": 5}))
    with pytest.raises(LongscanError, match=r"seed cannot change .*step-000008"):
        resume(run)


def test_a_run_of_another_verb_names_it(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    settings = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps({**settings, "verb": "juggle"}))
    with pytest.raises(LongscanError, match=rf"another verb. Resume it with: longscan juggle --resume {run}"):
        resume(run)


def test_other_data_is_noticed(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train(config.replace(valid_fraction=0.2, steps=1), tmp_path / "other")
    shutil.rmtree(run / "data")
    shutil.copytree(tmp_path / "other/data", run / "data")
    with pytest.raises(LongscanError, match=r"is not what .* was trained on"):
        resume(run)


def test_checkpoints_of_another_version_are_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(state.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(LongscanError, match="step-000008: expected a checkpoint of format 2, got 1"):
        resume(run)


# The command


def test_command(cli: Callable[..., Any], text: Path, whole: Path, tmp_path: Path) -> None:
    done = cli("train", text, "--out", tmp_path / "run", *FLAGS)
    assert done.code == 0, done.err
    assert f"longscan generate --model {tmp_path / 'run/model'}" in done.out
    assert "step 8/8  loss" in done.err
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_command_stops_and_goes_on(
    cli: Callable[..., Any], text: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    with ctrl_c("stderr", "step 5/8", number=number):
        done = cli("train", text, "--out", run, *FLAGS, "--log-every", 1)
    assert done.code == 128 + number  # not 0, or `train && evaluate` would go on
    assert done.err.endswith(f"stopped after step 5; continue with: longscan train --resume {run}\n")
    assert cli("train", "--resume", run).code == 0
    assert_same(run, whole)


def test_a_run_has_one_process(cli: Callable[..., Any], text: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with lock(run):
        for arguments in ((text, "--out", run), ("--resume", run)):
            done = cli("train", *arguments)
            assert done.code == 1
            assert f"process {os.getpid()} is training there" in done.err
    done = cli("train", text, "--out", run)
    assert done.code == 1
    assert f"longscan train --resume {run}" in done.err
    assert_same(run, whole)


# Granite's layout has an MLP in every layer; what it can't hold must not be trained first
UNSAVED = (
    "--tokenizer bytes --model hybrid --preset granite-4.0-h-tiny --n-heads 4 --d-ff 64 --d-state 16 "
    "--d-model 32 --set n_kv_heads=2 --set d_ssm_head=16 --set pattern=MM*M"
)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{text}"], 2, "--out"),
        (["{text}", "--out", "{new}", "--resume", "{new}"], 2, "either"),
        (["--out", "{new}"], 2, "nothing to train on"),
        (["{text}", "--out", "{full}"], 1, "not empty"),
        (["{text}", "--out", "{text}"], 1, "Not a directory"),
        (["{text}", "--out", "{text}/run"], 1, "Not a directory"),
        (["--resume", "{full}"], 1, "no run to resume"),
        (["--resume", "{new}"], 1, "no run to resume"),
        (["--resume", "{new}", "--config", "{text}"], 2, "--config"),
        (["{text}", "--out", "{new}", "--config", "{new}.toml"], 1, "No such file"),
        (["{text}", "--out", "{new}", "--model", "momba"], 2, "did you mean 'mamba'"),
        (["{text}", "--out", "{new}", "--preset", "tinny"], 2, "did you mean 'tiny'"),
        (["{text}", "--out", "{new}", "--device", "abacus"], 2, "--device abacus"),
        (["{text}", "--out", "{new}", "--lr", "0"], 2, "--lr: expected more than 0"),
        (["{text}", "--out", "{new}", "--tokenizer", "{full}"], 1, "no tokenizer in"),
        (["{text}", "--out", "{new}", "--vocab-size", "20"], 2, "vocab_size"),
        (["{text}.gone", "--out", "{new}"], 1, "no such file"),
        (["{empty}", "--out", "{new}"], 1, "no text in"),
        (["{binary}", "--out", "{new}"], 1, "NUL"),
        (["{latin}", "--out", "{new}"], 1, "not UTF-8"),
        (["{short}", "--out", "{new}", "--tokenizer", "bytes"], 1, "one sequence needs"),
        (["{text}", "--out", "{new}", "--model", "jamba"], 2, "--model hybrid --preset jamba-v0.1"),
        (["{text}", "--out", "{new}", *UNSAVED.split()], 1, "--set family=own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(
    cli: Callable[..., Any], text: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("x")
    contents = {"empty": b"", "binary": b"a\0b", "latin": "café".encode("latin-1"), "short": b"ab\n"}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    places = {name: tmp_path / f"{name}.txt" for name in contents}
    places |= {"text": text, "new": tmp_path / "new", "full": tmp_path / "full"}
    done = cli("train", *(argument.format(**places) for argument in arguments))
    assert done.code == code, done.err
    assert done.err.startswith("error: ") or "\nerror: " in done.err
    assert words in done.err
    assert not (tmp_path / "new").exists()  # the same command, put right, can be given again
    assert (tmp_path / "full/precious").read_text() == "x"


# What the user sees


def test_without_matplotlib_there_is_one_word(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    display = Recorder()
    train_with_figures(config, tmp_path / "run", display)
    assert [line for line in display.lines if "matplotlib" in line] == [
        "no loss.png: figures need matplotlib: pip install 'longscan[plot]'"
    ]
    assert not (tmp_path / "run/loss.png").exists()
