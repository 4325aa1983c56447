"""States saved by name and restored, with OpenAI's own client, and what may go wrong with their files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import longscan
from adapters import write_adapter
from live_server import NAME, ask, post, running, serving_all
from longscan.checkpoints.adapter import beside
from longscan.errors import LongscanError
from longscan.inference.turns import Known
from longscan.models import LanguageModel
from longscan.models.common.state import SavedState
from longscan.serve import states
from longscan.serve.errors import ApiError
from longscan.serve.limits import Limits
from longscan.serve.served import serve_adapters
from longscan.serve.states import StateStore
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import find_template
from small_models import build

HELLO = [{"role": "user", "content": "Where is the king? " * 40}]
BIG = 1 << 30
Loaded = tuple[LanguageModel, Tokenizer]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model, tokenizer = longscan.load(NAME)
    assert tokenizer is not None
    return model, tokenizer


class Live:
    """A server with a directory of states, and a client."""

    def __init__(self, loaded: Loaded, home: Path, max_bytes: int = BIG, adapter: Path | None = None) -> None:
        self._loaded, self._home, self._max_bytes, self._adapter = loaded, home, max_bytes, adapter

    def __enter__(self) -> Live:
        template = find_template(self._loaded[1], None)
        others: dict[str, Any] = {}
        if self._adapter:
            others = {"other": (*beside(*self._loaded, self._adapter), template)}
        self._store = StateStore.open(self._home, self._max_bytes)
        # no memory for states but the directory: what is cached comes from there
        served = serve_adapters(
            (*self._loaded, template), NAME, others, Limits(cache_bytes=0), self._store.__enter__()
        )
        self._live = serving_all(served)
        _, self.port = self._live.__enter__()
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0
        )
        return self

    def __exit__(self, *args: Any) -> None:
        self._live.__exit__(None, None, None)
        self._store.__exit__(None, None, None)

    def chat(self, messages: list[Any], model: str = NAME, **more: str) -> Any:
        return self.client.chat.completions.create(
            model=model, messages=messages, max_tokens=12, seed=1, temperature=0, extra_body=more
        )

    def complete(self, prompt: Any, n: int = 12, **more: Any) -> Any:
        return self.client.completions.create(
            model=NAME, prompt=prompt, max_tokens=n, temperature=0, seed=1, extra_body=more
        )


@pytest.fixture
def live(loaded: Loaded, tmp_path: Path) -> Iterator[Live]:
    with Live(loaded, tmp_path / "states") as found:
        yield found


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def test_a_conversation_goes_on_after_a_restart(loaded: Loaded, tmp_path: Path) -> None:
    with Live(loaded, tmp_path) as live:
        first = live.chat(HELLO, save_state="talk")
        described = first.model_dump()["state"]
        assert described == ask(live.port, "/v1/state/talk")[1]
        assert described["kind"] == "chat"
        assert described["position"] >= first.usage.prompt_tokens
        turn = [*HELLO, {"role": "assistant", "content": first.choices[0].message.content}]
        turn += [{"role": "user", "content": "Why?"}]
        fresh = live.chat(turn)
        assert cached(fresh) == 0
    with Live(loaded, tmp_path) as live:
        again = live.chat(turn, load_state="talk")
        assert cached(again) == described["position"]
        assert again.usage.prompt_tokens - cached(again) < 20
        assert again.choices[0].message.content == fresh.choices[0].message.content
        assert live.client.get("/state", cast_to=object)["data"] == [described]  # type: ignore[index]
        assert ask(live.port, "/v1/state/talk", method="DELETE")[:2] == (
            200,
            {"name": "talk", "object": "state", "deleted": True},
        )
        assert ask(live.port, "/v1/state")[1]["data"] == []
        assert os.listdir(tmp_path) == [".lock"]
        with pytest.raises(openai.NotFoundError, match="there is no state 'talk'"):
            live.chat(turn, load_state="talk")


def test_a_prompt_is_prefilled_once_for_many_questions(live: Live, loaded: Loaded) -> None:
    document = "It was the best of times, it was the worst of times. " * 50
    saved = live.complete(document, n=0, save_state="book")
    described = saved.model_dump()["state"]
    assert described["position"] == saved.usage.prompt_tokens == len(loaded[1].encode(document))
    assert described["kind"] == "prompt"
    assert saved.usage.completion_tokens == 0
    for question in (" It was the age", " We had"):
        whole = live.complete(document + question)
        after = live.complete(question, load_state="book")
        assert after.choices[0].text == whole.choices[0].text
        assert cached(after) == described["position"]
        assert after.usage.prompt_tokens == whole.usage.prompt_tokens
    got = live.complete(" We had", load_state="book", save_state="book2")
    more = live.complete("", load_state="book2")
    assert (
        got.choices[0].text + more.choices[0].text == live.complete(document + " We had", 24).choices[0].text
    )
    with pytest.raises(openai.BadRequestError, match="expected some text after this state"):
        live.complete("", load_state="book")


def test_streams_save_too(live: Live) -> None:
    chunks = list(
        live.client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            max_tokens=5,
            stream=True,
            extra_body={"save_state": "s"},  # type: ignore[arg-type]
        )
    )
    assert chunks[-1].model_dump()["state"]["name"] == "s"
    assert chunks[-1].choices == []
    chunks = list(
        live.client.completions.create(
            model=NAME, prompt="a", max_tokens=5, stream=True, extra_body={"save_state": "t"}
        )
    )
    assert chunks[-1].model_dump()["state"]["name"] == "t"
    assert {one["name"] for one in ask(live.port, "/v1/state")[1]["data"]} == {"s", "t"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", "x" * 65, "a\n", "é", "a b"])
def test_names_are_no_paths(live: Live, tmp_path: Path, name: str) -> None:
    for field in ("save_state", "load_state"):
        with pytest.raises(openai.BadRequestError, match=field):
            live.chat(HELLO, **{field: name})
    before = sorted(tmp_path.rglob("*"))
    quoted = "".join(f"%{byte:02x}" for byte in name.encode()) or "%20"
    status, _, _ = ask(live.port, f"/v1/state/{quoted}", method="DELETE")
    assert status == 404
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_requests(live: Live) -> None:
    status, found = post(live.port, "/v1/chat/completions", {"messages": HELLO, "n": 2, "save_state": "x"})
    assert (status, found["error"]["param"]) == (400, "save_state")
    status, found = post(live.port, "/v1/completions", {"prompt": ["a", "b"], "load_state": "x"})
    assert (status, found["error"]["param"]) == (400, "load_state")
    live.chat(HELLO, save_state="talk")
    with pytest.raises(openai.BadRequestError, match="do not continue what 'talk' holds"):
        live.chat([{"role": "user", "content": "Other"}], load_state="talk")
    live.complete("The king", n=0, save_state="p")
    with pytest.raises(openai.BadRequestError, match="do not continue what 'p' holds"):
        live.chat(HELLO, load_state="p")
    assert ask(live.port, "/v1/state/none", method="DELETE")[0] == 404
    with running() as (_, port):
        status, found = post(port, "/v1/completions", {"prompt": "a", "save_state": "x"})
        assert (status, "--state-dir" in found["error"]["message"]) == (400, True)
        assert ask(port, "/v1/state")[0] == 404


def test_a_state_is_of_one_model(loaded: Loaded, tmp_path: Path) -> None:
    adapter = write_adapter(loaded[0], tmp_path / "adapter", std=0.02)
    with Live(loaded, tmp_path / "states", adapter=adapter) as live:
        live.chat(HELLO, save_state="talk")
        with pytest.raises(
            openai.BadRequestError, match=r"of the model 'longscan-tiny-en'.*other weights"
        ) as no:
            live.chat(HELLO, "other", load_state="talk")
        assert str(tmp_path) not in str(no.value)
        first = live.chat(HELLO, "other", save_state="theirs")
        turn = [*HELLO, {"role": "assistant", "content": first.choices[0].message.content}]
        turn += [{"role": "user", "content": "Why?"}]
        assert cached(live.chat(turn, "other", load_state="theirs")) > 100
        with pytest.raises(openai.BadRequestError, match="of the model 'other'"):
            live.chat(HELLO, load_state="theirs")


# the directory itself


def known(model: LanguageModel, seed: int = 0) -> Known:
    _, state = model.prefill(
        torch.randint(0, 200, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
    )
    return Known([f"text {seed}"], SavedState(state, 5 + seed, []))


def test_a_full_directory_refuses_and_a_smaller_one_replaces(tmp_path: Path) -> None:
    model, print_ = build(), build().fingerprint()
    with StateStore.open(tmp_path, BIG) as store:
        for name in "ab":
            store.save(name, model, print_, known(model), "m")
        most = store.nbytes + states.HEADER
    with StateStore.open(tmp_path, most) as store:
        with pytest.raises(ApiError, match="delete another one") as full:
            store.save("c", model, print_, known(model), "m")
        assert (full.value.status, full.value.code) == (507, "state_dir_full")
        store.save("a", model, print_, known(model, 1), "m")  # in its place
        assert store.nbytes <= most
        assert store.load("a", model, print_).pieces == ["text 1"]
        store.delete("a")
        store.save("c", model, print_, known(model), "m")


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, print_ = build(), build().fingerprint()
    with StateStore.open(tmp_path, BIG) as store:
        store.save("a", model, print_, known(model), "m")
        before = sorted(os.listdir(tmp_path))

        def full(*args: Any, **more: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for where in ("write_json", "State.save"):
            with monkeypatch.context() as patch:
                patch.setattr(f"longscan.serve.states.{where}", full)
                with pytest.raises(ApiError, match="No space left") as error:
                    store.save("a", model, print_, known(model, 1), "m")
            assert error.value.status == 507
            assert sorted(os.listdir(tmp_path)) == before
            assert store.load("a", model, print_).pieces == ["text 0"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model, print_ = build(), build().fingerprint()
    with StateStore.open(tmp_path, BIG) as store:
        for name in "abc":
            store.save(name, model, print_, known(model), "m")
        [file] = tmp_path.glob("a.*.state")
        file.write_bytes(file.read_bytes()[:-4] + b"abcd")
        with pytest.raises(ApiError, match="its file is damaged"):
            store.load("a", model, print_)
        [file] = tmp_path.glob("b.*.state")
        file.unlink()
        with pytest.raises(ApiError, match="the file of the state 'b' is missing"):
            store.load("b", model, print_)
        content = json.loads((tmp_path / "c.json").read_text())
        (tmp_path / "c.json").write_text(json.dumps({**content, "file": "../../etc/passwd"}))
        with pytest.raises(ApiError, match=r"c\.json .* its field 'file' is missing or wrong"):
            store.load("c", model, print_)
        with (
            pytest.raises(LongscanError, match="another process"),
            StateStore.open(tmp_path, BIG),
        ):
            pass


DAMAGED = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"format": "longscan served st', "not valid JSON"),
    "binary": (b"\xff\x00\xfe", "not valid JSON"),
    "list": (b"[]", "expected a JSON object"),
    "format": (b'{"format": "longscan served state 9"}', "got 'longscan served state 9'"),
    "fields": (b'{"format": "longscan served state 1", "position": 3}', "field 'file' is missing"),
}


@pytest.mark.parametrize(("content", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_description_is_no_missing_state(tmp_path: Path, content: bytes, words: str) -> None:
    model, print_ = build(), build().fingerprint()
    with StateStore.open(tmp_path, BIG) as store:
        for name in "ab":
            store.save(name, model, print_, known(model), "m")
        whole = (tmp_path / "a.json").read_bytes()
        (tmp_path / "a.json").write_bytes(content)
        for ask in (lambda: store.load("a", model, print_), lambda: store.describe("a"), store.listed):
            with pytest.raises(ApiError, match=r"a\.json in the server's --state-dir") as error:
                ask()
            assert words in str(error.value)
            assert "Delete the state 'a', or save it again" in str(error.value)
            assert str(tmp_path) not in str(error.value)
            assert (error.value.status, error.value.code) == (500, "state_damaged")
        assert store.load("b", model, print_).pieces == ["text 0"]
    files = sorted(os.listdir(tmp_path))
    with pytest.raises(LongscanError, match="Restore it, or delete it") as refused:
        StateStore.open(tmp_path, BIG).__enter__()
    assert str(tmp_path / "a.json") in str(refused.value)
    assert words in str(refused.value)
    assert sorted(os.listdir(tmp_path)) == files  # the state is still there
    (tmp_path / "a.json").write_bytes(whole)
    with StateStore.open(tmp_path, BIG) as store:
        assert store.load("a", model, print_).pieces == ["text 0"]
        (tmp_path / "a.json").write_bytes(content)
        store.save("a", model, print_, known(model, 1), "m")
        assert store.load("a", model, print_).pieces == ["text 1"]
        (tmp_path / "a.json").write_bytes(content)
        store.delete("a")
        assert [one["name"] for one in store.listed()] == ["b"]
        with pytest.raises(ApiError, match="no state 'a'"):
            store.delete("a")
    (tmp_path / "b.json").unlink()
    with StateStore.open(tmp_path, BIG) as store:  # as the error says
        assert store.listed() == []
        assert not list(tmp_path.glob("*.state"))


def test_serve_refuses_a_damaged_description(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "tuesday.json").write_text("{")
    done = cli("serve", "--state-dir", tmp_path, "--port", 0)
    assert (done.code, done.out) == (1, "")
    assert f"{tmp_path}/tuesday.json does not describe a saved state" in done.err.replace("\n", "")


def test_a_directory_that_goes_away(tmp_path: Path) -> None:
    model, print_ = build(), build().fingerprint()
    (tmp_path / "file").touch()
    with pytest.raises(LongscanError, match="expected a directory"), StateStore.open(tmp_path / "file", BIG):
        pass
    with StateStore.open(tmp_path / "here", BIG) as store:
        (tmp_path / "here").rename(tmp_path / "there")
        with pytest.raises(ApiError, match="was not saved"):
            store.save("a", model, print_, known(model), "m")
        with pytest.raises(ApiError, match="can't be read"):
            store.listed()
        (tmp_path / "there").rename(tmp_path / "here")


def test_many_saves_of_one_name_leave_one(tmp_path: Path) -> None:
    model, print_ = build(), build().fingerprint()
    with StateStore.open(tmp_path, BIG) as store:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda i: store.save("a", model, print_, known(model, i), "m"), range(24)))
        assert len(list(tmp_path.glob("a.*"))) == 2
        found = store.load("a", model, print_)
        assert found.pieces == [f"text {found.length - 5}"]


SAVING = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_states import build, known, StateStore
from pathlib import Path
model = build()
with StateStore.open(Path({home!r}), 1 << 30) as store:
    for i in range(10**6):
        store.save("a", model, model.fingerprint(), known(model, i % 9), "m")
        if not i: print("ready", flush=True)
"""


@pytest.mark.parametrize("wait", [0.0, 0.021, 0.047])
def test_a_kill_while_saving_leaves_a_whole_state(tmp_path: Path, wait: float) -> None:
    here = Path(__file__).parent
    code = SAVING.format(tests=str(here), home=str(tmp_path))
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"ready\n"
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
    model = build()
    with StateStore.open(tmp_path, BIG) as store:
        found = store.load("a", model, model.fingerprint())
        assert found.pieces == [f"text {found.length - 5}"]
        assert sorted(path.suffix for path in tmp_path.iterdir() if path.name != ".lock") == [
            ".json",
            ".state",
        ]
