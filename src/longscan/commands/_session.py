"""The texts of `longscan generate` while they are generated: printing, Ctrl-C, statistics."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from longscan.core.config import count
from longscan.core.progress import Bar
from longscan.inference.engine import Engine
from longscan.inference.sampling import Event, Finish, SamplingConfig

__all__ = ["Session"]

REASONS = {"eos": "end of text", "stop": "stop string"}


@dataclass
class Text:
    """One prompt and the text generated for it so far."""

    prompt: str
    text: str = ""
    tokens: int = 0
    finish: Finish | None = None
    adapter: str | None = None


class Session:
    """Prints the events of engines and collects their statistics.

    Args:
        prompts: to continue.
        adapters: names of several, each of which continues every prompt; none if there are no several.
        stream: whether to print the text token by token; it is the only one.
        silent: whether to print nothing.

    Attributes:
        stopped: whether Ctrl-C has ended it.
        consistent: whether the engine's state includes all of the text.
    """

    def __init__(
        self, prompts: Sequence[str], adapters: Sequence[str] = (), *, stream: bool, silent: bool
    ) -> None:
        self._texts = [Text(prompt, adapter=name) for name in adapters or (None,) for prompt in prompts]
        self._n_prompts = len(prompts)
        self._drafted = self._accepted = 0
        self._stream, self._silent = stream, silent
        self._echo = sys.stdout.isatty()  # on a terminal the prompt is shown too
        self._begun, self._waiting, self._printed = False, True, 0
        self.stopped = self.consistent = False
        self._bar = Bar()
        self._begin = self._first = self._last = time.perf_counter()
        self._wait, self._decode = 0.0, 0.0  # to the first token; between the first and the last of each run

    def show_prefill(self, done: int, total: int) -> None:
        """Show the progress of the prefill.

        Args:
            done: tokens.
            total: of so many.

        Raises:
            KeyboardInterrupt: it was stopped.
        """
        self._bar.show("prefill", done, total)
        if self.stopped:
            raise KeyboardInterrupt

    def run(self, engine: Engine, max_new_tokens: int, first: int = 0) -> None:
        """Run an engine to the end, or until Ctrl-C, and print its events.

        Args:
            engine: with a request for each prompt.
            max_new_tokens: of a text.
            first: the index of its first text.
        """
        self._waiting = True
        try:
            with self._interruptible():
                while (engine.running or engine.waiting) and not self.stopped:
                    for event in engine.step():
                        self._take(event._replace(row=first + event.row), max_new_tokens)
            self.consistent = True
        except KeyboardInterrupt:
            self.stopped = True
        self._decode += 0.0 if self._waiting else self._last - self._first
        self._drafted, self._accepted = engine.drafted, engine.accepted

    def _take(self, event: Event, max_new_tokens: int) -> None:
        """Record an event, and print it or its complete text."""
        if event.error is not None:
            raise event.error
        text = self._texts[event.row]
        self._last = time.perf_counter()
        if self._waiting:
            self._waiting, self._first = False, self._last
        if not self._begun:
            self._begun, self._wait = True, self._last - self._begin
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
            typer.echo(f"── {self._heading(self._printed - 1)} ──")
            typer.echo(f"{text.prompt if self._echo else ''}{text.text}\n")

    def _heading(self, index: int) -> str:
        """Return what stands above a text."""
        adapter = self._texts[index].adapter
        place = f"{index % self._n_prompts + 1} of {self._n_prompts}"
        return place if adapter is None else f"{adapter} · {place}" if self._n_prompts > 1 else adapter

    def report(self) -> dict[str, Any]:
        """Return the texts, the time to first token and the decode throughput."""
        tokens = sum(text.tokens for text in self._texts)
        begun = sum(text.tokens > 0 for text in self._texts)  # first tokens, which belong to the prefill
        return {
            "texts": [
                {key: value for key, value in asdict(text).items() if text.adapter or key != "adapter"}
                for text in self._texts
            ],
            "tokens": tokens,
            "seconds_to_first_token": round(self._wait, 4),
            "tokens_per_second": round((tokens - begun) / self._decode, 1) if tokens > begun else None,
        }

    def footer(self, config: SamplingConfig, state: Path | None) -> str:
        """Return one line of what was done and what to do next.

        Args:
            config: of sampling.
            state: the file that holds the state, if one was written.
        """
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
        if self._drafted:
            parts.append(f"{self._accepted:,} of {count(self._drafted, 'draft token')} accepted")
        if config.temperature > 0:
            parts.append(f"seed {config.seed}")
        if state is None:
            parts += ["try: longscan train my.txt --out my-model", "longscan models"]
        else:
            parts.append(f"continue with: longscan generate --load-state {state}")
        return "▏ " + " · ".join(parts)
