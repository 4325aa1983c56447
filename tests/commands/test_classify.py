"""Classifying texts: the run, the verbs, and what may be wrong with the data."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longscan.checkpoints.load import load, load_bert
from longscan.checkpoints.save import save
from longscan.data.labeled_texts import read_examples
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.bleu import score as bleu_score
from longscan.evaluation.classification import score, tfidf
from longscan.evaluation.perplexity import evaluate
from longscan.inference.bert import embed, fill_mask, predict
from longscan.inference.generate import generate
from longscan.inference.prefill import encode
from longscan.models import Bert, BertConfig, Mamba, MambaConfig
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.wordpiece import train_wordpiece
from longscan.training.text_classifier import ClassifyConfig, ClassifyRun
from stand_ins import PowerCut

GOOD, BAD = "a fine warm lovely film", "a poor cold dreadful film"
ROWS = [("good", f"{GOOD} number {n}") for n in range(20)] + [("bad", f"{BAD} number {n}") for n in range(20)]
TOKENIZER = train_wordpiece([text for _, text in ROWS] * 2, 150)
SIZES: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 32, "init_std": 0.1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint without heads."""
    directory = tmp_path_factory.mktemp("bert") / "model"
    config = BertConfig.from_dict({**SIZES, "vocab_size": TOKENIZER.vocab_size, "head": "none"})
    save(Bert(config, torch.Generator().manual_seed(0)), directory, TOKENIZER)
    return directory


def table(path: Path, rows: list[tuple[str, ...]] = ROWS) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> ClassifyConfig:
    data = table(tmp_path_factory.mktemp("data") / "train.tsv")
    return ClassifyConfig.from_dict(
        {
            "data": [str(data)],
            "model": str(bert),
            "steps": 24,
            "batch_size": 8,
            "accumulate": 2,
            "lr": 2e-2,
            "seq_len": 16,
            "save_every": 4,
            "eval_every": 8,
            "threads": 1,
        }
    )


