"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = ["AsJson", "FigureOut", "Threads"]

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FigureOut: TypeAlias = Annotated[Path, typer.Option(help="The figure to write: .png, .svg or .pdf.")]
Threads: TypeAlias = Annotated[int | None, typer.Option(help="CPU threads; default: torch's.")]
