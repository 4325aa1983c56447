"""Fine-tuning: it learns what it should and nothing else, resumes bit for bit, and says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longscan.checkpoints.adapter import WEIGHTS
from longscan.checkpoints.load import load
from longscan.checkpoints.save import quantize, save
from longscan.core.files import read_json
from longscan.data.examples import collate, load_examples
from longscan.errors import LongscanError, UsageError
from longscan.inference.generate import generate_ids
from longscan.inference.sampling import SamplingConfig
from longscan.models import MODELS
from longscan.models.common.lora import adapted
from longscan.models.common.quantization import precision
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.chat import BUILT_IN, find_template
from longscan.training.finetune import FinetuneRun
from longscan.training.finetune_config import FULL_LR, FinetuneConfig
from longscan.training.footprint import Footprint, check_memory
from longscan.training.run_directory import write_settings
from tiny_runs import Recorder, metrics

Cli = Callable[..., Any]
FLAGS: dict[str, Any] = {
    "rank": 4,
    "seq_len": 96,
    "accumulate": 2,
    "steps": 8,
    "lr": 2e-2,
    "save_every": 2,
    "eval_every": 4,
    "samples": 1,
    "sample_tokens": 6,
    "threads": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing, of bytes."""
    entry = MODELS["mamba"]
    sizes = {"d_model": 32, "n_layers": 2, "d_state": 4, "vocab_size": 257}
    directory = tmp_path_factory.mktemp("base") / "model"
    save(
        entry.cls(entry.config.from_dict(sizes), torch.Generator().manual_seed(0)), directory, ByteTokenizer()
    )
    return directory


def chats(count: int) -> list[dict[str, Any]]:
    letters = "abcdefgh"
    pairs = [(letters[i % 8], letters[(i + 1) % 8].upper()) for i in range(count)]
    return [
        {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": b}]}
        for a, b in pairs
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats(40)))
    return file


@pytest.fixture(scope="module")
def config(base: Path, data: Path) -> FinetuneConfig:
    return FinetuneConfig.from_dict({**FLAGS, "model": str(base), "data": [str(data)]})


