"""Tasks of lm-evaluation-harness: on our adapter, and on the harness's own backend. Runs in the workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longscan.bench.worker import Run
from longscan.models import LanguageModel

__all__ = ["definition", "hf", "longscan"]

METRIC = {"endings": "acc", "passage": "acc", "last_word": "acc", "documents": "bits_per_byte"}


def longscan(directory: str, folder: str, tasks: list[str]) -> Run:
    """Prepare tasks on our adapter.

    Args:
        directory: of the model.
        folder: of the tasks.
        tasks: their names.
    """
    _offline()
    from longscan.checkpoints.load import load_with_tokenizer
    from longscan.evaluation.lm_eval import adapter

    model, tokenizer = load_with_tokenizer(directory, None, False)
    return _running(adapter(model, tokenizer), folder, tasks)


def hf(directory: str, folder: str, tasks: list[str], batch_size: int) -> Run:
    """Prepare tasks on the harness's backend `hf`: transformers, in float32 on the CPU.

    Args:
        directory: of the model.
        folder: of the tasks.
        tasks: their names.
        batch_size: requests at a time.
    """
    _offline()
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=batch_size)
    return _running(lm, folder, tasks)


def definition(directory: str, folder: str, tasks: list[str]) -> Run:
    """Prepare tasks by the definition, to judge the others: float64, one pass over each whole request.

    Args:
        directory: of the model.
        folder: of the tasks.
        tasks: their names.
    """
    _offline()
    from longscan.checkpoints.load import load
    from longscan.evaluation.lm_eval import adapter

    model, tokenizer = load(directory, dtype=torch.float64, offline=True)
    assert tokenizer is not None
    lm, size = adapter(model, tokenizer), tokenizer.vocab_size

    def tokens(requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return [_defined(model, context, answer, size) for _, context, answer in requests]

    def rolling(requests: Any, **_: Any) -> list[float]:
        texts = [tokenizer.encode(request.args[0]) for request in requests]
        return [_defined(model, [lm.eot_token_id], text, size)[0] for text in texts]

    lm._loglikelihood_tokens, lm.loglikelihood_rolling = tokens, rolling
    return _running(lm, folder, tasks)


@torch.inference_mode()
def _defined(
    model: LanguageModel, context: Sequence[int], answer: Sequence[int], vocab_size: int
) -> tuple[float, bool]:
    """Return the log-likelihood of an answer, and whether each of its tokens is the most likely one."""
    logits = model(torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1, :vocab_size]
    logprobs, expected = logits.log_softmax(-1), torch.tensor(answer)
    return float(logprobs.gather(1, expected[:, None]).sum()), bool((logprobs.argmax(-1) == expected).all())


def _running(lm: Any, folder: str, tasks: list[str]) -> Run:
    """Return what runs the tasks one after the other through the harness.

    Timed is the backend alone, from requests to answers; the harness around it is the same for all.

    Args:
        lm: a backend.
        folder: of the tasks.
        tasks: their names.

    Returns:
        A run with the details "tasks": name -> the seconds of each run so far, log-likelihoods, greedy flags,
        and the value of the metric.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=folder, include_defaults=False)
    loaded = {task: get_task_dict([task], manager) for task in tasks}
    seen: list[tuple[float, list[Any]]] = []
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        setattr(lm, kind, _timed(getattr(lm, kind), seen))
    found: dict[str, dict[str, Any]] = {task: {"seconds": []} for task in tasks}

    def run() -> dict[str, Any]:
        for task in tasks:
            seen.clear()
            results = evaluate(lm, loaded[task], bootstrap_iters=0)
            ((seconds, answers),) = seen
            pairs = [one if isinstance(one, tuple) else (one, False) for one in answers]
            found[task]["seconds"].append(seconds)
            found[task]["logprobs"] = [float(logprob) for logprob, _ in pairs]
            found[task]["greedy"] = [bool(greedy) for _, greedy in pairs]
            found[task]["value"] = float(results["results"][task][f"{METRIC[task]},none"])
        return {"seconds": sum(one["seconds"][-1] for one in found.values()), "tasks": found}

    return run


def _timed(answer: Callable[..., list[Any]], seen: list[tuple[float, list[Any]]]) -> Callable[..., list[Any]]:
    """Return a function that notes how long another one takes and what it returns."""

    def timed(*args: Any, **more: Any) -> list[Any]:
        begin = time.perf_counter()
        answers = answer(*args, **more)
        seen.append((time.perf_counter() - begin, answers))
        return answers

    return timed


def _offline() -> None:
    """Make the harness use no network and no progress bars."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE")
    os.environ.update(dict.fromkeys(names, "1"))
