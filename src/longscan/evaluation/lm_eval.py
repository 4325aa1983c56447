"""Tasks of lm-evaluation-harness, on a model of this package.

A context is prefilled once and its state forked over the answers; documents of any length are one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longscan.core.optional import require
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.likelihood import likelihoods
from longscan.inference.engine import Engine
from longscan.inference.prompt_scores import prompt_scores
from longscan.inference.request import Request
from longscan.inference.sampling import SamplingConfig
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer

__all__ = ["adapter", "run_tasks"]

SLOTS = 8
MAX_NEW = 256  # tokens of an answer, if a task does not say
Show = Callable[[str, int, int], None]


def run_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
    show: Show | None = None,
) -> dict[str, Any]:
    """Return the results of tasks, as lm-evaluation-harness reports them.

    Args:
        model: any causal model.
        tokenizer: the one it was trained with.
        tasks: names, or paths of .yaml files.
        shots: examples in front of each question; None for what a task says.
        limit: questions of each task; None for all.
        include: a directory with more tasks.
        show: called with what is done, how much of it, and of how much.

    Raises:
        UsageError: there is no such task.
        LongscanError: lm-eval is not installed, or fails: a file of a task, its data.
    """
    require("lm-eval", "tasks")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [
        task for task in tasks if task not in manager.all_tasks and not (Path(task).is_file() and "." in task)
    ]
    if not tasks:
        raise UsageError("tasks: expected at least one.")
    if unknown:
        raise UsageError(f"no task {unknown[0]!r} in lm-eval{'' if include is None else f' or {include}'}.")
    try:
        found: dict[str, Any] = simple_evaluate(
            model=adapter(model, tokenizer, show),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    except LongscanError:
        raise
    except Exception as error:  # of any kind: files of tasks, the hub, the harness itself
        raise LongscanError(f"lm-eval failed: {type(error).__name__}: {error}") from error
    return found


def adapter(model: LanguageModel, tokenizer: Tokenizer, show: Show | None = None) -> Any:
    """Return a model as lm-evaluation-harness's `LM`.

    Args:
        model: any causal model.
        tokenizer: the one it was trained with.
        show: see `run_tasks`.
    """
    require("lm-eval", "tasks")
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):  # type: ignore[misc, unused-ignore]
        """A model of this package."""

        tokenizer_name = tokenizer.fingerprint

        @property
        def eot_token_id(self) -> int:
            """The token that a document begins after."""
            return tokenizer.start[-1]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """Return the ids of a text."""
            return tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            """Return log-likelihoods and whether greedy decoding would give the continuation."""
            pairs = [(context, continuation) for _, context, continuation in requests]
            scored = likelihoods(model, pairs, tokenizer.vocab_size, _named(show, "log-likelihoods"))
            return [(one.logprob, one.greedy) for one in scored]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Return the log-likelihoods of whole documents, each as one sequence without windows."""
            results = []
            for request in requests:
                ids = [self.eot_token_id, *tokenizer.encode(request.args[0])]
                scores = prompt_scores(model, ids, 0, tokenizer.vocab_size)
                results.append(sum(score.logprob or 0.0 for score in scores))
                if show:
                    show("documents", len(results), len(requests))
            return results

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Return the answers to contexts."""
            return _generate(model, tokenizer, [request.args for request in requests], show)

    return Adapter()


def _named(show: Show | None, name: str) -> Callable[[int, int], None] | None:
    return show and (lambda done, total: show(name, done, total))


def _generate(
    model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[Any], show: Show | None
) -> list[str]:
    """Return the answers to contexts with their settings."""
    engine = Engine(model, tokenizer, slots=SLOTS)
    texts = [""] * len(requests)
    ended = 0
    for context, settings in requests:
        ids = tokenizer.encode(context) or list(tokenizer.start[-1:])
        stops = settings.get("until") or []
        sampled = bool(settings.get("do_sample", False)) and settings.get("temperature", 1.0) > 0
        config = SamplingConfig(
            max_new_tokens=int(settings.get("max_gen_toks", MAX_NEW)),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            stop=tuple(filter(None, [stops] if isinstance(stops, str) else stops)),
            seed=0,
        )
        engine.submit(Request(ids=np.array(ids), config=config, eos_id=tokenizer.eos_ids))
    for event in engine.run():
        if event.error is not None:
            raise LongscanError(str(event.error)) from event.error
        texts[event.row] += event.text
        if event.finish and show:
            ended += 1
            show("answers", ended, len(requests))
    return texts
