"""`longscan generate`: continue texts, token by token."""

from __future__ import annotations

import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from longscan.checkpoints.load import load, load_with_tokenizer
from longscan.commands._input import read_constraint, read_prompts, sampling_config
from longscan.commands._options import (
    Adapter,
    Json,
    JsonSchemaFile,
    MinP,
    Offline,
    PrecisionOption,
    Quiet,
    Regex,
    RepetitionPenalty,
    Revision,
    SamplingSeed,
    Temperature,
    Threads,
    TokenizerName,
    TopK,
    TopP,
)
from longscan.core.config import count
from longscan.core.files import utf8
from longscan.core.progress import Bar
from longscan.core.runtime import use_threads
from longscan.errors import LongscanError, UsageError
from longscan.inference.drafters import Drafter, DraftModel, PromptLookup
from longscan.inference.engine import MAX_SLOTS, Engine
from longscan.inference.prefill import encode
from longscan.inference.request import make_requests
from longscan.inference.sampling import Event, Finish, SamplingConfig
from longscan.models import LanguageModel, State
from longscan.models.common.state import SavedState
from longscan.models.common.summary import describe
from longscan.tokenizers.base import Tokenizer

__all__ = ["command"]

REASONS = {"eos": "end of text", "stop": "stop string"}


def command(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to continue; - or a pipe: one from stdin."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", help='Read prompts from a file: one per line, or .jsonl with "prompt".'),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A shipped model, a directory, or a hub id.")
    ] = "longscan-tiny-en",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop string: end before it; repeatable. A line break is $'\\n'."),
    ] = None,
    seed: SamplingSeed = None,
    precision: PrecisionOption = None,
    tokenizer_name: TokenizerName = None,
    adapter: Adapter = None,
    load_state: Annotated[
        Path | None, typer.Option(help="Continue from a state file; PROMPT is appended to its text.")
    ] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the final state to a file.")] = None,
    json_schema: JsonSchemaFile = None,
    regex: Regex = None,
    speculate: Annotated[
        bool,
        typer.Option("--speculate", help="Speculative decoding by prompt lookup; the text stays the same."),
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Speculative decoding with a draft model; likewise."),
    ] = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text with a language model, token by token.

    One PROMPT is streamed as it is generated; several, or those of a file, run as one batch and are printed
    in order, each when it is complete. A prompt from stdin loses its last line break. The file of --prompts
    is UTF-8, also .gz or .xz; its blank lines are skipped. Without any prompt the model starts a new text, or
    continues the one of --load-state.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model or the prompt can't be read.
    """
    config = sampling_config(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or [],
        seed=secrets.randbelow(10**6) if seed is None else seed,
    )
    use_threads(threads)
    if prompt_file is not None and prompts:
        raise UsageError("PROMPT and --prompts: expected one of them, got both.")
    texts = _prompts(prompts or []) if prompt_file is None else read_prompts(prompt_file)
    _check_usage(texts, save_state, (speculate, draft), (json_schema, regex))
    network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name, adapter)
    before = None if load_state is None else _load_state(load_state, network, texts)
    drafter = PromptLookup() if speculate else _draft_model(draft, tokenizer, offline) if draft else None
    ids = encode(tokenizer, texts, begins=before is None)
    session = _Session(texts, stream=len(texts) == 1 and not as_json and prompt_file is None, silent=as_json)
    slots = min(len(texts), MAX_SLOTS)
    engine = Engine(network, tokenizer, slots=slots, drafter=drafter, progress=session.show_prefill)
    constraint = read_constraint(tokenizer, json_schema, regex)
    for request in make_requests(ids, config, tokenizer.eos_ids, before, keep=save_state is not None):
        engine.submit(replace(request, constraint=constraint))
    if not quiet:
        typer.echo(describe(model, network) + "\n", err=True)
    try:
        session.run(engine, config.max_new_tokens)
    finally:
        session.close()
    saved = save_state if session.consistent else None
    if saved is not None:
        _save_state(saved, engine, network)
    if as_json:
        counts = {"model": model, "seed": config.seed, "prompt_tokens": sum(map(len, ids))}
        speculation = {"drafted": engine.drafted, "accepted": engine.accepted} if drafter else {}
        typer.echo(json.dumps({**counts, **session.report(), **speculation}, ensure_ascii=False, indent=2))
    if not quiet:
        typer.echo(session.footer(config, engine, saved), err=True)
    if save_state is not None and saved is None:
        raise LongscanError(f"stopped before the prompt was processed: {save_state} was not written.")
    if session.stopped:
        raise typer.Exit(130)


def _save_state(path: Path, engine: Engine, model: LanguageModel) -> None:
    """Write the state of the only text to a file."""
    after = engine.saved(0)
    after.state.save(path, position=after.position, pending=after.pending, model=model)


def _check_usage(
    texts: list[str], save_state: Path | None, drafts: tuple[bool, Any], grammars: tuple[Any, Any]
) -> None:
    """Raise an error for flags that contradict each other, before anything slow starts."""
    if all(drafts):
        raise UsageError("--speculate and --draft: expected one of them, got both.")
    if None not in grammars:
        raise UsageError("--json-schema and --regex: expected one of them, got both.")
    if save_state is not None and len(texts) > 1:
        raise UsageError(f"--save-state: expected one prompt, got {len(texts):,}.")
    if save_state is not None and (save_state.is_dir() or not save_state.absolute().parent.is_dir()):
        raise LongscanError(f"{save_state}: expected a new or another file, in a directory that exists.")


def _load_state(path: Path, model: LanguageModel, texts: list[str]) -> SavedState:
    """Return the state that the texts continue."""
    saved = State.load(path, model)
    if saved.state.batch_size != 1:
        raise LongscanError(f"{path} holds {saved.state.batch_size} states: expected one. See state.select.")
    if not saved.pending and not all(texts):
        raise LongscanError(f"{path} has no pending token to continue from: give a prompt.")
    return saved


def _draft_model(name: str, tokenizer: Tokenizer, offline: bool) -> Drafter:
    """Return a drafter for a model with this tokenizer; a draft model without one is trusted to have it."""
    network, other = load(name, offline=offline)
    if other is not None and other.fingerprint != tokenizer.fingerprint:
        raise LongscanError(
            f"the draft model {name} has another tokenizer than the model, so its ids mean other text. "
            "Expected a smaller model that was trained with the same tokenizer."
        )
    return DraftModel(network)


@dataclass
class _Text:
    """One prompt and the text generated for it so far."""

    prompt: str
    text: str = ""
    tokens: int = 0
    finish: Finish | None = None


class _Session:
    """Prints the events of an engine and collects its statistics."""

    def __init__(self, prompts: list[str], *, stream: bool, silent: bool) -> None:
        self._texts = [_Text(prompt) for prompt in prompts]
        self._stream, self._silent = stream, silent
        self._echo = sys.stdout.isatty()  # on a terminal the prompt is shown too
        self._begun, self._printed = False, 0
        self.stopped = False  # by Ctrl-C
        self.consistent = False  # whether the engine's state includes all of the text
        self._bar = Bar()
        self._begin = self._first = self._last = time.perf_counter()

    def show_prefill(self, done: int, total: int) -> None:
        """Show the progress of the prefill."""
        self._bar.show("prefill", done, total)
        if self.stopped:
            raise KeyboardInterrupt

    def run(self, engine: Engine, max_new_tokens: int) -> None:
        """Run an engine to the end, or until Ctrl-C, and print its events."""
        try:
            with self._interruptible():
                while (engine.running or engine.waiting) and not self.stopped:
                    for event in engine.step():
                        self._take(event, max_new_tokens)
            self.consistent = True
        except KeyboardInterrupt:
            self.stopped = True

    def _take(self, event: Event, max_new_tokens: int) -> None:
        """Record an event, and print it or its complete text."""
        if event.error is not None:
            raise event.error
        text = self._texts[event.row]
        self._last = time.perf_counter()
        if not self._begun:
            self._begun, self._first = True, self._last
            self._bar.clear()
            if self._stream and self._echo:
                typer.echo(text.prompt, nl=False)
        text.text += event.text
        text.tokens += 1
        text.finish = event.finish
        if self._stream:
            typer.echo(event.text, nl=False)
        elif event.finish:
            self._print()
        else:
            self._bar.show("decode", text.tokens, max_new_tokens)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C stop between two tokens, so that the state is complete."""

        def stop(*_: object) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
            yield
            return
        usual = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)

    def close(self) -> None:
        """Clear the progress bar and print what is not printed yet."""
        self._bar.clear()
        if self._stream and self._begun:
            typer.echo()
        elif not self._stream:
            self._print(unfinished=True)

    def _print(self, unfinished: bool = False) -> None:
        """Print the next texts in order that are complete."""
        while not self._silent and self._printed < len(self._texts):
            text = self._texts[self._printed]
            if not (text.finish or (unfinished and text.tokens)):
                return
            self._bar.clear()
            self._printed += 1
            typer.echo(f"── {self._printed} of {len(self._texts)} ──")
            typer.echo(f"{text.prompt if self._echo else ''}{text.text}\n")

    def report(self) -> dict[str, Any]:
        """Return the texts, the time to first token and the decode throughput."""
        tokens = sum(text.tokens for text in self._texts)
        begun = sum(text.tokens > 0 for text in self._texts)  # first tokens, which belong to the prefill
        seconds = self._last - self._first
        return {
            "texts": [asdict(text) for text in self._texts],
            "tokens": tokens,
            "seconds_to_first_token": round(self._first - self._begin, 4),
            "tokens_per_second": round((tokens - begun) / seconds, 1) if tokens > begun else None,
        }

    def footer(self, config: SamplingConfig, engine: Engine, state: Path | None) -> str:
        """Return one line of what was done and what to do next."""
        report = self.report()
        parts = ["stopped"] if self.stopped else []
        parts.append(count(report["tokens"], "token"))
        finish = self._texts[0].finish if len(self._texts) == 1 else None
        if finish in REASONS:
            parts.append(REASONS[finish])
        if report["tokens_per_second"]:
            parts.append(f"{report['tokens_per_second']:,.0f} tok/s")
        if report["tokens"]:
            seconds = report["seconds_to_first_token"]
            parts.append(f"first token after {seconds:{'.2g' if seconds < 99 else ',.0f'}} s")
        if engine.drafted:
            parts.append(f"{engine.accepted:,} of {count(engine.drafted, 'draft token')} accepted")
        if config.temperature > 0:
            parts.append(f"seed {config.seed}")
        if state is None:
            parts += ["try: longscan train my.txt --out my-model", "longscan models"]
        else:
            parts.append(f"continue with: longscan generate --load-state {state}")
        return "▏ " + " · ".join(parts)


def _prompts(given: list[str]) -> list[str]:
    """Return the prompts of the command line, with that of stdin in place of -."""
    if not given and sys.stdin is not None and not sys.stdin.isatty():
        given = ["-"]
    piped = ""
    if "-" in given:
        piped = utf8(sys.stdin.buffer.read(), "the prompt on stdin").removeprefix("\ufeff")
        piped = piped.removesuffix("\n").removesuffix("\r")
    # Python passes bytes that are not UTF-8 on as lone surrogates
    return [
        piped if text == "-" else utf8(text.encode(errors="surrogateescape"), "the prompt")
        for text in given or [""]
    ]
