"""Offline tasks for lm-evaluation-harness: made-up questions in the shapes of well-known ones.

`endings` is shaped like HellaSwag: a short context and four endings. `passage` has a long context and four
answers, `last_word` one short continuation, like LAMBADA, and `documents` is rolling: whole texts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longscan.inference.generate import generate_ids
from longscan.inference.sampling import SamplingConfig
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer

__all__ = ["CHOICES", "TASKS", "Counts", "english", "write"]

TASKS = ("endings", "passage", "last_word", "documents")
CHOICES = 4  # answers of a question
Text = Callable[[int, int], str]

ADJECTIVES = "old young tall quiet proud weary honest foolish gentle cruel bright dark narrow distant".split()
NOUNS = (
    "captain doctor sailor widow servant merchant soldier priest stranger daughter horse dog ship house "
    "garden letter lantern river mountain window bridge village carriage forest church table"
).split()
VERBS = "saw followed remembered left loved feared watched met helped crossed knew praised forgot".split()
PLACES = "beside behind near above before beyond under within".split()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many questions a task has, and how long they are, in words.

    Attributes:
        endings: questions of the task of this name; so the others.
        passage: questions.
        last_word: questions.
        documents: texts.
        context: words of the context of an ending and of a last word.
        ending: words of an ending.
        passage_words: words of a long context.
        answer: words of an answer to it.
        document: words of a text.
    """

    endings: int
    passage: int
    last_word: int
    documents: int
    context: int = 70
    ending: int = 25
    passage_words: int = 1000
    answer: int = 8
    document: int = 500

    def of(self, task: str) -> int:
        """Return the number of questions.

        Args:
            task: of TASKS.
        """
        counted: int = getattr(self, task)
        return counted


def english(n_words: int, seed: int) -> str:
    """Return English of a sort, which begins with a space.

    Args:
        n_words: its length.
        seed: of the choice.
    """
    draw, words = random.Random(seed), list[str]()

    def thing() -> str:
        return f"the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"

    while len(words) < n_words:
        sentence = f"{thing()} {draw.choice(VERBS)} {thing()} {draw.choice(PLACES)} {thing()}."
        words += sentence.capitalize().split()
    return "".join(f" {word}" for word in words[:n_words])


def write(model: LanguageModel, tokenizer: Tokenizer, text: Text, counts: Counts, folder: Path) -> None:
    """Write each task as a .yaml file and a .jsonl file.

    Args:
        model: continues every second context of `last_word` greedily, so that some answers are greedy.
        tokenizer: of the model.
        text: gives a text of n words by its seed; it begins with a space.
        counts: of the questions.
        folder: for the files.
    """
    draw = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for task, context, answer in (
        ("endings", counts.context, counts.ending),
        ("passage", counts.passage_words, counts.answer),
    ):
        for _ in range(counts.of(task)):
            choices = [text(answer, draw.getrandbits(32)) for _ in range(CHOICES)]
            context_text = text(context, draw.getrandbits(32)).strip()
            rows[task].append(
                {"context": context_text, "choices": choices, "answer": draw.randrange(CHOICES)}
            )
    contexts = [text(counts.context, draw.getrandbits(32)).strip() for _ in range(counts.last_word)]
    greedy = _continued(model, tokenizer, contexts[::2])
    for i, context_text in enumerate(contexts):
        word = (i % 2 == 0 and greedy[i // 2]) or text(1, draw.getrandbits(32))
        rows["last_word"].append({"context": context_text, "answer": word})
    rows["documents"] = [
        {"text": text(counts.document, draw.getrandbits(32)).strip()} for _ in range(counts.documents)
    ]
    for task, lines in rows.items():
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / f"{task}.yaml").write_text(_task(task, path), encoding="utf-8")


def _continued(model: LanguageModel, tokenizer: Tokenizer, contexts: Sequence[str]) -> list[str]:
    """Return the two tokens that the model finds most likely after each context, as text."""
    prompts = [tokenizer.encode(context) for context in contexts]
    config = SamplingConfig(max_new_tokens=2, temperature=0.0)
    texts = [""] * len(prompts)
    if prompts:
        for event in generate_ids(model, prompts, config, eos_id=tokenizer.eos_ids, tokenizer=tokenizer):
            texts[event.row] += event.text
    return texts


def _task(task: str, data: Path) -> str:
    """Return a task as the harness reads it; JSON is YAML."""
    fields: dict[str, Any] = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(data)},
            "cache_dir": str(data.parent / "cache"),
        },
        "validation_split": "validation",
        "target_delimiter": "",
    }
    if task in ("endings", "passage"):
        fields |= {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "metric_list": [{"metric": "acc"}],
        }
        fields |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    elif task == "last_word":
        fields |= {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
        }
        fields["metric_list"] = [{"metric": "acc"}]
    else:
        fields |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        fields["metric_list"] = [{"metric": "bits_per_byte"}]
    return json.dumps(fields, indent=2)
