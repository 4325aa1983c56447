"""The frame of the command line; the verbs have tests of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import longscan
from longscan import cli as frame
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS
from longscan.models.sequence_classifier import BODIES

Cli = Callable[..., Any]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., None]], None]]:
    """Put a function in the place of a verb."""

    def replace(function: Callable[..., None]) -> None:
        module = types.ModuleType("stand_in")
        module.command = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setitem(frame.VERBS, "evaluate", ("stand_in", "A stand-in."))

    return replace


def raising(error: BaseException) -> Callable[..., None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize("argv", [["--help"], []], ids=["help", "nothing"])
def test_help_lists_the_verbs(cli: Cli, argv: list[str]) -> None:
    done = cli(*argv)
    assert (done.code, done.err) == (0, "")
    assert all(f"  {verb} " in done.out for verb in frame.VERBS)


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.out, done.err) == (0, f"longscan {longscan.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["genrate"],
            "error: No such command 'genrate'. Did you mean 'generate'?\n       See `longscan --help`.",
        ),
        (["--colour"], "error: No such option: --colour\n       See `longscan --help`."),
        (["doctor", "--colour"], "error: No such option: --colour\n       See `longscan doctor --help`."),
        (["models", "mmba"], "error: no model called 'mmba'; did you mean 'mamba'?"),
        (
            ["models", "vim_tiny"],
            "error: no model called 'vim_tiny': it is a preset of vim, see `longscan models vim`",
        ),
    ],
)
def test_misuse_exits_with_2(cli: Cli, argv: list[str], words: str) -> None:
    done = cli(*argv)
    assert (done.code, done.out) == (2, "")
    assert done.err == words + "\n"


@pytest.mark.parametrize("name", frame.VERBS)
def test_every_verb_describes_itself(cli: Cli, name: str) -> None:
    done = cli(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: longscan {name} ")
    assert "Args:" not in done.out
    assert "Raises:" not in done.out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            LongscanError("no text in pics/.\nTrain takes .txt."),
            1,
            "error: no text in pics/.\n       Train takes .txt.\n",
        ),
        (
            UsageError("--top-p: expected at most 1, got 3."),
            2,
            "error: --top-p: expected at most 1, got 3.\n",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            1,
            "error: a.txt: No such file or directory\n",
        ),
        (OSError("offline"), 1, "error: offline\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (typer.Exit(3), 3, ""),
    ],
    ids=["longscan", "usage", "file", "os", "interrupt", "exit"],
)
def test_errors_become_one_message_and_a_code(
    cli: Cli, verb: Any, error: BaseException, code: int, words: str
) -> None:
    verb(raising(error))
    done = cli("evaluate")
    assert (done.code, done.out, done.err) == (code, "", words)


def test_a_traceback_only_with_debug(cli: Cli, verb: Any) -> None:
    verb(raising(RuntimeError("out of cheese")))
    plain, debug = cli("evaluate"), cli("--debug", "evaluate")
    assert plain.code == debug.code == 1
    assert "error: RuntimeError: out of cheese\n" in plain.err
    assert "--debug" in plain.err
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err


def test_a_verb_is_built_from_its_function(cli: Cli, verb: Any) -> None:
    def command(count: Annotated[int, typer.Option(help="How many.")] = 1) -> None:
        """Say something.

        Args:
            count: how many times.
        """
        typer.echo("ho " * count)

    verb(command)
    shown = cli("evaluate", "--help")
    assert "Say something." in shown.out
    assert "How many." in shown.out
    done = cli("evaluate", "--count", 2)
    assert (done.code, done.out, done.err) == (0, "ho ho \n", "")
    assert cli("evaluate", "--count", "two").code == 2


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put two subcommands in the place of a verb."""

    def sing(song: Annotated[str, typer.Argument(help="Which.")]) -> None:
        """Sing a song.

        Raises:
            LongscanError: nobody knows it.
        """
        if song == "unknown":
            raise LongscanError("nobody knows it.")
        typer.echo(f"la {song}")

    def hum() -> None:
        """Hum."""

    module = types.ModuleType("stand_in")
    module.commands = {"sing": sing, "hum": hum}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(frame.VERBS, "evaluate", ("stand_in", "Make music."))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("argv", [[], ["--help"]], ids=["nothing", "help"])
def test_a_group_lists_its_commands(cli: Cli, argv: list[str]) -> None:
    done = cli("evaluate", *argv)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: longscan evaluate ")
    assert "Make music." in done.out
    assert "  sing  Sing a song." in done.out


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (
            ["snig"],
            2,
            "error: No such command 'snig'. Did you mean 'sing'?\n       See `longscan evaluate --help`.",
        ),
        (["sing"], 2, "error: Missing argument 'song'.\n       See `longscan evaluate sing --help`."),
        (
            ["sing", "a", "-x"],
            2,
            "error: No such option: -x\n       See `longscan evaluate sing --help`.",
        ),
        (["sing", "unknown"], 1, "error: nobody knows it."),
    ],
    ids=["command", "argument", "option", "failure"],
)
def test_misuse_of_a_group(cli: Cli, argv: list[str], code: int, words: str) -> None:
    done = cli("evaluate", *argv)
    assert (done.code, done.out, done.err) == (code, "", words + "\n")


