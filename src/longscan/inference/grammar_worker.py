"""The process that compiles a grammar of a stranger first: it may take all memory, or crash the library.

It imports nothing of longscan. A request is the text of a tokenizer.json with an end-of-text id, once, and
then grammars with limits; the answer to each is an error, or "".
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from typing import Any

import llguidance

MEMORY = 96 << 20  # bytes that grammars may take
SECONDS = 1.0  # of the processor, for one


def serve() -> None:
    """Answer requests until stdin ends."""
    tokenizer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if "tokenizer" in request:
            tokenizer = llguidance.LLTokenizer(request["tokenizer"], eos_token=request["eos_id"])
            answer = ""
            _limit_memory()
        else:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
            answer = compiled(tokenizer, **request)
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def compiled(tokenizer: Any, grammar: str, limits: dict[str, Any]) -> str:
    """Return what is wrong with a grammar, after compiling it and finding what may come first.

    Args:
        tokenizer: of llguidance.
        grammar: likewise.
        limits: likewise.
    """
    matcher = llguidance.LLMatcher(
        tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits)
    )
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error()) if matcher.is_error() else ""


def _limit_memory() -> None:
    """Limit the memory of this process, where the system can, to what it has and some more."""
    with contextlib.suppress(ValueError, OSError):
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    serve()
