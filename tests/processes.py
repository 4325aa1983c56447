"""Starts the processes of a run as torchrun does: forks of one that has imported torch, so at once."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARENT = """
import json, os, sys, traceback
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
import longscan.commands.train, longscan.inference.generate, matplotlib.figure, rich.progress
from longscan.cli import main

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    if (pid := os.fork()) == 0:
        os.environ.update(order["environment"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(log, number)
        code = 1
        try:
            exec(order["first"], {})
            code = main(order["arguments"])
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
"""

TIMEOUT = 60  # seconds that any answer may take


@dataclass
class Ranks:
    """The processes of one run."""

    pids: list[int]
    logs: list[Path]
    parent: Parent

    def wait(self) -> list[int]:
        """Return the exit codes; -9 of a process that was killed."""
        return [self.parent.ask({"wait": pid}) for pid in self.pids]

    def kill(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pids[rank], number)

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()


@dataclass
class Parent:
    """What forks the processes."""

    directory: Path
    process: subprocess.Popen[str] = field(init=False)
    started: int = 0

    def __post_init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self.directory,
        )

    def ask(self, order: Mapping[str, Any]) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], TIMEOUT)[0], "no answer: a process hangs"
        return int(self.process.stdout.readline())

    def start(
        self,
        *arguments: str,
        size: int = 2,
        of: Mapping[int, Sequence[str]] = {},
        first: Mapping[int, str] = {},
    ) -> Ranks:
        """Start a command in several processes.

        Args:
            arguments: of `longscan`.
            size: how many.
            of: further arguments of a rank.
            first: what a rank does before.
        """
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.started += 1
        ranks = Ranks([], [], self)
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            log = self.directory / f"run-{self.started}-{rank}.log"
            order = {
                "environment": {"MASTER_ADDR": "127.0.0.1", **{key: str(n) for key, n in place.items()}},
                "arguments": [*arguments, *of.get(rank, ())],
                "first": first.get(rank, ""),
                "log": str(log),
            }
            ranks.pids.append(self.ask(order))
            ranks.logs.append(log)
        return ranks

    def run(self, *arguments: str, size: int = 2) -> Ranks:
        """Run a command in several processes, or in one; all succeed."""
        ranks = self.start(*arguments, size=size)
        codes = ranks.wait()
        assert codes == [0] * size, ranks.said()
        return ranks

    def close(self) -> None:
        self.process.communicate()  # ends at the end of its input


def until_step(directory: Path, step: int) -> None:
    """Wait until a run has recorded a step."""
    for _ in range(TIMEOUT * 100):
        path = directory / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came")