@pytest.fixture(scope="module")
def whole(config: ClassifyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    result = ClassifyRun.begin(config, directory)
    assert (result.step, result.total, result.stopped_by) == (24, 24, None)
    return directory


def metrics(directory: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


# the run


def test_it_learns(whole: Path) -> None:
    [*_, last] = [record for record in metrics(whole) if "valid_accuracy" in record]
    assert (last["step"], last["valid_accuracy"], last["valid_macro_f1"]) == (24, 1.0, 1.0)
    assert last["valid_loss"] < 0.2
    found = load(whole / "model", "classifier")
    assert found.model.config.labels == ("bad", "good")
    framed = found.tokenizer.frame_batch([BAD, GOOD])
    assert predict(found.model, found.tokenizer, framed).argmax(1).tolist() == [0, 1]


def test_transformers_says_the_same(whole: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = load(whole / "model", "classifier")
    framed = found.tokenizer.frame_batch([BAD, GOOD, "film"])
    ours = predict(found.model, found.tokenizer, framed)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(whole / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "model")
    theirs = peer(**tokenizer([BAD, GOOD, "film"], padding=True, return_tensors="pt")).logits
    assert (ours - theirs.log_softmax(-1)).abs().max() < 1e-5
    assert peer.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("after", [2, 4, 9])
def test_a_stopped_run_goes_on_bit_for_bit(
    after: int, config: ClassifyConfig, whole: Path, tmp_path: Path
) -> None:
    data = (str(table(tmp_path / "gone.tsv")),)
    with pytest.raises(LongscanError, match=r"the power is gone(?s:.*)classify train --resume"):
        ClassifyRun.begin(config.replace(data=data), tmp_path / "run", PowerCut(after))
    (tmp_path / "gone.tsv").unlink()  # the run has its own copy
    assert ClassifyRun.resume(tmp_path / "run").step == 24
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_step_in_parts_is_the_whole_step(config: ClassifyConfig, bert: Path, tmp_path: Path) -> None:
    text = json.loads((bert / "config.json").read_text())
    still = tmp_path / "bert"
    shutil.copytree(bert, still)
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps({**text, **dropouts}))
    losses = []
    for batch_size, accumulate in (
        (21, 1),
        (7, 3),
        (1, 21),
    ):  # 36 texts: the second step has 15, parts of 7, 7, 1
        changed = config.replace(model=str(still), batch_size=batch_size, accumulate=accumulate, steps=2)
        ClassifyRun.begin(changed, tmp_path / str(batch_size), figures=False)
        losses.append([record["loss"] for record in metrics(tmp_path / str(batch_size))[:2]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_changed_start_is_noticed(config: ClassifyConfig, whole: Path, tmp_path: Path) -> None:
    ClassifyRun.begin(config.replace(steps=4), tmp_path / "run")
    file = tmp_path / "run" / "start" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(LongscanError, match="is not what"):
        ClassifyRun.resume(tmp_path / "run")


def test_what_is_fresh_is_told(cli: Any, config: ClassifyConfig, bert: Path, tmp_path: Path) -> None:
    done = cli(
        *("classify", "train", config.data[0], "--model", bert, "--out", tmp_path / "run"),
        *("--steps", 1, "--seq-len", 8, "--batch-size", 4),
    )
    assert done.code == 0
    assert "new        classifier: not in" in done.err
    assert done.out.startswith("trained 1 step · accuracy ")
    assert "36 texts of 2 classes, 36 cut at 8 tokens, 4 held out" in done.err
    assert "longscan classify predict" in done.out


# the verbs


def test_evaluate_and_predict(cli: Any, whole: Path, tmp_path: Path) -> None:
    model = whole / "model"
    rows = [("good", GOOD), ("good", GOOD), ("bad", BAD), ("good", BAD)]
    done = cli("classify", "evaluate", model, table(tmp_path / "test.tsv", rows))
    assert done.code == 0
    assert done.out.splitlines()[0] == "accuracy 0.7500 · macro-F1 0.7333 · 4 texts"
    report = json.loads(cli("classify", "evaluate", model, tmp_path / "test.tsv", "--json").out)
    assert (report["accuracy"], report["texts"]) == (0.75, 4)
    assert report["classes"]["good"] == {
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
        "texts": 3,
    }
    lines = [
        line.split("\t")
        for line in cli("classify", "predict", model, stdin=f"{GOOD}\n{BAD}\n").out.splitlines()
    ]
    assert [(label, text) for label, _, text in lines] == [("good", GOOD), ("bad", BAD)]
    assert all(0.5 < float(share) <= 1 for _, share, _ in lines)
    shown = json.loads(cli("classify", "predict", model, GOOD, "--json").out)
    assert shown["label"] == "good"
    assert sum(shown["probabilities"].values()) == pytest.approx(1)
    assert cli("classify", "predict", model, stdin="").out == ""


def test_texts_that_are_cut_are_counted(cli: Any, whole: Path) -> None:
    done = cli("classify", "predict", whole / "model", "film " * 40, "film")
    assert (done.code, len(done.out.splitlines())) == (0, 2)
    assert "1 of 2 texts was cut at 32 tokens" in done.err
    done = cli("classify", "predict", whole / "model", "film " * 9, "--seq-len", 8)
    assert "1 of 1 text was cut at 8 tokens" in done.err


def test_pairs(cli: Any, bert: Path, tmp_path: Path) -> None:
    """Whether the second text is the first one's: nothing in either alone tells."""
    rows = [("yes", text, text) for _, text in ROWS] + [("no", GOOD, BAD), ("no", BAD, GOOD)] * 10
    data = table(tmp_path / "pairs.tsv", rows)
    flags = ("--model", bert, "--out", tmp_path / "run", "--steps", 2, "--seq-len", 32, "--columns", "1,2,3")
    assert cli("classify", "train", data, *flags).code == 0
    model = tmp_path / "run" / "model"
    assert cli("classify", "evaluate", model, data, "--columns", "1,2,3").code == 0
    assert cli("classify", "predict", model, "--pairs", f"{GOOD}\t{BAD}").out.startswith(("yes\t", "no\t"))
    done = cli("classify", "predict", model, "--pairs", GOOD)
    assert (done.code, done.out) == (1, "")
    assert "text 1: expected two texts separated by a tab, got 1" in done.err


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_the_baseline(cli: Any, whole: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "all.tsv")
    examples = read_examples([data])
    answers = tfidf(examples, examples, ("bad", "good"))
    assert score([int(e.label == "good") for e in examples], answers).accuracy == 1.0
    done = cli("classify", "evaluate", whole / "model", data, "--baseline", data)
    assert done.out.splitlines()[1] == "accuracy 1.0000 · macro-F1 1.0000 · TF-IDF + logistic regression"


# bad data


def bare(path: Path) -> None:
    table(path, [("good",)])


def ragged(path: Path) -> None:
    table(path, [("good", GOOD), ("bad", BAD, "more")])


def empty(path: Path) -> None:
    path.write_text("\n\n")


def no_label(path: Path) -> None:
    table(path, [("good", GOOD), (" ", BAD)])


def no_text(path: Path) -> None:
    table(path, [("good", GOOD), ("bad", "  ")])


def one_class(path: Path) -> None:
    table(path, [("good", GOOD), ("good", BAD)])


def not_utf8(path: Path) -> None:
    path.write_bytes(b"good\t\xff\xfe\n")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (bare, "1: expected at least 2 columns separated by tabs, got 1"),
        (ragged, "2: expected 2 columns as in the rows before, got 3"),
        (empty, "no examples"),
        (no_label, "2: expected a label and a text, got an empty one"),
        (no_text, "2: expected a label and a text, got an empty one"),
        (one_class, "1: expected two classes or more, all are 'good'"),
        (not_utf8, "not UTF-8"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_tables(cli: Any, bert: Path, tmp_path: Path, write: Any, words: str) -> None:
    write(tmp_path / "data.tsv")
    done = cli("classify", "train", tmp_path / "data.tsv", "--model", bert, "--out", tmp_path / "run")
    assert (done.code, done.out) == (1, "")
    assert words in done.err
    assert str(tmp_path / "data.tsv") in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"label": "a"}',
        '{"text": "a"}',
        '{"label": null, "text": "a"}',
        '{"label": "a", "text": 3}',
    ],
)
def test_bad_json_lines(line: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(f'{{"label": "a", "text": "b"}}\n{line}\n')
    with pytest.raises(LongscanError, match=r"data\.jsonl:2: "):
        read_examples([tmp_path / "data.jsonl"])


def test_labels_unseen_in_training(cli: Any, whole: Path, bert: Path, tmp_path: Path) -> None:
    known, other = (
        table(tmp_path / "known.tsv"),
        table(tmp_path / "other.tsv", [("good", GOOD), ("fair", BAD)]),
    )
    flags = ("--model", bert, "--out", tmp_path / "run", "--valid", other)
    for done in (
        cli("classify", "evaluate", whole / "model", other),
        cli("classify", "train", known, *flags),
    ):
        assert (done.code, done.out) == (1, "")
        assert "other.tsv:2: the label 'fair' was not in the training data, which had bad, good" in done.err
    assert not (tmp_path / "run").exists()


def test_misuse(cli: Any, whole: Path, bert: Path, tmp_path: Path) -> None:
    data, model, out = table(tmp_path / "data.tsv"), ("--model", bert), ("--out", tmp_path / "run")
    for code, words, arguments in (
        (2, "--model: expected a BERT's directory or hub id for texts, or", ("train", data, *out)),
        (2, "nothing to train on", ("train", *model, *out)),
        (2, "at most the 32 positions", ("train", data, *model, *out)),
        (2, "--columns", ("train", data, *model, *out, "--columns", "1")),
        (2, "columns: expected different numbers", ("evaluate", whole / "model", data, "--columns", "2,2")),
        (1, "no model called", ("train", data, "--model", "nothing", *out)),
        (1, "does not classify: its head is 'none'", ("predict", bert, "film")),
        (2, "--seq-len: expected 3 to 32", ("predict", whole / "model", "film", "--seq-len", 33)),
        (2, "--device nowhere", ("train", data, *model, *out, "--device", "nowhere")),
        (1, "no run to resume", ("train", "--resume", tmp_path / "nowhere")),
        (1, "is a run of another verb", ("train", "--resume", other_run(tmp_path))),
    ):
        done = cli("classify", *arguments)
        assert (done.code, done.out) == (code, ""), words
        assert words in done.err
        assert not (tmp_path / "run").exists()


def other_run(directory: Path) -> Path:
    place = directory / "other"
    place.mkdir(exist_ok=True)
    (place / "train.json").write_text('{"verb": "train"}')
    return place


def test_a_checkpoint_of_another_width(cli: Any, whole: Path, tmp_path: Path) -> None:
    loaded = load(whole / "model", "classifier")
    save(loaded.model, tmp_path / "wide", loaded.tokenizer)
    path = tmp_path / "wide" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 32}))
    done = cli("classify", "predict", tmp_path / "wide", "film")
    assert (done.code, done.out) == (1, "")
    assert "of another shape" in done.err


