"""`longscan bench serve`: the made-up model, the client, the servers, and a suite with a real one."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from longscan.bench import figure
from longscan.bench.contenders import chat_client, chat_model, servers
from longscan.bench.contenders.soak_client import Clients, Known
from longscan.bench.measure import Contender, Measurement, Settings
from longscan.bench.suites import serve
from longscan.errors import LongscanError
from longscan.inference.turns import encode_pieces
from longscan.tokenizers.chat import find_template


@pytest.mark.parametrize("vocab_size", [512, 50280])
def test_a_text_has_as_many_tokens_as_asked_for(vocab_size: int) -> None:
    tokenizer = chat_model.tokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    texts = [chat_model.text(40, seed, vocab_size) for seed in range(20)]
    assert {len(tokenizer.encode(text)) for text in texts} == {40}
    assert len({text[:12] for text in texts}) == 20  # no two share a prefix that a server could reuse
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_every_server_reads_the_same_prompt(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    from longscan.checkpoints.load import load

    directory, file = chat_model.export(serve.QUICK.model, tmp_path, "q8_0")
    assert file is not None
    messages = [
        {"role": "user", "content": chat_model.text(9, 1, 512)},
        {"role": "assistant", "content": " ab\ufffd\ncd"},
        {"role": "user", "content": chat_model.text(9, 2, 512)},
    ]
    ids = []
    for source in (directory, file):
        _, tokenizer = load(str(source))
        assert tokenizer is not None
        ids.append(encode_pieces(tokenizer, find_template(tokenizer).render(tokenizer, messages)).tolist())
    theirs: Any = AutoTokenizer.from_pretrained(directory)
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert ids[0] == ids[1] == list(found["input_ids"] if not isinstance(found, list) else found)


class Stub:
    """A server that answers what a test wants, and the bodies that it got."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status, self.events = 200, list[dict[str, Any]]()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(stub.status)
                self.end_headers()
                for event in stub.events:
                    data = b": a comment\n\ndata: " + json.dumps(event).encode() + b"\n\n"
                    self.wfile.write(data)
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = {"port": self.server.server_port, "pid": 1 << 30, "model": "m", "vocab_size": 512}

    def says(self, *pieces: str, finish: str = "length") -> None:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": piece} for piece in pieces]
        self.events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        self.events += [{"choices": [{"delta": {}, "finish_reason": finish}]}, {"choices": []}]


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_a_load_counts_tokens_and_latencies(stub: Stub) -> None:
    stub.says(" a", " b", " c", " d")
    run = chat_client.load(stub.endpoint, streams=3, prompt=5, n_tokens=4)
    found = run() or {}
    assert 0 < found["first_p50"] <= found["first_p99"] < found["seconds"] + 1
    assert 0 <= found["gap_p50"] <= found["gap_p99"]
    assert found["client_share"] > 0
    assert found["server_peak_bytes"] is None  # of no process
    run()
    assert len(stub.bodies) == 6
    assert len({body["messages"][0]["content"] for body in stub.bodies}) == 6
    assert all(body["max_tokens"] == 4 and body["stream"] for body in stub.bodies)


def test_an_answer_that_ends_early_counts_for_what_it_is(stub: Stub) -> None:
    run = chat_client.load(stub.endpoint, streams=1, prompt=5, n_tokens=400)
    stub.says(" a", finish="stop")
    short = run() or {}
    stub.says(" a", finish="length")  # tokens without text of their own
    whole = run() or {}
    assert short["seconds"] > 20 * whole["seconds"]


def test_a_conversation_grows(stub: Stub) -> None:
    stub.says(" a", " b")
    run = chat_client.conversation(stub.endpoint, turns=3, message=5, n_tokens=2)
    found = run() or {}
    assert [len(body["messages"]) for body in stub.bodies] == [1, 3, 5]
    assert stub.bodies[2]["messages"][:4] == [
        *stub.bodies[1]["messages"],
        {"role": "assistant", "content": " a b"},
    ]
    assert [len(firsts) for firsts in found["firsts"]] == [3]
    assert len((run() or {})["firsts"]) == 1  # the first one was to warm up


