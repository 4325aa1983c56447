"""Options that several verbs share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from longscan.checkpoints.load import Precision

__all__ = [
    "Adapter",
    "Architecture",
    "AsJson",
    "BertArgument",
    "FigureOut",
    "ImageSize",
    "Json",
    "JsonLines",
    "JsonSchemaFile",
    "MinP",
    "ModelArgument",
    "Offline",
    "PrecisionOption",
    "Quiet",
    "Regex",
    "RepetitionPenalty",
    "Revision",
    "SamplingSeed",
    "Temperature",
    "Threads",
    "TokenizerName",
    "TopK",
    "TopP",
]

Adapter: TypeAlias = Annotated[
    str | None,
    typer.Option("--adapter", help="A LoRA adapter: PEFT's directory, or a run of `longscan finetune`."),
]
Architecture: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", help="Name of an image model, such as vim, if a weights file fits several."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FigureOut: TypeAlias = Annotated[Path, typer.Option(help="The figure to write: .png, .svg or .pdf.")]
ImageSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="Resize an image model to this height and width in pixels; default: the model's.",
    ),
]
ModelArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="A shipped model, a directory, or a hub id.")
]
BertArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="A BERT's directory or hub id.")
]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Offline: TypeAlias = Annotated[bool, typer.Option("--offline", help="Use only the hub's local cache.")]
PrecisionOption: TypeAlias = Annotated[
    Precision | None,
    typer.Option(
        "--precision",
        help="Precision of the weights in memory; w8a8 and w4a8: int8 and int4, with activations of 8 bits "
        "in prefill. Default: float32, or as quantised.",
    ),
]
JsonSchemaFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--json-schema", metavar="FILE", help="Generate JSON that follows the schema in this file."),
]
Regex: TypeAlias = Annotated[
    str | None, typer.Option("--regex", help="Generate text that this regular expression matches as a whole.")
]
TokenizerName: TypeAlias = Annotated[
    str | None,
    typer.Option("--tokenizer", help="A tokenizer.json, a directory or a hub id, if MODEL has none."),
]
Temperature: TypeAlias = Annotated[float, typer.Option(help="Sampling temperature; 0 = greedy.")]
TopK: TypeAlias = Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 = off.")]
TopP: TypeAlias = Annotated[
    float, typer.Option(help="Nucleus sampling: from the most likely tokens of this total probability.")
]
MinP: TypeAlias = Annotated[
    float, typer.Option(help="Drop tokens below this fraction of the largest probability.")
]
RepetitionPenalty: TypeAlias = Annotated[float, typer.Option(help="Above 1 penalises tokens used before.")]
SamplingSeed: TypeAlias = Annotated[int | None, typer.Option(help="Random seed; default: a new one.")]
Threads: TypeAlias = Annotated[int | None, typer.Option(help="CPU threads; default: torch's.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
JsonLines: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object per text.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
