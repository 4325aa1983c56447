"""Kills runs of two processes at random moments and resumes them; each ends as if nothing had happened.

    python tests/kill_at_random.py --kills 100 --seed 0
    python tests/kill_at_random.py --kills 20 -- --context-parallel 2
    python tests/kill_at_random.py --kills 20 -- --shard

Half of the kills come at a random time, of one process or of both; the others when the first process opens,
renames or removes a file of the run, which it does when it starts and while it saves. Weights, moments of
AdamW and metrics have to be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import Parent, Ranks
from tiny_runs import TEXT, TINY, assert_same

SETTINGS = {**TINY, "sample_every": 0}
PATIENCE = 10  # seconds that a process may outlive another
FILE_MOMENTS = 90  # operations on files; a whole run has more, a resumed one fewer

KILLED_AT = """
import os, signal, sys
left = [{moment}]
def watch(event, arguments, events=("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")):
    if event in events and {run!r} in str(arguments[0]):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
"""


def kill_at_random(
    parent: Parent,
    directory: Path,
    kills: int,
    seed: int,
    more: Sequence[str] = (),
    say: Callable[[str], object] = lambda line: None,
) -> Counter[str]:
    """Train until so many processes were killed, and compare each run that ends; return what was killed when.

    Args:
        parent: starts the processes.
        directory: for the runs; has enough space for a few checkpoints.
        kills: how many.
        seed: of the moments.
        more: further flags of the runs.
        say: receives a line for each kill.

    Raises:
        AssertionError: a run ended in another way, or did not resume.
    """
    text = directory / "sums.txt"
    text.write_text(TEXT)
    settings = [
        part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    start, draw, counts = ["train", str(text), *settings, *more], random.Random(seed), Counter[str]()
    whole, run = directory / "whole", directory / "run"
    began = time.monotonic()
    parent.run(*start, "--out", str(whole))
    duration = time.monotonic() - began
    while True:
        begun = (run / "train.json").exists()
        command = ["train", "--resume", str(run)] if begun else [*start, "--out", str(run)]
        if counts["kills"] == kills:
            parent.run(*command)
        else:
            what, codes = _killed(parent, command, run, draw, duration)
            if -signal.SIGKILL in codes:
                counts.update(["kills", what, *_traces(run)])
                say(f"{counts['kills']:4}  {what}, exit codes {codes}")
                continue
            assert codes == [0, 0], f"a run that was not killed ended with {codes}"
        assert_same(run, whole)
        counts["runs"] += 1
        if counts["kills"] == kills:
            return counts
        shutil.rmtree(run)


def _killed(
    parent: Parent, command: Sequence[str], run: Path, draw: random.Random, duration: float
) -> tuple[str, list[int]]:
    """Start a run and kill it, unless it ends before; return what was killed, and the exit codes."""
    if draw.random() < 0.5:
        moment = KILLED_AT.format(moment=draw.randint(1, FILE_MOMENTS), run=str(run))
        return "process 0 at an operation on a file", _end(parent.start(*command, first={0: moment}))
    victims, delay = draw.choice([[0], [1], [0, 1]]), draw.uniform(0, 0.8 * duration)
    ranks = parent.start(*command)
    time.sleep(delay)
    for rank in victims:
        ranks.kill(rank, signal.SIGKILL)
    return f"process {' and '.join(map(str, victims))} at some time", _end(ranks)


def _end(ranks: Ranks) -> list[int]:
    """Wait for the processes, which say what happened without a traceback; return their exit codes.

    As torchrun does, end one that still waits for another which died before they met.
    """
    since = time.monotonic()
    while not all(ended := [_ended(pid) for pid in ranks.pids]):
        if not any(ended):
            since = time.monotonic()
        if time.monotonic() - since > PATIENCE:
            assert "step" not in ranks.said(), f"a process hangs, whose log is {ranks.logs}"
            for rank in range(len(ranks.pids)):
                ranks.kill(rank, signal.SIGKILL)
        time.sleep(0.05)
    codes = ranks.wait()
    for rank, code in enumerate(codes):
        said = ranks.said(rank)
        assert "Traceback" not in said, said
        assert code in (0, 1, -signal.SIGKILL), said
        assert code != 1 or "another of the 2 processes ended" in said or "did not start" in said, said
    return codes


def _ended(pid: int) -> bool:
    """Whether a process has ended, and only its exit code is left."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _traces(run: Path) -> list[str]:
    """Return what a kill left behind, of what is worth counting."""
    checkpoints = run / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    unfinished = any(name.startswith(".") and name.endswith(".new") for name in names)
    none = not any(name.startswith("step-") for name in names)
    return ["with an unfinished checkpoint"] * unfinished + ["without a checkpoint yet"] * none


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Kill as the command line says, and print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="further flags of the runs, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        parent = Parent(Path(name))
        try:
            counts = kill_at_random(parent, Path(name), given.kills, given.seed, given.more, _say)
        finally:
            parent.close()
    print(f"{counts.pop('kills')} kills, {counts.pop('runs')} runs that ended with the same bits")
    for what, n in counts.most_common():
        print(f"{n:4}  {what}")


if __name__ == "__main__":
    main()