@pytest.mark.parametrize(
    ("status", "events", "words"),
    [
        (500, [], "status 500"),
        (200, [{"error": {"message": "no"}}], "the server says"),
        (200, [], "without text"),
    ],
    ids=["status", "event", "nothing"],
)
def test_a_server_that_fails_is_not_measured(
    stub: Stub, status: int, events: list[dict[str, Any]], words: str
) -> None:
    stub.status, stub.events = status, events
    with pytest.raises(RuntimeError, match=words):
        chat_client.load(stub.endpoint, streams=1, prompt=5, n_tokens=4)()


def test_percentiles() -> None:
    values = [float(value) for value in range(101)]
    assert [chat_client.percentile(values, percent) for percent in (1, 50, 99)] == [1, 50, 99]
    assert chat_client.percentile([3.0], 99) == 3.0
    assert chat_client.percentile([], 50) is None


def test_a_server_that_does_not_start() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(LongscanError, match="does not answer: no such model"),
        servers.running(command, "/", 1),
    ):
        pass


def test_the_client_is_faster_than_any_server_here() -> None:
    """It must not be what is measured: two cores decode less than 1,000 tokens/s with 130 million weights."""
    with servers.running(servers.null(), "/health", 1) as server:
        endpoint = {"port": server.port, "pid": server.pid, "model": "m", "vocab_size": 512}
        run = chat_client.load(endpoint, streams=32, prompt=8, n_tokens=64)
        assert min((run() or {})["seconds"] for _ in range(3)) < 32 * 64 / 1000


def in_this_process(
    title: str, contenders: Sequence[Contender], settings: Settings
) -> dict[str, Measurement]:
    """Stand in for `compare`."""
    found = {}
    for one in contenders:
        details = getattr(chat_client, one.job.rpartition(":")[2])(**one.arguments)()
        seconds = details.pop("seconds", 1.0)
        found[one.name] = Measurement(name=one.name, seconds=(seconds,), details=details)
    return found


def test_what_is_missing_is_said() -> None:
    found = serve.run(Settings(installed=lambda _: False, compare=in_this_process), quick=True)
    text = found.text()
    for name, package, extra in (
        (serve.OURS, "fastapi", "serve"),
        (serve.LLAMA, "llama-cpp-python", "servers"),
        (serve.TRANSFORMERS, "transformers", "servers"),
    ):
        assert f"{name} needs {package}: pip install 'longscan[{extra}]'" in text
    assert {row["contender"] for row in found.rows} == {serve.NULL}


def test_a_suite_with_our_server() -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    settings = Settings(peers=False, compare=in_this_process)
    found = serve.run(settings, quick=True, precision="int4")
    rows = [row for row in found.rows if row["contender"] == serve.OURS]
    assert [row["case"] for row in rows] == ["1 stream", "2 streams", "turn 2", "turn 3"]
    assert all(row["note"] == "" and row["seconds"] > 0 for row in rows)
    assert all(row["server_peak_bytes"] > 1e7 and row["gap_p99"] > 0 for row in rows[:2])
    text = found.text()
    assert "int4 in longscan, q4_0 in llama.cpp" in text


def test_servers_that_fail_while_they_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")

    def failing(title: str, contenders: Sequence[Contender], settings: Settings) -> dict[str, Measurement]:
        return {one.name: Measurement(name=one.name, note="failed: it ended") for one in contenders}

    found = serve.run(Settings(peers=False, compare=failing), quick=True)
    text = found.text()
    assert f"1 stream: {serve.OURS}: failed: it ended" in text
    assert f"turn 2: {serve.OURS}: failed: it ended" in text
    assert text.count("failed: it ended") == 6  # of two servers, two loads and a conversation each
    if figure.installed("matplotlib"):
        figure.draw([found], "nothing", tmp_path / "empty.png")


def test_a_wrong_answer_is_seen(stub: Stub) -> None:
    """By the clients of the soak test."""
    known = Known("/v1/completions", {"prompt": "x", "max_tokens": 2, "n": 1}, (" a b",))
    clients = Clients(stub.server.server_port, [known], burst=2)
    stub.events = [{"choices": [{"index": 0, "text": " a b", "finish_reason": "length"}]}]
    clients.streamed(random.Random(0))
    for events in (
        [{"choices": [{"index": 0, "text": " a c", "finish_reason": "length"}]}],  # of another request
        [{"choices": [{"index": 0, "text": " a b", "finish_reason": None}]}],  # without its end
        [],
    ):
        stub.events = events
        with pytest.raises(AssertionError, match="expected"):
            clients.streamed(random.Random(0))
