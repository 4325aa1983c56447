"""The thread that owns the engine: everything else sends it requests and receives events.

An event loop submits a `Request` and reads the events of its `Job`. The thread drains what was sent, takes a
step, and delivers all events of the step at once; while nothing runs it sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longscan.errors import LongscanError
from longscan.inference.engine import Engine
from longscan.inference.request import Request
from longscan.inference.sampling import Event, Finish
from longscan.models.common.state import SavedState

__all__ = ["MAX_BACKLOG", "BusyError", "Job", "Text", "Worker"]

T = TypeVar("T")
LOG = logging.getLogger("longscan.serve")

MAX_BACKLOG = 4096  # events that a client has not read yet; beyond, its texts end


class BusyError(Exception):
    """The queue is full.

    Attributes:
        seconds: after which another attempt may succeed.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


@dataclass
class Text:
    """One continuation so far.

    Attributes:
        ids: of its tokens.
        text: what was shown.
        finish: why it ended; None while it runs.
        saved: the state after it, if the request asked for it.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    saved: SavedState | None = None


class Job:
    """A request on its way, with one or several continuations.

    Attributes:
        texts: the continuations so far.
        failed: what went wrong with the engine, if anything did.
    """

    def __init__(self, worker: Worker, request: Request, n: int) -> None:
        self.texts = [Text() for _ in range(n)]
        self.failed: BaseException | None = None
        self._worker, self.request, self.tokens = worker, request, len(request.ids)
        self._events: deque[tuple[int, Event]] = deque()
        self._arrived = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.begun = False  # it has a token
        self.ended = False  # the engine knows it no longer
        self.cut = False  # it was ended early: by `end`

    async def events(self, deadline: float | None = None) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of all continuations, each with its index, until they have ended.

        Args:
            deadline: on the clock of `time.monotonic`.

        Raises:
            TimeoutError: the deadline has passed before the first token; later, the texts just end.
            LongscanError: the engine failed.
        """
        while True:
            while self._events:
                index, event = self._events.popleft()
                text = self.texts[index]
                if event.token >= 0:
                    text.ids.append(event.token)
                text.text += event.text
                text.finish = event.finish
                yield index, event
            if self.failed is not None:
                raise LongscanError(f"the engine failed: {self.failed}") from self.failed
            if all(text.finish for text in self.texts):
                return
            if self.cut:
                for index, text in enumerate(self.texts):
                    if text.finish is None:
                        text.finish = "length"
                        yield index, Event(index, -1, "", "length")
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await self._arrived.wait()
            except TimeoutError:
                if not any(text.ids for text in self.texts):
                    raise
                self.end()  # what there is is an answer

    def deliver(self, events: list[tuple[int, Event]]) -> None:
        """Append events; called on the event loop.

        Args:
            events: with the index of their continuation.
        """
        self._events.extend(events)
        if len(self._events) > MAX_BACKLOG:  # a slow reader: nobody shall hold its text for it
            self.end()
        self._arrived.set()

    def fail(self, error: BaseException) -> None:
        """Let the reader raise; called on the event loop.

        Args:
            error: of the engine.
        """
        self.failed = error
        self._arrived.set()

    def end(self) -> None:
        """End all continuations now, as if they had reached their length."""
        self.cut = True
        self.cancel()
        self._arrived.set()

    def cancel(self) -> None:
        """Drop what is not done; without effect afterwards."""
        self._worker.cancel(self)


class Worker:
    """A thread with an engine.

    Args:
        engine: used by nobody else from `start` on.
        max_waiting: requests that may wait for a slot.
        max_waiting_tokens: tokens of their prompts together.

    Attributes:
        failed: why the thread has ended early.
        counts: of what was done: requests, prompt_tokens, written_tokens, cancelled, rejected.
    """

    def __init__(self, engine: Engine, max_waiting: int = 64, max_waiting_tokens: int = 1 << 20) -> None:
        self.engine = engine
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._work: deque[Callable[[], None]] = deque()  # one between two steps
        self._reserved: list[int] = []  # prompt tokens of what is no text: see `reserve`
        self._jobs: set[Job] = set()  # of the event loop
        self._of_row: dict[int, tuple[Job, int]] = {}  # of the thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
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
    def jobs(self) -> int:
        """The number of requests that have not ended."""
        return len(self._jobs) + len(self._reserved)

    @property
    def capacity(self) -> int:
        """The most continuations that may run and wait."""
        return self.engine.slots + self._max_waiting

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

    async def submit(self, request: Request, n: int = 1) -> Job:
        """Return the job of a request, for which there is room: see `check`.

        Args:
            request: what to generate.
            n: continuations.

        Raises:
            LongscanError: the request is invalid, or the engine has failed.
        """
        job = Job(self, request, n)
        self._jobs.add(job)

        def admit() -> None:
            for index, number in enumerate(self.engine.submit_copies(request, n)):
                self._of_row[number] = job, index

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
            function: may use the model and the engine.
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
            for number, (owner, _) in list(self._of_row.items()):
                if owner is job and self._of_row.pop(number):
                    self.counts["cancelled"] += self.engine.cancel(number)

        self._commands.put(drop)

    def end_all(self) -> None:
        """End all texts now, and let no work begin; called on the event loop."""
        self.ended = True
        for job in list(self._jobs):
            job.end()

    def _run(self) -> None:
        """Serve until `stop`; after a failure of the engine, refuse."""
        while True:
            idle = not (self.engine.running or self.engine.waiting or self._work)
            for _ in range(max(self._commands.qsize(), int(idle or self.failed is not None))):
                command = self._commands.get()
                if command is None:
                    return
                command()
            if self._work:
                self._work.popleft()()
            if self.failed is None:
                try:
                    self._step()
                except BaseException as error:  # never go on with half a step
                    self.failed = error
                    LOG.exception("the engine failed")
                    for job in {job for job, _ in self._of_row.values()}:
                        self._tell(job, job.fail, error)

    def _tell(self, job: Job, function: Callable[..., None], *args: Any) -> None:
        """Call a function on a job's event loop, if that still runs."""
        with contextlib.suppress(RuntimeError):
            job.loop.call_soon_threadsafe(function, *args)

    def _step(self) -> None:
        """Take a step and deliver its events."""
        if not (self.engine.running or self.engine.waiting):
            return
        begin, prefilled = time.perf_counter(), self.engine.prefilled
        of_job: dict[Job, list[tuple[int, Event]]] = {}
        ended: list[Job] = []
        for event in self.engine.step():
            job, index = self._of_row[event.row]
            self.counts["written_tokens"] += event.token >= 0
            of_job.setdefault(job, []).append((index, event))
            if event.finish is not None:
                del self._of_row[event.row]
                if job.request.keep and event.finish != "error":
                    job.texts[index].saved = self.engine.saved(event.row)
                if not any(owner is job for owner, _ in self._of_row.values()):
                    ended.append(job)
        read, seconds = self.engine.prefilled - prefilled, time.perf_counter() - begin
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
