"""The documents are true: they agree with each other, with the command line, the tree and the code."""

from __future__ import annotations

import importlib.util
import inspect
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

import longscan
from longscan import cli as frame
from longscan.checkpoints.load import load
from longscan.commands.generate import command as generate_command
from longscan.models import MODELS, Mamba, MambaConfig, sequence_classifier
from longscan.models.common import dense_lti, lti, mixer, packing
from longscan.models.common.entry import LANGUAGE
from longscan.tokenizers.base import ByteTokenizer

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
READMES = (ENGLISH, CHINESE)
PAIRS = (
    READMES,
    *(
        (f"docs/{name}.md", f"docs/{name}.zh-CN.md")
        for name in (
            "attention",
            "benchmarks",
            "compat",
            "finetuning",
            "library",
            "memory",
            "quantization",
            "scale",
            "selection",
            "serving",
            "vision",
        )
    ),
)
DOCUMENTS = (
    *(document for pair in PAIRS for document in pair),
    *("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
)
SOURCE = ROOT / "src" / "longscan"
PLANNED = ("planned", "计划中")


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, *languages: str) -> list[str]:
    """The fenced blocks of a document, of some languages or all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if not languages or language in languages]


def prose(document: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)


def untranslated(block: str) -> list[str]:
    """A block without its comments and the remarks of a tree."""
    if "├──" in block:
        return [path for path, _ in tree(block)]
    return [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]


def tree(block: str) -> Iterator[tuple[str, str]]:
    """The paths of an annotated tree and what is said about them; a line may name several."""
    folders: list[str] = []
    for line in block.splitlines()[1:]:
        indent = re.match(r"[│├└─ ]*", line)
        assert indent
        names, _, remark = line[indent.end() :].partition("  ")
        folders = folders[: len(indent.group()) // 4 - 1]
        for name in names.split():
            yield "".join([*folders, name]), remark.strip()
        if names.endswith("/"):
            folders.append(names)


def links(document: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", prose(document))


def commands(document: str) -> list[list[str]]:
    """The lines of its shell blocks and the commands in its sentences, in words, without NAME=value."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    lines += re.findall(r"`((?:longscan|make) [^`]+)`", prose(document))
    words = (shlex.split(line, comments=True) for line in lines)
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in words]


# both languages


@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_sections(pair: tuple[str, str]) -> None:
    levels = [re.findall(r"^#+", prose(document), re.MULTILINE) for document in pair]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_code(pair: tuple[str, str]) -> None:
    english, chinese = ([untranslated(block) for block in blocks(document)] for document in pair)
    assert english == chinese


@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_numbers(pair: tuple[str, str]) -> None:
    english, chinese = (
        [
            re.findall(r"\d+(?:[.,]\d+)*", line)
            for line in prose(document).splitlines()
            if line.startswith("|")
        ]
        for document in pair
    )
    assert english == chinese


@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_links_and_markers(pair: tuple[str, str]) -> None:
    english, chinese = (
        {link.replace(".zh-CN.md", ".md") for link in links(document)} - {Path(pair[0]).name}
        for document in pair
    )
    assert english == chinese
    markers = [re.findall(r"^<!-- .* -->$", read(document), re.MULTILINE) for document in pair]
    assert markers[0] == markers[1]


@pytest.mark.parametrize("document", [chinese for _, chinese in PAIRS])
def test_chinese_pages_link_to_chinese_pages(document: str) -> None:
    own = Path(document).name.replace(".zh-CN.md", ".md")  # the one link to the other language
    for link in links(document):
        if link.endswith(".md") and not link.endswith(".zh-CN.md") and link != own:
            translation = (ROOT / document).parent / link.replace(".md", ".zh-CN.md")
            assert not translation.exists(), f"{link} is there in Chinese too"


# their words

TERMS = """
prefill, decode, throughput, latency, time to first token, hidden state, peak memory, streams, bit-exact,
KV cache, speculative decoding, draft model, prefix cache, continuous batching, beam search, beam width,
masked language modelling, next-sentence prediction, fine-tune, sentiment, reference translation,
label smoothing, early stopping, weight decay, accuracy, ablation, held-out, benchmark,
self-attention, receptive field, reconstruct
"""


def test_standard_terms_are_used() -> None:
    text = " ".join(" ".join(prose(document).split()) for document in DOCUMENTS).lower()
    assert [term for term in re.split(r",\s+", TERMS.strip()) if term.lower() not in text] == []


# what they name


def test_the_tree_exists() -> None:
    [block] = [block for block in blocks("CONTRIBUTING.md", "text") if "├──" in block]
    paths = dict(tree(block))
    assert len(paths) > 40
    for path, remark in paths.items():
        expected = not remark.startswith(PLANNED)
        assert (ROOT / path).exists() == expected, f"{path}: {'missing' if expected else 'no longer planned'}"
        assert not expected or (ROOT / path).is_dir() == path.endswith("/"), path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in links(document):
        if not link.startswith("https://"):
            assert ((ROOT / document).parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("document", READMES)
def test_ticks_are_what_works(document: str) -> None:
    lines = re.findall(r"^\| ((?:19|20)\d\d \| .*) \|$", read(document), re.MULTILINE)
    rows = [line.split(" | ") for line in lines]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    today = {row[1].lower().replace(" ", "_"): row[-1] for row in rows}
    for entry in MODELS.values():
        ticks = today.pop(entry.name).replace("语言", "language").split(" ✓")
        verbs = " ".join(entry.verbs).replace(" ".join(LANGUAGE), "language").split()
        assert [tick.strip() for tick in ticks if tick.strip()] == verbs
    assert all(what in PLANNED for what in today.values()), today


@pytest.mark.parametrize("document", DOCUMENTS)
def test_environment_variables_exist(document: str) -> None:
    source = "".join(path.read_text() for path in SOURCE.rglob("*.py"))
    for name in re.findall(r"LONGSCAN_\w+", read(document)):
        assert f'environ.get("{name}"' in source, name


def test_the_figure_of_the_line_shows_every_model() -> None:
    pytest.importorskip("matplotlib")
    figure = runpy.run_path(str(ROOT / "docs" / "figures" / "lineage.py"))
    assert set(figure["MODELS"]) == set(MODELS)
    assert len(figure["draw"]().axes) == 1


def test_the_figure_of_the_block_shows_every_parameter() -> None:
    pytest.importorskip("matplotlib")
    figure = runpy.run_path(str(ROOT / "docs" / "figures" / "selection.py"))
    names = {
        name.split(".")[0]
        for name, _ in Mamba.block(MambaConfig(d_model=16, n_layers=1, vocab_size=2)).mixer.named_parameters()
    }
    assert set(figure["PARAMETERS"]) == names
    assert len(figure["draw_block"]().axes) == 1
    mask = figure["decay"](torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(mask[2], torch.tensor([-5.0, -3.0, 0.0]).exp())


def test_the_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert newest[1] == longscan.__version__


# what they tell to type


@pytest.mark.parametrize("document", READMES)
def test_every_verb_is_shown(document: str) -> None:
    shown = {words[1] for words in commands(document) if words[0] == "longscan"}
    assert shown >= set(frame.VERBS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_parse(document: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for program, *arguments in commands(document):
        if program == "torchrun":
            parsed = torchrun_parser().parse_args(arguments)
            assert parsed.module
            program, arguments = parsed.training_script, parsed.training_script_args
        if program == "longscan":
            arguments = [word for word in arguments if word != "--debug"]
            if arguments != ["VERB"]:
                assert arguments[0] in frame.VERBS
                frame._load(arguments[0]).make_context(
                    arguments[0], arguments[1:]
                )  # raises if a flag is wrong
        elif program == "make":
            assert set(arguments) <= set(targets)
        else:
            assert [program, arguments[0]] == ["pip", "install"]
            assert {
                name for each in re.findall(r"\[(.*)\]", arguments[1]) for name in each.split(",")
            } <= set(extras)


@pytest.mark.parametrize("page", ["attention", "memory", "selection", "vision"])
def test_the_answers_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where blocks write
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(f"docs/{page}.md", "python")):
        if "sklearn" in block and importlib.util.find_spec("sklearn") is None:
            continue  # it only makes files for the commands
        exec(compile(block, f"docs/{page}.md, Python block {number + 1}", "exec"), names)


def test_the_model_of_the_guide_works() -> None:
    [code] = blocks("CONTRIBUTING.md", "python")
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    entry = names["ENTRY"]
    draw = torch.Generator().manual_seed(0)
    model = entry.cls(entry.config(**entry.presets["tiny"]), draw).double().eval()
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=draw)
    _, state = model.prefill(ids[:, :-1])
    decoded, _ = model.step(ids[:, -1], state)
    assert torch.allclose(decoded, model(ids).logits[:, -1], atol=1e-12)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the library page, one after the other, on a tiny random model in place of the one that ships."""

    def stand_in(name: str, kind: str = "language") -> Any:
        if kind == "image":
            return load(name, kind)
        assert name == inspect.signature(generate_command).parameters["model"].default
        config = MambaConfig(d_model=16, n_layers=2, vocab_size=257)
        return Mamba(config, torch.Generator().manual_seed(0)).eval(), ByteTokenizer()

    monkeypatch.setattr(longscan, "load", stand_in)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "docs" / "figures" / "house.png", "photo.png")
    names: dict[str, Any] = {}
    code = blocks("docs/library.md", "python")
    assert len(code) == 8
    assert blocks(ENGLISH, "python") == code[:1]
    for number, block in enumerate(code):
        exec(compile(block, f"docs/library.md, Python block {number + 1}", "exec"), names)
    saved, tokenizer = load(tmp_path / "my-model")
    assert saved.num_parameters() == names["model"].num_parameters()
    assert isinstance(tokenizer, ByteTokenizer)
    assert (names["state"].batch_size, names["fork"].batch_size) == (1, 3)
    assert names["loss"].requires_grad
    assert names["h0"].grad.abs().max() > 0
    assert torch.allclose(names["log_probs"], names["logits"].log_softmax(-1), atol=1e-6)
    assert torch.isfinite(names["vim"].head.weight.grad).all()
    assert names["video_logits"].shape == (2, names["moving"].config.n_classes)


# the guide


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_of_code_and_tests_exist(document: str) -> None:
    paths = re.findall(r"(?<![\w/.])(?:src/|tests/|csrc/|docs/|recipes/|\.ci/)[\w./-]*\w", read(document))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_classes_of_the_guide_have_these_methods() -> None:
    common = (mixer, packing, lti, dense_lti, sequence_classifier)
    rows = re.findall(r"^\| (`.*?) \| .*? \| (.*?) \| .*? \|$", read("CONTRIBUTING.md"), re.MULTILINE)
    assert len(rows) == 6
    for names, methods in rows:
        for name in re.findall(r"`(\w+)`", names):
            [cls] = {vars(module)[name] for module in common if name in vars(module)}
            assert [method for method in re.findall(r"`(\w+)`", methods) if not hasattr(cls, method)] == []
