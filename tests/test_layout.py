"""The house: which rooms there are, who may import whom, and how long a file may get.

`python tests/test_layout.py` prints the import graph between the rooms as a table.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import longscan
from longscan.models import MODELS, ModelEntry

SOURCE = Path(longscan.__file__).parent
# the public page names everything, lazily
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")

# a room imports only from the rooms to its left
ROOMS = (
    *("errors", "core", "ops", "models", "tokenizers", "data", "checkpoints", "plotting", "inference"),
    *("evaluation", "training", "reproduce", "bench", "serve", "compat", "hf", "commands", "cli", "__main__"),
)
# inside models/common, in order too
COMMON = (
    *(
        "layers",
        "adapted",
        "model",
        "entry",
        "losses",
        "state_file",
        "growable",
        "state",
        "native_decode",
        "mixer",
    ),
    *(
        "lora",
        "packing",
        "attention",
        "conv_attention",
        "feed_forward",
        "experts",
        "backbone",
        "native_stack",
    ),
    *("language_model", "state_space", "lti", "dense_lti", "quantization", "encoder_decoder", "summary"),
    *("hippo_measures", "patches", "vision", "patch_tokens", "gated_mlp", "trapezoid"),
)
PARENTS = {
    **{entry.name: entry.parents for entry in MODELS.values()},
    # what is no language model or translator of its own
    "hippo_memory": ("hippo",),
    "hybrid_config": ("llama", "mamba", "mamba2"),
    "hybrid": ("hybrid_config",),
    "neural_ode": ("lstm",),
}
# in models/, what is made of any of them
ANY = ("registry", "sequence_classifier")
MAX_LEVELS = 10
MAX_LINES = 350
# longer ones, and why they are one idea
LONG: dict[str, str] = {
    "checkpoints/load": "one way from a name to a model, with an overload for each kind",
    "models/common/state": "one class: the state of a model, and what is done with one",
    "inference/engine": "one class: the slots, and how rows join, decode and leave",
    "models/mamba2": "one paper: the sizes of a mixer, the mixer and the model",
    "models/mamba3": "one paper: the sizes of a mixer, the mixer and the model",
    "models/zamba2": "one paper: the shared block, its layers and the model",
    "models/transformer": "one paper: attention, layer and model are read together",
    "models/bert": "one paper: the encoder, its two heads and the pre-training loss",
    "models/s4": "one paper: the decomposition, the kernel and the recurrence of one system",
    "ops/scan": "one op, in the five paragraphs of every op",
    "ops/rotary": "likewise, and the composite for any device",
    "training/run": "one class: how a run starts, stops and resumes",
}
# where results are printed and the process may end
SHELL = ("commands", "cli", "__main__")


@cache
def imported(path: Path) -> frozenset[tuple[str, ...]]:
    """Return what a file imports of longscan, as paths inside the package: ("ops", "scan")."""
    names: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}, line {node.lineno}: expected an absolute import"
            base = (node.module or "").split(".")
            names |= {(*base, alias.name) for alias in node.names}
    return frozenset(name[1:] for name in names if name[0] == "longscan" and len(name) > 1)


def label(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def graph() -> dict[str, dict[str, int]]:
    """Return room -> room it imports -> the number of its files that do."""
    arrows: dict[str, dict[str, int]] = {room: {} for room in ROOMS}
    for path in FILES:
        room = room_of(path)
        for other in {name[0] for name in imported(path)} & set(ROOMS) - {room}:
            arrows[room][other] = arrows[room].get(other, 0) + 1
    return arrows


def levels() -> dict[str, int]:
    """Return room -> how many rooms lie below it on the longest path."""
    arrows, level = graph(), dict[str, int]()
    for room in ROOMS:
        level[room] = 1 + max((level[other] for other in arrows[room]), default=-1)
    return level


def ancestors(model: str) -> set[str]:
    """Return the parents of a model, theirs, and so on."""
    return {name for parent in PARENTS.get(model, ()) for name in (parent, *ancestors(parent))}


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_every_file_is_in_a_room() -> None:
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_come_from_the_left(path: Path) -> None:
    room = room_of(path)
    right = set(ROOMS[ROOMS.index(room) + 1 :])
    for name in imported(path):
        assert name[0] not in right, f"{label(path)} imports {'.'.join(name)}, which is to its right"


def test_the_house_is_low() -> None:
    assert max(levels().values()) < MAX_LEVELS


@pytest.mark.parametrize("path", sorted((SOURCE / "models" / "common").glob("[!_]*.py")), ids=label)
def test_what_models_share_has_an_order(path: Path) -> None:
    right = set(COMMON[COMMON.index(path.stem) :])
    for name in imported(path):
        assert name[0] != "models" or name[1] == "common", f"{label(path)} imports {'.'.join(name)}"
        assert name[:2] != ("models", "common") or name[2] not in right, f"{label(path)} imports {name[2]}"


@pytest.mark.parametrize("path", sorted((SOURCE / "models").glob("[!_]*.py")), ids=label)
def test_models_import_their_ancestors_only(path: Path) -> None:
    siblings = {other.stem for other in path.parent.glob("[!_]*.py")}
    if path.stem in ANY:
        return
    assert path.stem in PARENTS, f"say in its entry whom {path.stem} descends from"
    for name in imported(path):
        if name[0] == "models" and name[1] in siblings:
            assert name[1] in ancestors(path.stem), f"{path.stem} imports {name[1]}, which is no ancestor"


def test_parents_come_before_their_children() -> None:
    order = list(MODELS)
    for entry in MODELS.values():
        assert set(entry.parents) <= set(order[: order.index(entry.name)]), entry.name


@pytest.mark.parametrize("entry", MODELS.values(), ids=lambda entry: entry.name)
def test_a_model_file_names_the_parents_of_its_entry(entry: ModelEntry) -> None:
    text = ast.get_docstring(ast.parse((SOURCE / "models" / f"{entry.name}.py").read_text())) or ""
    stated = re.search(r"Parents?: (.*?)\n\n", text, re.DOTALL)
    assert stated or not entry.parents
    words = stated[1].lower().replace(" ", "_").replace("-", "") if stated else ""
    missing = [name for name in entry.parents if name not in words]
    assert not missing, f"{entry.name}: Parent(s) in the docstring leaves out {missing}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) not in SHELL], ids=label)
def test_only_commands_print_and_exit(path: Path) -> None:
    assert ("typer",) not in {
        tuple(alias.name.split(".")[:1])
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    }
    for line, name in calls(path):
        assert name not in ("print", "exit", "quit", "sys.exit", "os._exit"), f"line {line}: {name}()"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in SHELL], ids=label)
def test_no_print(path: Path) -> None:
    for line, name in calls(path):
        assert name != "print", f"line {line}: results go through typer.echo, progress to stderr"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_is_a_few_screens(path: Path) -> None:
    n_lines = len(path.read_text().splitlines())
    if label(path) in LONG:
        assert n_lines > MAX_LINES, f"{label(path)} has {n_lines} lines: take it out of LONG"
    else:
        assert n_lines <= MAX_LINES, f"{n_lines} lines: two ideas? If not, say why in LONG"


def test_public_names_are_listed_once_and_lazily() -> None:
    assert longscan.__all__ == sorted(longscan.__all__, key=lambda name: (name.islower(), name))
    assert {name for names in longscan._HOME.values() for name in names} | {
        "__version__",
        "models",
        "ops",
    } == set(longscan.__all__)


def table() -> str:
    """Return the import graph as text: a room, its level, and how many of its files import which room."""
    arrows, level = graph(), levels()
    n_files = {room: sum(room_of(path) == room for path in FILES) for room in ROOMS}
    rows = [f"{'room':<12}{'level':>6}{'files':>6}  imports (files that do)"]
    for room in ROOMS:
        to = ", ".join(f"{other} {arrows[room][other]}" for other in ROOMS if other in arrows[room])
        rows.append(f"{room:<12}{level[room]:>6}{n_files[room]:>6}  {to}")
    n_arrows = sum(map(len, arrows.values()))
    return "\n".join([*rows, f"{len(ROOMS)} rooms, {max(level.values()) + 1} levels, {n_arrows} arrows"])


if __name__ == "__main__":
    print(table())
