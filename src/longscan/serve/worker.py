"""The thread that owns the engines: everything else sends it requests and receives events.

An event loop submits a `Request` and reads the events of its `Job`. The thread drains what was sent, takes a
step of each engine that has work, and delivers all events of the step at once; while nothing runs it sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from longscan.errors import LongscanError
from longscan.inference.engine import Engine
from longscan.inference.request import Request
from longscan.inference.sampling import Event
from longscan.serve.errors import BusyError
from longscan.serve.job import Job

__all__ = ["Worker"]

T = TypeVar("T")
LOG = logging.getLogger("longscan.serve")


class Worker:
    """A thread with the engines of a server: one for each model, whose texts decode as a batch.

    Args:
        slots: texts that may decode at a time, of all models together.
        max_waiting: requests that may wait for a slot.
        max_waiting_tokens: tokens of their prompts together.

    Attributes:
        engines: used by nobody else from `start` on.
        failed: why the thread has ended early.
        counts: of what was done: requests, prompt_tokens, written_tokens, cancelled, rejected.
    """

    def __init__(self, slots: int = 8, max_waiting: int = 64, max_waiting_tokens: int = 1 << 20) -> None:
        self.engines: list[Engine] = []
        self._slots, self._max_waiting, self._max_waiting_tokens = slots, max_waiting, max_waiting_tokens
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._work: deque[Callable[[], None]] = deque()  # one between two steps
        self._reserved: list[int] = []  # prompt tokens of what is no text: see `reserve`
        self._jobs: set[Job] = set()  # of the event loop
        self._of_row: dict[tuple[Engine, int], tuple[Job, int]] = {}  # of the thread
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.failed: BaseException | None = None
        self.draining = self.ended = False
        self.counts = dict.fromkeys(
            ("requests", "prompt_tokens", "written_tokens", "cancelled", "rejected"), 0
        )
        self._speed = 0.0  # prompt tokens per second, lately

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._commands.put(None)
        self._thread.join()

    @property
    def running(self) -> int:
        """The number of texts that are decoding."""
        return sum(engine.running for engine in self.engines)

    @property
    def waiting(self) -> int:
        """The number of texts that wait for a slot or for the end of their prefill."""
        return sum(engine.waiting for engine in self.engines)

    @property
    def jobs(self) -> int:
        """The number of requests that have not ended."""
        return len(self._jobs) + len(self._reserved)

    @property
    def capacity(self) -> int:
        """The most continuations that may run and wait."""
        return self._slots + self._max_waiting

    @property
    def waiting_tokens(self) -> int:
        """The prompt tokens of the requests that have no token yet."""
        waiting = (job.tokens for job in self._jobs if not job.begun)
        return sum(waiting) + sum(self._reserved)

    def check(self, n: int, n_tokens: int) -> None:
        """Raise unless there is room for more.

        Args:
            n: continuations.
            n_tokens: of their prompts.

        Raises:
            BusyError: too much is waiting.
        """
        rows = sum(len(job.texts) for job in self._jobs) + len(self._reserved)
        tokens = self.waiting_tokens
        if self.jobs and (rows + n > self.capacity or tokens + n_tokens > self._max_waiting_tokens):
            self.counts["rejected"] += 1
            raise BusyError(max(1, round(tokens / self._speed)) if self._speed else 1)

    @contextlib.contextmanager
    def reserve(self, n_tokens: int) -> Iterator[None]:
        """Count work on a prompt that is no text, while it is done.

        Args:
            n_tokens: of the prompt.

        Raises:
            BusyError: too much is waiting.
        """
        self.check(1, n_tokens)
        self._reserved.append(n_tokens)
        try:
            yield
        finally:
            self._reserved.remove(n_tokens)

    async def submit(self, engine: Engine, request: Request, n: int = 1) -> Job:
        """Return the job of a request, for which there is room: see `check`.

        Args:
            engine: of `engines`.
            request: what to generate.
            n: continuations.

        Raises:
            LongscanError: the request is invalid, or the engine has failed.
        """
        job = Job(request, n, self.cancel)
        self._jobs.add(job)

        def admit() -> None:
            for index, number in enumerate(engine.submit_copies(request, n)):
                self._of_row[engine, number] = job, index

        try:
            await self.call(admit)
        except BaseException:
            self.cancel(job)
            raise
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += len(request.ids)
        return job

    async def call(self, function: Callable[[], T], *, slow: bool = False) -> T:
        """Return the result of a function that runs in the thread, between two steps.

        Args:
            function: may use the models and the engines.
            slow: whether at most one such may run between two steps.

        Raises:
            LongscanError: the engine has failed.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self.failed is not None:
                    raise LongscanError(f"the engine failed: {self.failed}")
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if slow:
            self._work.append(run)
        self._commands.put((lambda: None) if slow else run)
        return await asyncio.wrap_future(future)

    def cancel(self, job: Job) -> None:
        """Drop a job; without effect if it has ended.

        Args:
            job: see `submit`.
        """
        self._jobs.discard(job)
        if job.ended:
            return
        job.ended = True

        def drop() -> None:
            for row, (owner, _) in list(self._of_row.items()):
                if owner is job and self._of_row.pop(row):
                    engine, number = row
                    self.counts["cancelled"] += engine.cancel(number)

        self._commands.put(drop)

    def end_all(self) -> None:
        """End all texts now, and let no work begin; called on the event loop."""
        self.ended = True
        for job in list(self._jobs):
            job.end()

    def _run(self) -> None:
        """Serve until `stop`; after a failure of the engine, refuse."""
        while True:
            idle = not (self.running or self.waiting or self._work)
            for _ in range(max(self._commands.qsize(), int(idle or self.failed is not None))):
                command = self._commands.get()
                if command is None:
                    return
                command()
            if self._work:
                self._work.popleft()()
            if self.failed is None:
                try:
                    for engine in self.engines:
                        self._step(engine)
                except BaseException as error:  # never go on with half a step
                    self.failed = error
                    LOG.exception("the engine failed")
                    for job in {job for job, _ in self._of_row.values()}:
                        self._tell(job, job.fail, error)

    def _tell(self, job: Job, function: Callable[..., None], *args: Any) -> None:
        """Call a function on a job's event loop, if that still runs."""
        with contextlib.suppress(RuntimeError):
            job.loop.call_soon_threadsafe(function, *args)

    def _step(self, engine: Engine) -> None:
        """Take a step of an engine that has work, and deliver its events."""
        if not (engine.running or engine.waiting):
            return
        begin, prefilled = time.perf_counter(), engine.prefilled
        of_job: dict[Job, list[tuple[int, Event]]] = {}
        ended: list[Job] = []
        for event in engine.step():
            job, index = self._of_row[engine, event.row]
            self.counts["written_tokens"] += event.token >= 0
            of_job.setdefault(job, []).append((index, event))
            if event.finish is not None:
                del self._of_row[engine, event.row]
                if job.request.keep and event.finish != "error":
                    job.texts[index].saved = engine.saved(event.row)
                if not any(owner is job for owner, _ in self._of_row.values()):
                    ended.append(job)
        read, seconds = engine.prefilled - prefilled, time.perf_counter() - begin
        if read > 0:
            self._speed = read / seconds if not self._speed else 0.8 * self._speed + 0.2 * read / seconds
        for job, events in of_job.items():
            self._tell(job, self._hand_over, job, events, job in ended)

    def _hand_over(self, job: Job, events: list[tuple[int, Event]], ended: bool) -> None:
        """Deliver events, on the event loop."""
        job.begun = True
        if ended:
            job.ended = True
            self._jobs.discard(job)
        job.deliver(events)