@pytest.mark.usefixtures("group")
def test_a_command_of_a_group(cli: Cli) -> None:
    assert cli("evaluate", "sing", "solo").out == "la solo\n"
    shown = cli("evaluate", "sing", "--help").out
    assert shown.startswith("Usage: longscan evaluate sing ")
    assert "Raises:" not in shown


def test_long_messages_wrap_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    frame._complain("word " * 20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith("       word") for line in lines[1:])


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds longscan in the source tree."""
    source = str(Path(longscan.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {source!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )


def test_help_loads_no_torch() -> None:
    done = python(
        "import longscan\nfrom longscan.cli import main\n"
        "assert main(['--help']) == 0\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_generate_loads_one_model_only() -> None:
    done = python(
        "from longscan.cli import main\n"
        "assert main(['generate', '-q', '--max-new-tokens', '1', 'a']) == 0\n"
        "from longscan.models import MODELS\n"
        "print([name for name in MODELS if f'longscan.models.{name}' in sys.modules], file=sys.stderr)"
    )
    assert (done.returncode, done.stderr) == (0, "['mamba']\n")


def test_warnings_are_one_line() -> None:
    done = python(
        "import types, warnings\nfrom longscan import cli\n"
        "module = types.ModuleType('stand_in'); module.command = lambda: warnings.warn('mind the gap')\n"
        "sys.modules['stand_in'] = module; cli.VERBS['bench'] = ('stand_in', 'A stand-in.')\n"
        "sys.exit(cli.main(['bench']))"
    )
    assert (done.returncode, done.stderr) == (0, "warning: mind the gap\n")


def test_a_closed_pipe_is_quiet() -> None:
    done = python(
        "import os\nfrom longscan.cli import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(main(['models']))"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_public_functions_stay_functions() -> None:
    done = python(
        "import longscan.checkpoints.save, longscan.commands.generate, longscan.commands.evaluate\n"
        "import longscan.training.train\n"
        "names = ('convert', 'generate', 'evaluate', 'train')\n"
        "assert all(callable(getattr(longscan, name)) for name in names)\n"
        "for name in longscan.__all__: getattr(longscan, name)\n"
        "assert dir(longscan) == longscan.__all__"
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        longscan.nothing  # noqa: B018


def test_models_table_and_details(cli: Cli) -> None:
    table = cli("models")
    assert table.code == 0
    assert "2023  mamba " in table.out
    names = [line.split()[1] for line in table.out.splitlines()[:-1]]
    assert {*MODELS, *BODIES} == {*names}
    for name in names:
        assert cli("models", name).code == 0
    page = cli("models", "mamba")
    assert "129,135,360" in page.out  # as published
    assert "2312.00752" in page.out
    rows = json.loads(cli("models", "--json").out)
    assert [row["year"] for row in rows] == sorted(row["year"] for row in rows)
    details = json.loads(cli("models", "mamba", "--json").out)
    assert details["presets"]["130m"]["parameters"] == 129_135_360
    for name in ("vim", "vmamba", "videomamba"):
        _, (header, tiny, *_) = (lines := cli("models", name).out.splitlines())[:5], lines[5:]
        assert header.endswith("weights      image size")
        assert (tiny.split()[0], tiny.endswith("32 × 32")) == ("tiny", True)


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("doctor")
    assert (done.code, done.err) == (0, "")
    assert f"longscan {longscan.__version__}" in done.out
    assert "23 ops ok" in done.out
    optional = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in optional["optional-dependencies"].items():
        if extra != "dev":
            assert all(f"{re.split('[<>=]', package)[0]} " in done.out for package in packages)
    report = json.loads(cli("doctor", "--json").out)
    assert report["self_check"]["ok"]
    assert max(report["self_check"]["errors"].values()) < 1e-5


def test_doctor_notices_a_wrong_kernel(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from longscan import ops

    right = ops.causal_conv1d
    monkeypatch.setattr(ops, "causal_conv1d", lambda *args: (right(*args)[0] * 1.01, right(*args)[1]))
    done = cli("doctor")
    assert done.code == 1
    assert "FAILED: causal_conv1d (error" in done.out


def test_set_is_another_name_of_option(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    for flag in ("--option", "--set"):
        done = cli("train", tmp_path / "a.txt", "--out", tmp_path / "run", flag, "d_wrong=1")
        assert (done.code, "has no field 'd_wrong'" in done.err) == (2, True)