def test_one_text_is_no_list_of_texts(bert: Path) -> None:
    found = load_bert(bert)
    with pytest.raises(UsageError, match="texts: expected a list of texts, got one text, 'a fine film'"):
        embed(found, "a fine film")
    with pytest.raises(UsageError, match="rows: expected 1 or more"):
        embed(found, ["a"], rows=0)
    with pytest.raises(UsageError, match="texts: expected a list"):
        found.tokenizer.frame_batch("a fine film")
    with pytest.raises(UsageError, match="texts: expected a list"):
        encode(ByteTokenizer(), "abc")
    with pytest.raises(UsageError, match="texts: expected a list"):
        ByteTokenizer().encode_batch("abc")
    with pytest.raises(UsageError, match="text: expected one text, got list"):
        fill_mask(found, ["a [MASK]"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="hypotheses: expected a list"):
        bleu_score("a", ["a"])
    model = Mamba(MambaConfig(d_model=8, n_layers=1, vocab_size=257))
    with pytest.raises(UsageError, match="documents: expected a list of texts, got one text, 'some"):
        evaluate(model, ByteTokenizer(), "some text")
    with pytest.raises(UsageError, match="prompt: expected one text, got list"):
        generate(model, ByteTokenizer(), ["a"])  # type: ignore[arg-type]


def scorer(directory: Path, names: tuple[str, ...], **fields: Any) -> Path:
    """A classifier whose config.json says something of its outputs."""
    score = "sigmoid" if len(names) == 1 else "softmax"
    config = BertConfig.from_dict(
        {**SIZES, "vocab_size": TOKENIZER.vocab_size, "head": "classifier", "labels": names, "score": score}
    )
    save(Bert(config, torch.Generator().manual_seed(1)), directory, TOKENIZER)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **fields}))
    return directory


