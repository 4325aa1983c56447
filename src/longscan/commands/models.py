"""`longscan models`: a table of all models, and one of them in detail."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from longscan.commands._options import Json
from longscan.core.config import nearest
from longscan.errors import UsageError
from longscan.models import MODELS as LINE
from longscan.models import LanguageModel, ModelEntry, neural_ode, preset_owner
from longscan.models.common.vision import VisionModel
from longscan.models.sequence_classifier import SequenceConfig, SequenceModel

__all__ = ["command"]


class NeuralODE(SequenceModel):
    """The neural ODE as `longscan classify` trains it.

    Args:
        config: the sizes of its blocks.
    """

    def __init__(self, config: neural_ode.NeuralODEConfig) -> None:
        super().__init__(SequenceConfig(body="neural_ode", body_config=config, n_outputs=1, d_input=1))


# no language model, as its inputs have times; hence not in the registry
ASIDE = ModelEntry(
    name="neural_ode",
    kind="language",
    year=2018,
    paper="Neural Ordinary Differential Equations",
    arxiv="1806.07366",
    idea="a state that flows between observations",
    parents=("lstm",),
    cls=NeuralODE,
    config=neural_ode.NeuralODEConfig,
    presets=neural_ode.PRESETS,
    verbs=("classify",),
)
MODELS = {entry.name: entry for entry in sorted([*LINE.values(), ASIDE], key=lambda entry: entry.year)}


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The model to describe; default: list all of them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models, oldest first, with the verbs that each supports; or describe one of them.

    The names are those that --model takes.

    Args:
        name: a key of MODELS.
        as_json: for programs.

    Raises:
        UsageError: there is no model of that name.
    """
    if name is None:
        rows = [_row(entry) for entry in MODELS.values()]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False) if as_json else _table(rows))
        return
    if name not in MODELS:
        owner = preset_owner(name)
        hint = (
            f": it is a preset of {owner}, see `longscan models {owner}`" if owner else nearest(name, MODELS)
        )
        raise UsageError(f"no model called {name!r}{hint}")
    details = _details(MODELS[name])
    typer.echo(json.dumps(details, indent=2, ensure_ascii=False) if as_json else _page(details))


def _row(entry: ModelEntry) -> dict[str, Any]:
    """Return a model's row of the table."""
    return {
        "year": entry.year,
        "name": entry.name,
        "class": entry.cls.__name__,
        "idea": entry.idea,
        "verbs": list(entry.verbs),
    }


def _details(entry: ModelEntry) -> dict[str, Any]:
    """Return all details of a model; on the meta device, counting its parameters allocates nothing."""
    presets = {}
    for preset, fields in entry.presets.items():
        with torch.device("meta"):
            model = entry.cls(entry.config.from_dict(fields))
        presets[preset] = {**fields, "parameters": model.num_parameters()}
        if isinstance(model, VisionModel):
            presets[preset]["image_size"] = model.config.image_size
        if isinstance(model, LanguageModel):
            state = model.init_state(1)
            presets[preset] |= {"state_bytes": state.nbytes, "state_bytes_per_token": state.growth}
    return {
        **_row(entry),
        "paper": entry.paper,
        "arxiv": entry.arxiv,
        "parents": list(entry.parents),
        "file": str(Path(inspect.getfile(entry.cls)).resolve()),
        "presets": presets,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """Return the models as a table."""
    names, ideas = (max(len(row[key]) for row in rows) for key in ("name", "idea"))
    lines = [
        f"{row['year']}  {row['name']:{names}}  memory is {row['idea']:{ideas}}  "
        + " ".join(f"{verb} ✓" for verb in row["verbs"])
        for row in rows
    ]
    example = rows[-1]["name"]
    return "\n".join(
        [*lines, f"   longscan models {example}    paper, file, parents, presets, sizes in memory"]
    )


def _page(details: dict[str, Any]) -> str:
    """Return the details of one model as text; sizes are those of float32."""
    lines = [
        f"{details['name']}: {details['class']} ({details['year']}): memory is {details['idea']}",
        f"paper    {details['paper']}" + (f", arXiv {details['arxiv']}" if details["arxiv"] else ""),
        f"parents  {', '.join(details['parents']) or 'none'}",
        f"verbs    {', '.join(details['verbs'])}",
        f"file     {details['file']}",
    ]
    width = max(7, *map(len, details["presets"]))
    last = "image size" if any("image_size" in sizes for sizes in details["presets"].values()) else ""
    lines.append(f"{'preset':{width}}  {'parameters':>13}  weights  {last or 'state per text':>14}")
    for name, sizes in details["presets"].items():
        weights = _bytes(4 * sizes["parameters"])
        lines.append(f"{name:{width}}  {sizes['parameters']:>13,}  {weights:>7}  {_last(sizes):>14}")
    return "\n".join(lines)


def _last(sizes: dict[str, Any]) -> str:
    """Return the image size in pixels, or the size of a model's state, constant or per token."""
    if size := sizes.get("image_size"):
        return f"{size} × {size}"
    if growth := sizes.get("state_bytes_per_token"):
        return f"{_bytes(growth)}/token"
    return _bytes(sizes["state_bytes"]) if "state_bytes" in sizes else "-"


def _bytes(count: int) -> str:
    """Return a size in a unit that leaves at most three digits before the point."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
