"""Log-likelihoods of answers and minimal pairs, and the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import longscan
from longscan.errors import LongscanError
from longscan.evaluation.likelihood import Pair, compare_pairs, likelihoods, read_pairs
from longscan.inference.generate import generate_ids
from longscan.inference.prompt_scores import prompt_scores
from longscan.inference.sampling import SamplingConfig
from longscan.models import MODELS, LanguageModel
from longscan.tokenizers.base import ByteTokenizer

NAME = "longscan-tiny-en"


def tiny(name: str, **fields: Any) -> LanguageModel:
    entry = MODELS[name]
    config = entry.config.from_dict({**entry.presets["tiny"], "vocab_size": 257, **fields})
    return entry.cls(config, torch.Generator().manual_seed(0)).eval()


def alone(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: one pass over both."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, :, :257].double()
    logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
    target = torch.tensor(continuation, dtype=torch.long)
    values = logprobs.gather(1, target[:, None])[:, 0]
    return float(values.sum()), bool((logprobs.argmax(-1) == target).all())


@pytest.mark.parametrize("name", ["mamba", "llama", "mamba3", "lstm"])
def test_likelihoods_are_those_of_one_pass(name: str) -> None:
    model, g = tiny(name), torch.Generator().manual_seed(1)

    def text(n: int) -> list[int]:
        return torch.randint(0, 257, (n,), generator=g).tolist()

    shared, other = text(700), text(3)
    requests = [(shared, text(n)) for n in (1, 5, 2, 9)]
    requests += [(other, text(4)), ([256], text(1)), (other, []), ([*shared[:600], 7], text(3))]
    best = model(torch.tensor([other])).logits[0, -1, :257].argmax()
    requests += [(other, [int(best)]), *((other, text(2)) for _ in range(40))]  # more than a batch
    got = likelihoods(model, requests, 257)
    for (context, continuation), found in zip(requests, got, strict=True):
        expected = alone(model, context, continuation)
        assert found.logprob == pytest.approx(expected[0], abs=1e-4)
        assert found.greedy == expected[1]
    assert got[8].greedy


def test_likelihoods_refuse_what_is_none() -> None:
    model = tiny("mamba")
    with pytest.raises(LongscanError, match="a context is empty"):
        likelihoods(model, [([], [1])], 257)
    for wrong in (-1, 257):
        with pytest.raises(LongscanError, match=f"got {wrong}"):
            likelihoods(model, [([1], [2, wrong])], 257)
        with pytest.raises(LongscanError, match=f"got {wrong}"):
            list(prompt_scores(model, [1, wrong], 0, 257))


def test_pairs_by_kind() -> None:
    model, tokenizer = tiny("mamba"), ByteTokenizer()
    pairs = [Pair("ab", "ba", "x"), Pair("cd", "dc", "x"), Pair("ef", "ef", "y"), Pair("gh", "hg")]
    expected = [
        alone(model, [256], tokenizer.encode(p.good))[0] > alone(model, [256], tokenizer.encode(p.bad))[0]
        for p in pairs
    ]
    found = {one.kind: (one.right, one.total) for one in compare_pairs(model, tokenizer, pairs)}
    assert found == {
        "of no kind": (expected[3], 1),
        "x": (expected[0] + expected[1], 2),
        "y": (0, 1),  # a tie is no preference
        "all": (sum(expected), 4),
    }


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"good": "x"}', '{"good": "x", "bad": ""}', '{"good": 1, "bad": "x"}']
)
def test_bad_pairs(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"sentence_good": "a", "sentence_bad": "b", "UID": "kind"}\n\n' + line)
    with pytest.raises(LongscanError, match=r"line 3: expected"):
        read_pairs(path)


def test_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(LongscanError, match="got none"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_the_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"good": "The king is dead.", "bad": "The king are dead."}\n')
    done = cli("evaluate", NAME, "--pairs", path, "--json", "--quiet")
    assert json.loads(done.out) == {"all": {"accuracy": 1.0, "pairs": 1}}
    assert "100.0 %  1 of 1" in cli("evaluate", NAME, "--pairs", path).out
    for args in (
        (),
        ("--pairs", path, path),
        ("--limit", 3, path),
        ("--tasks", "x", "--limit", 0),
        ("--pairs", path, "--per-file"),
    ):
        assert cli("evaluate", NAME, *args).code == 2


# lm-evaluation-harness


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an offline task of each kind."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    pytest.importorskip("lm_eval")
    rows = [
        {"q": f"{a}. Enter the {b}. Who is it?", "choices": [f" The {b}.", " The ghost of my father.", " I."]}
        for a in ("Scene", "A room")
        for b in ("king", "queen", "fool")
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {tmp_path / 'data.jsonl'}\n"
        "validation_split: validation\n"
    )
    question = 'doc_to_text: "{{q}}"\ntarget_delimiter: ""\n'
    kinds = {
        "who": question + 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: 0\n'
        "metric_list:\n  - metric: acc\n",
        "say": question + 'output_type: generate_until\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n',
        "roll": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n",
    }
    for name, fields in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{shared}{fields}")
    return tmp_path


def test_tasks_give_what_the_model_gives(tasks: Path) -> None:
    from longscan.evaluation.lm_eval import run_tasks

    model, tokenizer = longscan.load(NAME)
    assert tokenizer is not None
    found = run_tasks(model, tokenizer, ["who", "say", "roll"], include=tasks)
    for sample in found["samples"]["who"]:
        context = tokenizer.encode(sample["doc"]["q"])
        for choice, (logprob, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            with torch.no_grad():
                ids = tokenizer.encode(sample["doc"]["q"] + choice)
                logprobs = model(torch.tensor([ids])).logits[0, :, : tokenizer.vocab_size].log_softmax(-1)
            n = len(context)
            expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(n, len(ids)))
            assert float(logprob) == pytest.approx(expected, abs=1e-3)
    assert 0 <= found["results"]["who"]["acc,none"] <= 1
    texts = [sample["filtered_resps"][0] for sample in found["samples"]["say"]]
    assert not any("\n" in text for text in texts)
    greedy = SamplingConfig(max_new_tokens=12, temperature=0, stop=("\n",))
    prompts = [tokenizer.encode(sample["doc"]["q"]) for sample in found["samples"]["say"]]
    again = [""] * len(prompts)
    for event in generate_ids(model, prompts, greedy, eos_id=tokenizer.eos_id, tokenizer=tokenizer):
        again[event.row] += event.text
    assert texts == again
    docs = [sample["doc"]["q"] for sample in found["samples"]["roll"]]
    bits = [-alone_bits(model, tokenizer, doc) for doc in docs]
    expected = sum(bits) / sum(len(doc.encode()) for doc in docs)
    assert found["results"]["roll"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def alone_bits(model: LanguageModel, tokenizer: Any, text: str) -> float:
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1, : tokenizer.vocab_size].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum()) / 0.6931471805599453


def test_unknown_tasks(tasks: Path, cli: Callable[..., Any]) -> None:
    done = cli("evaluate", NAME, "--tasks", "nothing", "--include", tasks)
    assert done.code == 2
    assert "no task 'nothing'" in done.err
    assert cli("evaluate", NAME, "--tasks", ",", "--include", tasks).code == 2
    (tasks / "broken.yaml").write_text("task: [\n")
    done = cli("evaluate", NAME, "--tasks", tasks / "broken.yaml")
    assert done.code == 1
    assert "lm-eval failed" in done.err
    assert "bug in longscan" not in done.err
    (tasks / "broken.yaml").unlink()
    done = cli("evaluate", NAME, "--tasks", "who", "--include", tasks, "--limit", 2, "--quiet")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split()[:2] == ["who", "acc"]
    assert done.out.splitlines()[1].split()[-1] == "2"
