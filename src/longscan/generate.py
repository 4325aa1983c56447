"""`longscan generate`: continue texts, token by token.

The generator of events in sampling.py lies underneath: the command prints them, a library caller gets pieces
of text or whole texts, and whoever needs the ids takes the events as they are.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from longscan import ops
from longscan.checkpoint import load
from longscan.errors import LongscanError, UsageError
from longscan.models import LanguageModel
from longscan.sampling import Event, Finish, SamplingConfig, generate_ids
from longscan.tokenizer import Tokenizer

__all__ = [
    "Bar",
    "Event",
    "SamplingConfig",
    "command",
    "describe",
    "generate",
    "generate_batch",
    "generate_ids",
    "load_with_tokenizer",
    "use_threads",
]

REASONS = {"eos": "end of text", "stop": "stop string"}

MAX_THREADS = 1024  # torch's pool crashes the process when it cannot start as many as it is told


def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> Iterator[str]:
    """Continue a text, piece by piece.

    Args:
        model: what writes.
        tokenizer: the one it was trained with.
        prompt: where to begin; nothing begins a new document.
        sampling: fields of `SamplingConfig`.

    Returns:
        An iterator of the new text, without the prompt.

    Raises:
        LongscanError: the model and the tokenizer or the fields do not fit.
    """
    config = SamplingConfig.from_dict(sampling)
    prompts = tokenizer.encode_batch([prompt])
    events = generate_ids(model, prompts, config, eos_id=tokenizer.eos_id, tokenizer=tokenizer)
    return (event.text for event in events if event.text)


def generate_batch(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], **sampling: Any
) -> list[str]:
    """Continue several texts at once.

    Args:
        model: what writes.
        tokenizer: the one it was trained with.
        prompts: of any lengths; row i writes what `generate` would with seed + i.
        sampling: fields of `SamplingConfig`.

    Returns:
        The new text of each.

    Raises:
        LongscanError: as `generate`.
    """
    config = SamplingConfig.from_dict(sampling)
    texts = [""] * len(prompts)
    ids = tokenizer.encode_batch(prompts)
    for event in generate_ids(model, ids, config, eos_id=tokenizer.eos_id, tokenizer=tokenizer):
        texts[event.row] += event.text
    return texts


def command(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Texts to continue; - or nothing reads one from stdin if it is a pipe.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A shipped model, a directory, or a hub id.")
    ] = "longscan-tiny-en",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy, 1 the model as it is.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 = off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that make up this share.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids tokens used before.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable. A line break is $'\\n'.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text alone.")] = False,
) -> None:
    """Continue a text with a model, piece by piece.

    One PROMPT is streamed as it is written; several run as one batch and are printed whole, in order. A
    prompt from stdin loses its last line break. Without any prompt the model begins a new text.

    Raises:
        UsageError: a flag has an impossible value.
        LongscanError: the model or the prompt can't be read.
    """
    try:
        config = SamplingConfig.from_dict(
            {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "stop": stop or [],
                "seed": secrets.randbelow(10**6) if seed is None else seed,
            }
        )
    except LongscanError as error:
        raise UsageError(str(error)) from error
    use_threads(threads)
    texts = _prompts(prompts or [])
    network, tokenizer = load_with_tokenizer(model, revision, offline)
    ids = tokenizer.encode_batch(texts)
    session = _Session(texts, stream=len(texts) == 1 and not as_json, silent=as_json)
    events = generate_ids(
        network, ids, config, eos_id=tokenizer.eos_id, tokenizer=tokenizer, progress=session.reading
    )
    if not quiet:
        typer.echo(describe(model, network) + "\n", err=True)
    stopped = False
    try:
        session.run(events, config.max_new_tokens)
    except KeyboardInterrupt:
        stopped = True
    finally:
        session.close()
    if as_json:
        report = {
            "model": model,
            "seed": config.seed,
            "prompt_tokens": sum(map(len, ids)),
            **session.report(),
        }
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    if not quiet:
        typer.echo(session.footer(config, stopped), err=True)
    if stopped:
        raise typer.Exit(130)


@dataclass
class _Text:
    """What became of one prompt."""

    prompt: str
    text: str = ""
    tokens: int = 0
    finish: Finish | None = None


class _Session:
    """Prints events as they come and remembers what there is to say about them."""

    def __init__(self, prompts: list[str], *, stream: bool, silent: bool) -> None:
        self._texts = [_Text(prompt) for prompt in prompts]
        self._stream, self._silent = stream, silent
        self._echo = sys.stdout.isatty()  # there the prompt is part of what is read
        self._begun, self._printed = False, 0
        self._bar = Bar()
        self._begin = self._first = self._last = time.perf_counter()

    def reading(self, done: int, total: int) -> None:
        """Show how much of the prompts is read."""
        self._bar.show("reading", done, total)

    def run(self, events: Iterator[Event], max_new_tokens: int) -> None:
        """Take all events."""
        for event in events:
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
                self._bar.show("writing", text.tokens, max_new_tokens)

    def close(self) -> None:
        """Leave the screen in order, with all there is to show."""
        self._bar.clear()
        if self._stream and self._begun:
            typer.echo()
        elif not self._stream:
            self._print(unfinished=True)

    def _print(self, unfinished: bool = False) -> None:
        """Print the texts whose turn it is."""
        while not self._silent and self._printed < len(self._texts):
            text = self._texts[self._printed]
            if not (text.finish or (unfinished and text.tokens)):
                return
            self._bar.clear()
            self._printed += 1
            typer.echo(f"── {self._printed} of {len(self._texts)} ──")
            typer.echo(f"{text.prompt if self._echo else ''}{text.text}\n")

    def report(self) -> dict[str, Any]:
        """Return the texts and the speed."""
        tokens = sum(text.tokens for text in self._texts)
        begun = sum(text.tokens > 0 for text in self._texts)  # tokens that the reading of the prompts gave
        seconds = self._last - self._first
        return {
            "texts": [asdict(text) for text in self._texts],
            "tokens": tokens,
            "seconds_to_first_token": round(self._first - self._begin, 4),
            "tokens_per_second": round((tokens - begun) / seconds, 1) if tokens > begun else None,
        }

    def footer(self, config: SamplingConfig, stopped: bool) -> str:
        """Say in a line what was done and what to do next."""
        report = self.report()
        parts = ["stopped"] if stopped else []
        parts.append(f"{report['tokens']:,} token{'s' if report['tokens'] != 1 else ''}")
        finish = self._texts[0].finish if len(self._texts) == 1 else None
        if finish in REASONS:
            parts.append(REASONS[finish])
        if report["tokens_per_second"]:
            parts.append(f"{report['tokens_per_second']:,.0f} tok/s")
        if report["tokens"]:
            parts.append(f"first token after {report['seconds_to_first_token']:.2g} s")
        if config.temperature > 0:
            parts.append(f"seed {config.seed}")
        return "▏ " + " · ".join([*parts, "try: longscan train my.txt --out my-model", "longscan models"])


def _prompts(given: list[str]) -> list[str]:
    """Return the prompts as text, from the command line and from stdin."""
    if not given and sys.stdin is not None and not sys.stdin.isatty():
        given = ["-"]
    piped = ""
    if "-" in given:
        piped = _utf8(sys.stdin.buffer.read(), "the prompt on stdin").removeprefix("\ufeff")
        piped = piped.removesuffix("\n").removesuffix("\r")
    # Python passes bytes that are not UTF-8 on as lone surrogates
    return [
        piped if text == "-" else _utf8(text.encode(errors="surrogateescape"), "the prompt")
        for text in given or [""]
    ]


def _utf8(data: bytes, what: str) -> str:
    """Decode strictly."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LongscanError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start:,} "
            f"({error.reason}). Convert it first, for example with iconv -f CODE -t UTF-8."
        ) from error


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads.

    Args:
        threads: how many; None leaves the choice to torch.

    Raises:
        UsageError: less than 1, or more than any machine has.
    """
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads: expected 1 or more, got {threads}.")
        if threads > MAX_THREADS:
            raise UsageError(f"threads: expected at most {MAX_THREADS:,}, got {threads:,}.")
        torch.set_num_threads(threads)


def load_with_tokenizer(name: str, revision: str | None, offline: bool) -> tuple[LanguageModel, Tokenizer]:
    """Load a model that is to read or write text; see `checkpoint.load`.

    Raises:
        LongscanError: as `load`; or the model has no tokenizer.
    """
    model, tokenizer = load(name, revision=revision, offline=offline)
    if tokenizer is None:
        raise LongscanError(
            f"{name} has no tokenizer: put the tokenizer.json it was trained with beside its config.json."
        )
    return model, tokenizer


def describe(name: str, model: LanguageModel) -> str:
    """Say in a line what is about to run.

    Args:
        name: what the user called it.
        model: the model.
    """
    weight, threads = model.backbone.embedding.weight, torch.get_num_threads()
    kernels = " · reference kernels, see longscan doctor" if ops.backend() == "reference" else ""
    return (
        f"{name} · {type(model).__name__}, {_scaled(model.num_parameters(), 'kMB').strip()} parameters, "
        f"{model.config.n_layers} layers · state {_scaled(model.init_state(1).nbytes, 'kMG')}B · "
        f"{str(weight.dtype).removeprefix('torch.')} · {threads} thread{'s' if threads != 1 else ''}{kernels}"
    )


def _scaled(value: float, prefixes: str) -> str:
    """Write a number with three digits and a prefix of thousands: "3.91 M"."""
    for prefix in ("", *prefixes):
        if value < 999.5 or prefix == prefixes[-1]:
            break
        value /= 1000
    return f"{value:.3g} {prefix}"


class Bar:
    """A progress bar on stderr: only on a terminal, only if the work takes a while, gone when it is done."""

    PATIENCE = 0.5  # seconds that need no bar

    def __init__(self) -> None:
        self._wanted, self._begin = sys.stderr.isatty(), time.perf_counter()
        self._bar: Any = None

    def show(self, what: str, done: int, total: int | None, words: str = "") -> None:
        """Show how far the work is.

        Args:
            what: is going on.
            done: in any unit.
            total: in the same; None if nobody knows.
            words: numbers to show beside the bar.
        """
        if not self._wanted or time.perf_counter() - self._begin < self.PATIENCE:
            return
        if self._bar is None:
            self._bar = _rich_bar()
            self._bar.add_task(what, words="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, words=words)

    def clear(self) -> None:
        """Remove the bar, so that something else can be printed."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._begin = None, time.perf_counter()


def _rich_bar() -> Any:
    """Build the bar; rich is imported only by those who look at one."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[words]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # or what goes to stdout would end up on stderr
        redirect_stderr=False,
    )
