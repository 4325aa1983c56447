"""The house: who may import whom, and how large a room may get."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import longscan
from longscan.models import LINEAGE, ModelEntry

SOURCE = Path(longscan.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = [
    path for path in FILES if path != SOURCE / "__init__.py"
]  # the public page names everything, lazily

# a file imports only from its left
ORDER = [
    *(
        "errors",
        "checks",
        "optional",
        "text_table",
        "files",
        "config",
        "order",
        "archives",
        "labelled_arrays",
    ),
    *("ops", "models"),
    *(
        "tokenizer_json",
        "special_tokens",
        "tokenizer",
        "wordpiece",
        "words",
        "documents",
        "data",
        "pairs",
        "wordvectors",
        "masking",
        "tasks",
        "layouts",
        "weights",
        "gguf_check",
        "gguf_tokenizer",
        "gguf_files",
        "locate",
        "checkpoint",
        "encoders",
        "convert",
        "sequence_checkpoint",
    ),
    *("reading", "prefix", "snapshots", "signals"),
    *(
        "sampling",
        "request",
        "speculate",
        "engine",
        "search",
        "bleu",
        "translation",
        "bar",
        "generate",
        "quantize",
        "evaluate",
    ),
    *(
        "drawing",
        "plot_memory",
        "plot",
        "progress",
        "recipe",
        "runs",
        "trainer",
        "run",
        "run_command",
        "pretrain",
        "train",
        "translate",
    ),
    *(
        "text_input",
        "examples",
        "sequence_tables",
        "sequences",
        "synthetics",
        "classify_sequences",
        "classify",
        "fill_mask",
        "embed",
    ),
    "remember",
    *("reproduce", "bench", "catalog", "doctor", "cli"),
]
# inside models/: what all of them share, in order too; who descends from whom stands in LINEAGE
COMMON = (
    *(
        "layers",
        "model",
        "loss",
        "state_file",
        "state",
        "decoder",
        "mixer",
        "sections",
        "backbone",
        "ssm",
        "lti",
        "quantized",
    ),
    "translator",
)
PARENTS = {
    **{entry.name: entry.parents for entry in LINEAGE},
    # what is no language model or translator of its own
    "memory": ("hippo",),
    "neural_ode": ("lstm",),
}


def ancestors(model: str) -> set[str]:
    """Return the parents of a model, theirs, and so on."""
    return {name for parent in PARENTS.get(model, ()) for name in (parent, *ancestors(parent))}


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield what a file imports of longscan, as paths inside the package: ("ops", "scan")."""
    package = ("longscan", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "longscan")


def label(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").as_posix()


def test_every_file_has_its_place() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms <= set(ORDER), f"give {sorted(rooms - set(ORDER))} a place in ORDER"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_come_from_the_left(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    left = set(ORDER[: ORDER.index(room)])
    for name in imported(path):
        if name and name[0] in ORDER:  # other names are those of the public page: longscan.__version__
            assert name[0] in left | {room}, (
                f"{label(path)} imports {'.'.join(name)}, which is not to its left"
            )


@pytest.mark.parametrize("path", sorted((SOURCE / "models").glob("[!_]*.py")), ids=label)
def test_models_import_their_ancestors_only(path: Path) -> None:
    model = path.stem
    if model in COMMON:
        allowed = set(COMMON[: COMMON.index(model)])
    else:
        assert model in PARENTS, f"say in LINEAGE whom {model} descends from"
        allowed = {*COMMON, *ancestors(model)}
    siblings = {other.stem for other in path.parent.glob("*.py")}
    for name in imported(path):
        if name[0] == "models" and name[1] in siblings:
            assert name[1] in allowed, f"{model} imports {name[1]}, which is no ancestor"


def test_parents_come_before_their_children() -> None:
    order = [entry.name for entry in LINEAGE]
    for entry in LINEAGE:
        assert set(entry.parents) <= set(order[: order.index(entry.name)]), entry.name


@pytest.mark.parametrize("entry", LINEAGE, ids=lambda entry: entry.name)
def test_a_model_file_names_the_parents_of_its_entry(entry: ModelEntry) -> None:
    text = ast.get_docstring(ast.parse((SOURCE / "models" / f"{entry.name}.py").read_text())) or ""
    told = re.search(r"Parents?: (.*?)\n\n", text, re.DOTALL)
    assert told or not entry.parents
    words = told[1].lower().replace(" ", "_") if told else ""
    missing = [name for name in entry.parents if name not in words]
    assert not missing, f"{entry.name}: Parent(s) in the docstring leaves out {missing}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_print(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, f"print() in lines {lines}: results go through typer.echo, progress to stderr"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_is_a_few_screens(path: Path) -> None:
    n_lines = len(path.read_text().splitlines())
    assert n_lines <= 500, f"{n_lines} lines: a new idea is a new file"


def test_public_names_are_listed_once_and_lazily() -> None:
    assert longscan.__all__ == sorted(longscan.__all__, key=lambda name: (name.islower(), name))
    assert set(longscan._MODULE_OF) | {"__version__", "models", "ops"} == set(longscan.__all__)
