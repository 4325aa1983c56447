"""What torchrun says in the environment: who is who, how to join the others, and whether it is a restart.

torchrun starts the same command in every process, and all of them again when one dies.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longscan.errors import LongscanError, UsageError
from longscan.training.distributed import ALONE, Group, LostError

__all__ = ["Launch", "command", "joined", "launch", "note_start", "started_before"]

PATIENCE = timedelta(days=7)  # to wait while the first process prepares the data, which may be much text


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which of how many processes torchrun started this one as, in all and on this machine."""

    rank: int
    size: int
    local: int

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0


def launch() -> Launch:
    """Return what torchrun says in the environment; one process if it started none or one.

    Raises:
        LongscanError: the environment is incomplete, or no number.
    """
    if "MASTER_ADDR" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return Launch(rank=0, size=1, local=0)
    try:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise LongscanError(
            f"RANK, WORLD_SIZE and LOCAL_RANK: expected a number in each, as torchrun sets them ({error}). "
            "Start the command with torchrun, or unset MASTER_ADDR to train in one process."
        ) from error
    if not 0 <= rank < size or "MASTER_PORT" not in os.environ:
        raise LongscanError(
            f"RANK and MASTER_PORT: expected a rank below WORLD_SIZE and a port, got rank {rank} of {size} "
            f"and port {os.environ.get('MASTER_PORT', 'none')}. Start the command with torchrun, or unset "
            "MASTER_ADDR to train in one process."
        )
    return Launch(rank=rank, size=size, local=local)


def command(arguments: str) -> str:
    """Return a command of longscan that starts as many processes as torchrun did.

    Args:
        arguments: after `longscan`.
    """
    place = launch()
    if place.size == 1:
        return f"longscan {arguments}"
    each = int(os.environ.get("LOCAL_WORLD_SIZE", place.size))
    machines = place.size // each
    where = "--standalone"
    if machines > 1:  # the address is not in the environment
        where = f"--nnodes {machines} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    return f"torchrun {where} --nproc-per-node {each} -m longscan {arguments}"


def note_start(directory: Path) -> None:
    """Note with torchrun that this command started a run, for `started_before`.

    Args:
        directory: the run's.
    """
    if (store := _torchrun_store()) is not None:
        store.set(_key(directory), "started")


def started_before(directory: Path) -> bool:
    """Whether this very command started a run, before a process of it died and torchrun restarted all.

    Another's run is not continued, even if torchrun tries again after that was refused.

    Args:
        directory: the run's.
    """
    store = _torchrun_store()
    return store is not None and store.check([_key(directory)])


def _torchrun_store() -> Any:
    """Return the store of torchrun, which outlives the processes; None if something else started them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, wait_for_workers=False
    )


def _key(directory: Path) -> str:
    """Return the name of a run in the store."""
    return f"longscan/{os.path.abspath(directory)}"


def _meet(store: Any, place: Launch, timeout: float) -> str:
    """Return a name that all processes of this start have, and none of an earlier start.

    torchrun's store still holds the addresses of processes that died before a restart: who reads one waits
    for nobody. So each process asks under a name of its own, and the first answers until all have its name.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    if not place.first:
        store.set(f"longscan/ask/{place.rank}", own)
        store.wait([f"longscan/answer/{own}"], timedelta(seconds=timeout))
        name = str(store.get(f"longscan/answer/{own}").decode())
        store.set(f"longscan/here/{name}/{place.rank}", "yes")
        return name
    missing = set(range(1, place.size))
    while missing:
        for rank in missing:
            if store.check([f"longscan/ask/{rank}"]):
                store.set(f"longscan/answer/{store.get(f'longscan/ask/{rank}').decode()}", own)
        missing = {rank for rank in missing if not store.check([f"longscan/here/{own}/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise LostError(f"process {min(missing)} of {place.size} did not start within {timeout:g} s.")
        time.sleep(0.02)
    return own


@contextlib.contextmanager
def joined(verb: str, device: str, timeout: float | None, context_size: int = 1) -> Iterator[Group]:
    """Join the other processes of this run, if torchrun started several.

    Args:
        verb: the verb, for messages.
        device: of the training.
        timeout: seconds to wait for the others; None if the verb trains in one process only.
        context_size: how many processes share a sequence.

    Yields:
        The processes.

    Raises:
        UsageError: there are several, and the verb or the device is for one; or they don't divide.
        LostError: the others are not there.
    """
    place = launch()
    if place.size % context_size:
        raise UsageError(
            f"--context-parallel: expected a divisor of the number of processes, which is {place.size}, got "
            f"{context_size}. Choose another, or start a multiple of {context_size} processes with torchrun."
        )
    if place.size == 1:
        yield ALONE
        return
    if timeout is None:
        raise UsageError(
            f"{verb}: expected one process, got {place.size}: several train only the causal models of "
            "longscan train. Start it without torchrun."
        )
    _take_device(device, place.local)
    group = Group(place.rank, place.size, timeout, context_size=context_size)
    with group.connected():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        limit, store = timedelta(seconds=timeout), _torchrun_store()
        if store is None:
            dist.init_process_group(backend, timeout=limit)
        else:
            store = dist.PrefixStore(_meet(store, place, timeout), store)  # type: ignore[attr-defined]
            dist.init_process_group(
                backend, timeout=limit, store=store, rank=place.rank, world_size=place.size
            )
        group.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        with group.connected():
            yield group
    finally:
        dist.destroy_process_group()


def _take_device(device: str, local: int) -> None:
    """Give each process on this machine a CUDA device of its own."""
    if device.partition(":")[0] != "cuda":
        return
    if device != "cuda":
        raise UsageError(f"--device: expected cuda, as each process takes a device of its own, got {device}.")
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"--device cuda: expected one for each process, this machine has {torch.cuda.device_count()}. "
            "Give torchrun a lower --nproc-per-node."
        )
    torch.cuda.set_device(local)
