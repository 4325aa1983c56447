"""Several processes train one model: what they exchange, and what happens when one is lost.

Every process computes the
gradient of its rows of the same global batch; the sum over all processes is that of one process. All take the
same decisions from the same numbers, and only the first one writes. Alone, a process exchanges nothing and no
bit of its results changes.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longscan.core.runtime import StopSignals
from longscan.errors import LongscanError, UsageError

__all__ = ["ALONE", "Group", "LostError"]

T = TypeVar("T")

# how torch's backends say that a process did not answer, or ended
_SILENT = re.compile(r"timed? ?out", re.IGNORECASE)
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|store", re.IGNORECASE
)


class LostError(LongscanError):
    """Another process of the run ended, or did not answer in time."""


class Group:
    """The processes of a run.

    Args:
        rank: the number of this one, from 0.
        size: how many there are.
        timeout: seconds to wait for the others.
        patient: the same processes, with a timeout of days.
        context_size: how many share a sequence; a divisor of `size`. Those of adjacent ranks do.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        timeout: float = 0.0,
        patient: dist.ProcessGroup | None = None,
        context_size: int = 1,
    ) -> None:
        self.rank, self.size, self.timeout, self.patient = rank, size, timeout, patient
        self.context_size, self.context_rank = context_size, rank % context_size
        self.data_size, self.data_rank = size // context_size, rank // context_size

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def gather(self, values: Tensor, patient: bool = False) -> Tensor:
        """Return the values of all processes, (size, ...), in the order of their ranks.

        Args:
            values: of the same shape everywhere, on the CPU.
            patient: whether to wait longer than the timeout.
        """
        if not self.several:
            return values[None]
        every = [torch.empty_like(values) for _ in range(self.size)]
        with self.connected():
            dist.all_gather(every, values, group=self.patient if patient else None)
        return torch.stack(every)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes, added in the order of their ranks.

        Args:
            values: of the same shape everywhere, on the CPU.
        """
        every = self.gather(values)
        result = every[0]
        for other in every[1:]:
            result = result + other
        return result

    def texts(self, text: str) -> list[str]:
        """Return a text of every process, in the order of their ranks.

        Args:
            text: this one's.
        """
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0)
        lengths = self.gather(torch.tensor(len(content))).tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        padded[: len(content)] = content
        rows = zip(self.gather(padded), lengths, strict=True)
        return [bytes(row[:length].tolist()).decode() for row, length in rows]

    def compare(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise unless all processes have the same values.

        Args:
            what: the name of the values, for the message.
            values: JSON values by name.

        Raises:
            UsageError: one has others.
        """
        if not self.several:
            return
        every = [json.loads(text) for text in self.texts(json.dumps(dict(values)))]
        for rank, theirs in enumerate(every):
            names = [name for name in every[0] | theirs if every[0].get(name) != theirs.get(name)]
            if names:
                name = names[0]
                raise UsageError(
                    f"{what}: process {rank} has {name} = {theirs.get(name)!r}, process 0 "
                    f"{every[0].get(name)!r}. Start all processes with the same command, on the same files."
                )

    def decide(self, question: Callable[[], bool]) -> bool:
        """Return the answer of the first process.

        Args:
            question: asked there only.
        """
        answer = self.first and question()
        return bool(self.gather(torch.tensor(int(answer)))[0])

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let the first process do something that writes files, then the others, which find them there.

        Args:
            work: what to do.

        Returns:
            Its result in this process.
        """
        result = [work()] if self.first else []
        self.gather(torch.zeros(()), patient=True)
        result = result or [work()]
        self.gather(torch.zeros(()), patient=True)
        return result[0]

    def slices(self, n_rows: int, batch_size: int) -> list[slice]:
        """Return which rows of a step this process takes, one slice for each forward pass.

        All processes do the same number of passes, as the shards of a model are collected in each. Where the
        passes of one process divide by the number of processes, these do the same passes as one.

        Args:
            n_rows: rows of the step, over all processes.
            batch_size: rows of a pass, at most.

        Raises:
            UsageError: there are too few rows.
        """
        n = self.data_size
        passes = math.ceil(math.ceil(n_rows / n) / batch_size)
        each = "processes" if self.context_size == 1 else f"groups of {self.context_size} processes"
        if n_rows < n:
            raise UsageError(
                f"--batch-size: expected at least one sequence of a step for each of {n} {each}, "
                f"got {n_rows} (batch_size x accumulate). Raise one of them, or start fewer processes."
            )
        if n_rows // n < passes:
            raise UsageError(
                f"--accumulate: {n_rows} passes of one sequence do not divide among {n} {each}. "
                f"Make it a multiple of {n}, or raise --batch-size."
            )
        begin, end = (n_rows * rank // n for rank in (self.data_rank, self.data_rank + 1))
        bounds = [begin + (end - begin) * i // passes for i in range(passes + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    def part(self, n_tokens: int) -> slice:
        """Return which tokens of a sequence this process takes: as many as the others, give or take one.

        Args:
            n_tokens: of the sequence.

        Raises:
            UsageError: there are fewer tokens than processes.
        """
        n, number = self.context_size, self.context_rank
        if n_tokens < n:
            raise UsageError(
                f"--context-parallel: expected at least one token of a sequence for each of {n} processes, "
                f"got {n_tokens}. Raise --seq-len, or lower --context-parallel."
            )
        return slice(n_tokens * number // n, n_tokens * (number + 1) // n)

    def share(self, batches: Iterable[T], signals: StopSignals) -> Iterator[tuple[T, bool]]:
        """Deal batches out to the processes, as many to each: the last may come twice.

        Processes that share sequences take the same batches.

        Args:
            batches: the same everywhere.
            signals: which all agree about before every batch.

        Yields:
            A batch of this process, and whether it counts here.
        """
        dealt: list[T] = []
        for batch in batches:
            dealt.append(batch)
            if len(dealt) == self.data_size:
                self.agree(signals)
                yield dealt[self.data_rank], True
                dealt = []
        if dealt:
            self.agree(signals)
            yield dealt[min(self.data_rank, len(dealt) - 1)], self.data_rank < len(dealt)

    def signals(self) -> StopSignals:
        """Return what records the signals that stop the run."""
        return _AgreedSignals() if self.several else StopSignals()

    def agree(self, signals: StopSignals) -> None:
        """Make a signal that one process received known to all, so that they stop after the same step.

        Args:
            signals: of `signals`.
        """
        if isinstance(signals, _AgreedSignals):
            number = int(self.gather(torch.tensor(signals.own)).max())
            signals.received = signal.Signals(number) if number else None

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Turn the errors of a lost connection into one that says so.

        Raises:
            LostError: another process ended, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if not self.several or not (isinstance(error, dist.DistError) or _LOST.search(text)):
                raise
            what = "ended, or its connection broke"
            if _SILENT.search(text):
                what = f"did not answer within {self.timeout:g} s (--timeout)"
            raise LostError(
                f"another of the {self.size} processes {what}. The message of that process says more."
            ) from error


ALONE = Group()


class _AgreedSignals(StopSignals):
    """Records a signal as this process's own; `received` is what all have agreed on."""

    def __init__(self) -> None:
        super().__init__()
        self.own = 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.own and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.own = number
