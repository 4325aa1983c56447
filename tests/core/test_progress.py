"""What a run shows of its progress, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from longscan.core.progress import Snapshot, Terminal, duration


def test_plain_lines_where_nobody_watches() -> None:
    stream = io.StringIO()
    terminal = Terminal(10, Console(file=stream))
    for step in range(1, 21):
        valid = "1.500 bits/byte" if step > 10 else None
        terminal.show(
            Snapshot(
                step=step,
                total=20,
                loss=2.0,
                valid=valid,
                tokens_per_second=1234.5,
                seconds_left=400.0,
            )
        )
    terminal.close()
    assert stream.getvalue().splitlines() == [
        "step 1/20  loss 2.000  1,234 tok/s  7 min left",
        "step 10/20  loss 2.000  1,234 tok/s  7 min left",
        "step 20/20  loss 2.000  valid 1.500 bits/byte  1,234 tok/s  7 min left",
    ]


def test_a_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    terminal = Terminal(10, Console(file=stream, force_terminal=True, width=120, highlight=False))
    snapshot = Snapshot(
        step=5, total=20, loss=2.0, valid="1.500 bits/byte", tokens_per_second=99.0, seconds_left=9000.0
    )
    terminal.show(snapshot)
    terminal.line("a [line] in\n\x1b[2Jbetween")
    terminal.close()
    shown = stream.getvalue()
    assert "step 5/20" in shown
    assert "25 %" in shown
    assert "loss 2.000  valid 1.500 bits/byte  99 tok/s  2 h 30 min left" in shown
    assert "a [line] in" in shown
    assert "\N{REPLACEMENT CHARACTER}[2Jbetween" in shown


def test_the_bar_ends_with_the_last_validation() -> None:
    stream = io.StringIO()
    terminal = Terminal(10, Console(file=stream, force_terminal=True, width=120, highlight=False))
    terminal.show(
        Snapshot(
            step=20,
            total=20,
            loss=2.0,
            valid="1.5 nats/text",
            tokens_per_second=9.0,
            seconds_left=0.0,
            item="texts",
        )
    )
    terminal.validated("1.25 nats/text")
    terminal.close()
    *_, last = stream.getvalue().split("step 20/20")
    assert "valid 1.25 nats/text  9 texts/s" in last


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (5900, "98 min"), (11100, "3 h 05 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