@pytest.fixture(scope="module")
def whole(config: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert FinetuneRun.begin(config, directory, figures=False).step == 8
    return directory


def losses(directory: Path) -> list[float]:
    return [record["valid_loss"] for record in metrics(directory) if "valid_loss" in record]


@pytest.mark.parametrize(("method", "share"), [("lora", 0.95), ("full", 0.6)])
def test_it_learns_and_says_so(method: str, share: float, config: FinetuneConfig, tmp_path: Path) -> None:
    seen = Recorder()
    FinetuneRun.begin(config.replace(method=method), tmp_path / "run", seen, figures=False)
    before, *_, after = losses(tmp_path / "run")
    assert before == pytest.approx(5.5, abs=0.3)  # a guess among 257
    assert after < share * before
    text = "\n".join(seen.lines)
    assert "38 conversations" in text
    assert ("LoRA of rank 4" in text) == (method == "lora")
    assert "memory     about" in text
    assert text.index("before     User: ") < text.index("after      User: ")


def test_only_the_adapter_is_saved_and_it_is_what_was_trained(
    base: Path, whole: Path, config: FinetuneConfig
) -> None:
    names = load_file(whole / "checkpoints" / "step-000008" / "model.safetensors")
    assert all("lora_" in name for name in names)
    assert (whole / "adapter" / WEIGHTS).is_file()
    assert not (whole / "model").exists()
    merged, _ = load(base, adapter=whole)
    run = FinetuneRun(whole, config, Recorder(), figures=False)  # resumes: the adapter beside the weights
    batch = collate(run.valid_rows)
    with torch.no_grad():
        found = merged(batch.ids, seq_idx=batch.seq_idx, labels=batch.labels).loss
    assert float(found) == pytest.approx(losses(whole)[-1], rel=1e-4)
    run.metrics.close()


class PowerCut(Recorder):
    def __init__(self, after: int) -> None:
        super().__init__(after, self.cut)

    def cut(self) -> None:
        raise LongscanError("the power is gone")


@pytest.mark.parametrize("after", [1, 3, 7])
@pytest.mark.parametrize("kind", ["lora", "full", "int8 with dropout"])
def test_a_stopped_run_goes_on_bit_for_bit(
    kind: str, after: int, config: FinetuneConfig, whole: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "lora": {},
        "full": {"method": "full"},
        "int8 with dropout": {"base_precision": "int8", "lora_dropout": 0.3, "checkpointing": True},
    }[kind]
    config = config.replace(**changes)
    weights = "model/model.safetensors" if kind == "full" else f"adapter/{WEIGHTS}"
    reference = whole
    if changes:
        reference = tmp_path / "whole"
        FinetuneRun.begin(config, reference, figures=False)
    with pytest.raises(LongscanError, match=r"the power is gone(?s:.*)finetune --resume"):
        FinetuneRun.begin(config, tmp_path / "run", PowerCut(after), figures=False)
    assert FinetuneRun.resume(tmp_path / "run", figures=False).step == 8
    assert (tmp_path / "run" / weights).read_bytes() == (reference / weights).read_bytes()
    assert metrics(tmp_path / "run") == metrics(reference)


def test_only_answers_are_learnt(config: FinetuneConfig, tmp_path: Path) -> None:
    run = prepared(tmp_path / "answers", config)
    decode = ByteTokenizer().decode
    for example in run.data.train:
        learnt = decode(example.ids[example.trained].tolist())
        assert len(learnt) == len(" A\n\nUser:")
        assert learnt[1].isupper()
        assert learnt.endswith("\n\nUser:")
    every = prepared(tmp_path / "all", config.replace(train_on="all"))
    assert all(example.trained.all() for example in every.data.train)


def prepared(directory: Path, config: FinetuneConfig) -> FinetuneRun:
    """A run whose first step is still to be done."""
    directory.mkdir()
    write_settings(directory, "finetune", config.to_dict())
    run = FinetuneRun(directory, config, Recorder(), figures=False)
    run.metrics.close()
    return run


def test_full_fine_tuning_has_a_lower_rate() -> None:
    assert FinetuneConfig.from_dict({"method": "full"}).lr == FULL_LR
    assert FinetuneConfig.from_dict({"method": "full", "lr": 1e-3}).lr == 1e-3
    assert FinetuneConfig.from_dict({}).lr == FinetuneConfig.lr
    with pytest.raises(UsageError, match="base_precision"):
        FinetuneConfig(method="full", base_precision="int8")


def test_a_quantised_base(config: FinetuneConfig, base: Path, tmp_path: Path) -> None:
    """All weights means all: they are dequantised; adapters stand beside them as they are."""
    quantize(base, tmp_path / "int8", "int8")
    stored = config.replace(model=str(tmp_path / "int8"), steps=2)
    seen = Recorder()
    FinetuneRun.begin(stored, tmp_path / "lora", seen, figures=False)
    assert "beside a base in int8" in "\n".join(seen.lines)
    FinetuneRun.begin(stored.replace(method="full"), tmp_path / "full", seen, figures=False)
    before, _ = load(tmp_path / "int8", precision="float32")
    after, _ = load(tmp_path / "full" / "model")
    assert precision(after) == "float32"
    for (name, ours), theirs in zip(after.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(ours, theirs), name


def test_targets(config: FinetuneConfig, tmp_path: Path) -> None:
    some = config.replace(target=["in_proj", "layers.1.mixer.x_proj"])
    run = prepared(tmp_path / "run", some)
    assert [name.removeprefix("backbone.layers.") for name, _ in adapted(run.model)] == [
        "0.mixer.in_proj",
        "1.mixer.in_proj",
        "1.mixer.x_proj",
    ]
    with pytest.raises(UsageError, match=r"out_project.*did you mean 'out_proj'"):
        prepared(tmp_path / "x", config.replace(target=["out_project"]))


def test_another_base_is_refused(config: FinetuneConfig, base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    fields = read_json(tmp_path / "run" / "train.json") | {"model": str(tmp_path / "base")}
    (tmp_path / "run" / "train.json").write_text(json.dumps(fields))
    model, _ = load(tmp_path / "base")
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(1.01)
    save(model, tmp_path / "base", ByteTokenizer())
    with pytest.raises(LongscanError, match="has other weights than when the run began"):
        FinetuneRun.resume(tmp_path / "run", {"steps": 9}, figures=False)


def test_bad_rows_are_named_or_left_out(config: FinetuneConfig, tmp_path: Path) -> None:
    rows = chats(20)
    rows[3] = {"messages": rows[3]["messages"][:1]}
    rows[7] = {"nothing": 1}
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    bad = config.replace(data=[str(file)])
    with pytest.raises(LongscanError) as caught:
        FinetuneRun.begin(bad, tmp_path / "run", figures=False)
    text = str(caught.value)
    assert text.startswith("3 rows can't be trained on:")
    for number in (4, 8, 21):
        assert f"{file}:{number}: " in text
    assert "--skip-invalid" in text
    assert not (tmp_path / "run").exists()
    seen = Recorder()
    FinetuneRun.begin(bad.replace(skip_invalid=True, steps=1), tmp_path / "run", seen, figures=False)
    assert "3 not valid, left out" in "\n".join(seen.lines)


def test_long_rows(config: FinetuneConfig, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    late = {"prompt": "x" * 200, "completion": "y"}
    long = {"prompt": "x", "completion": "y" * 200}
    file.write_text("".join(json.dumps(row) + "\n" for row in (late, long, *chats(6))))
    base = config.replace(data=[str(file)], steps=1, valid_fraction=0.0)
    seen = Recorder()
    FinetuneRun.begin(base, tmp_path / "cut", seen, figures=False)
    assert "1 cut, 1 left out" in "\n".join(seen.lines)
    seen = Recorder()
    FinetuneRun.begin(base.replace(too_long="skip"), tmp_path / "skip", seen, figures=False)
    assert "2 left out" in "\n".join(seen.lines)
    with pytest.raises(LongscanError, match=r"long.jsonl:1: expected at most --seq-len 96 tokens, got 20\d"):
        FinetuneRun.begin(base.replace(too_long="error"), tmp_path / "error", figures=False)
    file.write_text(json.dumps(late))
    with pytest.raises(LongscanError, match="nothing to learn"):
        FinetuneRun.begin(base, tmp_path / "nothing", figures=False)


def test_the_template_that_was_learnt_comes_along(config: FinetuneConfig, base: Path, tmp_path: Path) -> None:
    short = config.replace(steps=1, template="chatml")
    FinetuneRun.begin(short, tmp_path / "lora", figures=False)
    FinetuneRun.begin(short.replace(method="full"), tmp_path / "full", figures=False)
    for _, tokenizer in (load(base, adapter=tmp_path / "lora"), load(tmp_path / "full" / "model")):
        assert tokenizer is not None
        assert find_template(tokenizer).source == BUILT_IN["chatml"]
    FinetuneRun.begin(config.replace(steps=1), tmp_path / "plain", figures=False)
    _, tokenizer = load(base, adapter=tmp_path / "plain")
    assert tokenizer is not None
    assert find_template(tokenizer).name == "plain"


def test_damaged_data_of_a_run(config: FinetuneConfig, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "data" / "meta.json").write_text("{}")
    with pytest.raises(LongscanError, match=r"meta.json is damaged: it lacks conversations"):
        FinetuneRun.resume(tmp_path / "run", {"steps": 9}, figures=False)


def test_nothing_to_learn_says_why(config: FinetuneConfig, data: Path, tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match="all of it is in --valid"):
        FinetuneRun.begin(config.replace(valid=[str(data)]), tmp_path / "run", figures=False)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n')
    bad = config.replace(data=[str(tmp_path / "bad.jsonl")], skip_invalid=True)
    with pytest.raises(LongscanError, match=r"of 1 row.*1 not valid.(?s:.*)bad.jsonl:1: "):
        FinetuneRun.begin(bad, tmp_path / "run", figures=False)


def test_running_text_is_divided(config: FinetuneConfig, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("So it goes on. " * 40)
    text = config.replace(data=[str(tmp_path / "text.txt")], valid_fraction=0.0)
    run = prepared(tmp_path / "run", text)
    assert sum(one.learnt for one in run.data.train) == 15 * 40 + 1  # and the end of the text


def test_more_memory_than_there_is_is_refused() -> None:
    needs = Footprint(4 * 10**9, 10**9, 2 * 10**9)
    check_memory(needs, None)
    check_memory(needs, 10 * 10**9)
    with pytest.raises(
        LongscanError, match=r"a step takes about 8\.65 GB .* 9\.00 GB are available(?s:.*)--force"
    ):
        check_memory(needs, 9 * 10**9)


def test_the_verbs(cli: Cli, base: Path, data: Path, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("a? A. b? B. " * 20)
    flags = ("--rank", 4, "--lr", 2e-2, "--steps", 3, "--seq-len", 96, "--threads", 1, "--samples", 0)
    done = cli("finetune", base, data, "--out", run, *flags)
    assert done.code == 0, done.err
    assert done.out.endswith(f"try: longscan chat --model {base} --adapter {run}\n")
    assert "of held-out answers exact" in done.out
    assert cli("finetune", "--resume", run, "--steps", 4).code == 0
    for verb in (("generate", "a", "--model", base), ("evaluate", base, text)):
        plain, with_it = cli(*verb, "--threads", 1), cli(*verb, "--threads", 1, "--adapter", run)
        assert with_it.code == 0, with_it.err
        assert with_it.out != plain.out or verb[0] == "generate"
    asked = cli("chat", "--model", base, "--adapter", run, "--max-new-tokens", 4, stdin="a?")
    assert asked.code == 0, asked.err
    merged = tmp_path / "merged"
    done = cli("merge", base, run, merged)
    assert done.code == 0, done.err
    assert done.out.endswith(" parameters · float32 · with tokenizer\n")
    one, other = cli("evaluate", merged, text), cli("evaluate", base, text, "--adapter", run)
    assert one.out.rpartition(" · ")[0] == other.out.rpartition(" · ")[0]  # all but the speed
    assert cli("merge", base, run, merged).code == 1  # it exists
    assert cli("quantize", base, "--to", "int8", "--out", tmp_path / "int8").code == 0
    done = cli("merge", tmp_path / "int8", run, tmp_path / "again")
    assert done.code == 1
    assert "Merge into the original model" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "MODEL"),
        (("MODEL",), "expected a MODEL and its DATA"),
        (("MODEL", "DATA", "--rank", "0"), "--rank: expected 1 to 4,096"),
        (("MODEL", "DATA", "--alpha", "-1"), "--alpha"),
        (("MODEL", "DATA", "--template", "nothing"), "no chat template 'nothing'"),
        (("MODEL", "DATA", "--method", "full", "--base-precision", "int4"), "--base-precision"),
        (("MODEL", "nowhere.jsonl"), "no such file"),
        (("nowhere", "DATA"), "nowhere"),
        (("MODEL", "DATA", "--seq-len", "1"), "--seq-len: expected 2 or more"),
    ],
)
def test_misuse(
    arguments: tuple[str, ...], words: str, cli: Cli, base: Path, data: Path, tmp_path: Path
) -> None:
    named = {"MODEL": base, "DATA": data}
    done = cli("finetune", *(named.get(one, one) for one in arguments), "--out", tmp_path / "run")
    assert done.code in (1, 2)
    assert words in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_exact_answers_are_those_of_greedy_decoding(base: Path, tmp_path: Path) -> None:
    """What validation counts is what the model writes."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{letter}:", "completion": letter.upper()} for letter in "abcdefghij" * 3]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"method": "full", "steps": 30, "valid_fraction": 0.3}
    config = FinetuneConfig.from_dict({**FLAGS, **more, "model": str(base), "data": [str(file)]})
    run = tmp_path / "run"
    FinetuneRun.begin(config, run, figures=False)
    counted = [record["valid_exact"] for record in metrics(run) if "valid_exact" in record]
    assert counted[0] == 0
    assert counted[-1] > 0.3
    model, tokenizer = load(run / "model")
    assert tokenizer is not None
    held = load_examples(run / "data" / "valid.safetensors")
    right = 0
    for ids, trained in held:
        first = int(trained.argmax())
        greedy = SamplingConfig(max_new_tokens=8, temperature=0.0)
        events = generate_ids(model, [ids[:first].tolist()], greedy, eos_id=tokenizer.eos_ids)
        right += [event.token for event in events] == ids[first:].tolist()
    assert right / len(held) == counted[-1]