IDENTITY = "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("names", "fields", "function"),
    [
        (("LABEL_0",), {}, torch.sigmoid),
        (("LABEL_0",), {"problem_type": "regression"}, torch.clone),
        (("LABEL_0",), {"sentence_transformers": {"activation_fn": IDENTITY, "version": "5"}}, torch.clone),
        (("LABEL_0",), {"sbert_ce_default_activation_function": IDENTITY}, torch.clone),
        (("a", "b", "c"), {"problem_type": "multi_label_classification"}, torch.sigmoid),
        (("a", "b"), {"problem_type": "regression"}, torch.clone),
        (("a", "b"), {"problem_type": "single_label_classification"}, lambda x: x.softmax(-1)),
    ],
    ids=["one", "regression", "sentence-transformers", "older", "multi-label", "two-numbers", "classes"],
)
def test_scores_are_what_the_config_says(
    cli: Any, tmp_path: Path, names: tuple[str, ...], fields: dict[str, Any], function: Any
) -> None:
    directory = scorer(tmp_path / "model", names, **fields)
    found = load(directory, "classifier")
    ids, types = found.tokenizer.collate(found.tokenizer.frame_batch([GOOD]))
    with torch.no_grad():
        expected = function(found.model.classify(found.model(ids, types).pooled))[0]
    said = json.loads(cli("classify", "predict", directory, GOOD, "--json").out)
    scores = said.get("probabilities") or said["scores"]
    assert list(scores.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    label, number, text = cli("classify", "predict", directory, GOOD).out.rstrip().split("\t")
    assert text == GOOD
    for name, value in zip(label.split(","), number.split(","), strict=True):
        assert float(value) == pytest.approx(scores[name], abs=1e-4)
    assert number != "1.0000"
    save(found.model, tmp_path / "again", found.tokenizer)  # and it stays so
    assert load(tmp_path / "again", "classifier").model.config == found.model.config
    table(tmp_path / "test.tsv", [(names[0], GOOD)])
    done = cli("classify", "evaluate", directory, tmp_path / "test.tsv")
    assert done.code == (0 if found.model.config.score == "softmax" else 1)
    if done.code:
        assert "chooses no class" in done.err


@pytest.mark.parametrize(
    "fields", [{"problem_type": "ranking"}, {"sentence_transformers": {"activation_fn": "os.system"}}]
)
def test_scores_that_nobody_knows_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match="expected one of"):
        load(scorer(tmp_path / "model", ("LABEL_0",), **fields), "classifier")
