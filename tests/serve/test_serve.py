"""The server, live on 127.0.0.1: OpenAI's own client, raw HTTP, and what may go wrong."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import longscan
from live_server import JSON, NAME, ask, running
from longscan.inference.engine import Engine
from longscan.inference.prompt_scores import prompt_scores
from longscan.inference.request import Request
from longscan.inference.sampling import SamplingConfig
from longscan.serve.guard import Access
from longscan.serve.limits import Limits
from longscan.serve.service import Service

HELLO = [{"role": "user", "content": "Where is the king?"}]


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[Service, int]]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(live: tuple[Service, int]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{live[1]}/v1", api_key="none", max_retries=0)


def alone(service: Service, prompt: str, **settings: Any) -> list[Any]:
    """Return the events of a prompt in an engine of its own."""
    config = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **settings})
    engine = Engine(service.model, service.tokenizer, slots=1)
    ids = service.tokenizer.encode_prompts([prompt])[0]
    engine.submit(Request(ids=ids, config=config, eos_id=service.tokenizer.eos_ids))
    return list(engine.run())


# completions


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_what_the_engine_writes(
    live: tuple[Service, int], client: openai.OpenAI, temperature: float
) -> None:
    events = alone(live[0], "The king", max_new_tokens=30, temperature=temperature, seed=5, logprobs=2)
    got = client.completions.create(
        model=NAME, prompt="The king", max_tokens=30, temperature=temperature, seed=5, logprobs=2
    )
    choice = got.choices[0]
    assert choice.text == "".join(event.text for event in events)
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [event.logprob for event in events]
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs or [])
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (2, 30)
    stream = client.completions.create(
        model=NAME,
        prompt="The king",
        max_tokens=30,
        temperature=temperature,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert chunks[-1].usage == got.usage


def test_several_prompts_and_continuations(live: tuple[Service, int], client: openai.OpenAI) -> None:
    prompts = ["The king", "A horse, a horse"]
    got = client.completions.create(model=NAME, prompt=prompts, n=2, max_tokens=10, seed=7)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        for k in range(2):
            events = alone(live[0], prompt, max_new_tokens=10, seed=7 + 2 * i + k)
            assert got.choices[2 * i + k].text == "".join(event.text for event in events)
    ids = [live[0].tokenizer.encode(prompt) for prompt in prompts]
    same = client.completions.create(model=NAME, prompt=ids, n=2, max_tokens=10, seed=7)
    assert [choice.text for choice in same.choices] == [choice.text for choice in got.choices]


def test_stop_strings_and_biases(live: tuple[Service, int], client: openai.OpenAI) -> None:
    token = live[0].tokenizer.encode(" king")[0]
    got = client.completions.create(
        model=NAME, prompt="The", max_tokens=20, logit_bias={str(token): 100}, stop=[" king king king"]
    )
    assert got.choices[0].text == ""
    assert got.choices[0].finish_reason == "stop"


def cut(events: list[Any], first: int, skip: int) -> tuple[str, str, list[float]]:
    """Return a stop string from within a token on, the text before it, and the log-probabilities there."""
    text = "".join(event.text for event in events)
    begin = len("".join(event.text for event in events[:first])) + skip
    stop = text[begin : begin + 12]
    begin, shown = text.index(stop), list[float]()
    for event in events:
        if len("".join(one.text for one in events[: len(shown)])) < begin:
            shown.append(event.logprob)
    return stop, text[:begin], shown


@pytest.mark.parametrize("skip", [0, 2], ids=["between-tokens", "within-a-token"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("echo", [False, True], ids=["plain", "echo"])
def test_tokens_of_a_stop_string_are_not_listed(
    live: tuple[Service, int], client: openai.OpenAI, stream: bool, echo: bool, skip: int
) -> None:
    prompt = "The king"
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "logprobs": 1, "seed": 5}
    both = [alone(live[0], prompt, max_new_tokens=30, seed=5 + i, logprobs=1) for i in range(2)]
    first = next(i for i in range(8, 30) if len(both[0][i].text) > skip + 1)
    stop, text, shown = cut(both[0], first, skip)
    assert 0 < len(shown) < 30
    assert len(shown) == first + (skip > 0)
    got: Any = client.completions.create(
        model=NAME, prompt=prompt, n=2, stop=[stop], echo=echo, stream=stream, **settings
    )
    choices = [part.choices[0] for part in got] if stream else got.choices
    scores = prompt_scores(live[0].model, live[0].tokenizer.encode(prompt), 1, live[0].tokenizer.vocab_size)
    before = [score.logprob for score in scores] if echo else []
    other = "".join(event.text for event in both[1])
    assert stop not in other
    for index, (written, logprobs, finish) in enumerate(
        [(text, shown, "stop"), (other, [event.logprob for event in both[1]], "length")]
    ):
        mine = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in mine) == echo * prompt + written
        assert [v for choice in mine for v in choice.logprobs.token_logprobs] == before + logprobs
        assert mine[-1].finish_reason == finish
        tokens = "".join(token for choice in mine for token in choice.logprobs.tokens)
        assert tokens.startswith(echo * prompt + written)
        offsets = [offset for choice in mine for offset in choice.logprobs.text_offset]
        assert all(offset < len(echo * prompt + written) for offset in offsets)
        so_far, seen = "", 0
        for choice in mine:  # at any time, what is listed begins within what is shown
            so_far, seen = so_far + choice.text, seen + len(choice.logprobs.tokens)
            assert all(offset < len(so_far) for offset in offsets[:seen])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stopped_chat_lists_what_it_says(client: openai.OpenAI, stream: bool) -> None:
    settings: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 25, "seed": 3}
    settings |= {"logprobs": True, "top_logprobs": 1}
    choice = client.chat.completions.create(**settings).choices[0]
    entries = choice.logprobs.content
    pieces = [entry.token for entry in entries]
    first = next(i for i in range(5, 20) if len(pieces[i]) > 2 and "\ufffd" not in pieces[i])
    begin = len("".join(pieces[:first])) + 1  # within a token
    stop = choice.message.content[begin : begin + 9]
    assert choice.message.content.index(stop) == begin
    got: Any = client.chat.completions.create(**settings, stop=stop, stream=stream)
    parts = [part.choices[0] for part in got] if stream else got.choices
    content = "".join((part.delta if stream else part.message).content or "" for part in parts)
    listed = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert content == choice.message.content[:begin]
    assert listed == entries[: first + 1]
    assert parts[-1].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_the_prompt_itself(live: tuple[Service, int], client: openai.OpenAI, stream: bool) -> None:
    """As lm-evaluation-harness asks for log-likelihoods."""
    prompt = "To be, or not to be: that is the question."
    ids = live[0].tokenizer.encode(prompt)
    expected = list(prompt_scores(live[0].model, ids, 1, live[0].tokenizer.vocab_size))
    for max_tokens in (0, 3):
        got: Any = client.completions.create(
            model=NAME,
            prompt=prompt,
            echo=True,
            max_tokens=max_tokens,
            logprobs=1,
            temperature=0,
            stream=stream,
        )
        choices = [part.choices[0] for part in got] if stream else got.choices
        logprobs = [value for choice in choices for value in choice.logprobs.token_logprobs]
        assert logprobs[: len(ids)] == [score.logprob for score in expected]
        assert len(logprobs) == len(ids) + max_tokens
        assert "".join(choice.text for choice in choices).startswith(prompt)
        assert choices[-1].finish_reason == "length"


def test_scores_of_a_prompt_are_those_of_one_pass(live: tuple[Service, int]) -> None:
    import torch

    service = live[0]
    ids = (service.tokenizer.encode("It was the best of times, it was the worst of times. ") * 30)[:300]
    scores = list(prompt_scores(service.model, ids, 3, service.tokenizer.vocab_size))
    with torch.no_grad():
        logits = service.model(torch.tensor([ids])).logits[0, :-1, : service.tokenizer.vocab_size]
    exact = logits.double().log_softmax(-1)
    assert scores[0] == (ids[0], None, ())
    for i, score in enumerate(scores[1:]):
        assert score.token == ids[i + 1]
        assert score.logprob == pytest.approx(float(exact[i, ids[i + 1]]), abs=2e-4)
        assert [value for _, value in score.top] == pytest.approx(exact[i].topk(3).values.tolist(), abs=2e-4)


def test_what_the_evaluation_harness_asks_for(live: tuple[Service, int]) -> None:
    """lm-eval's local-completions: ids in; greedy is what equals the best score there."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from longscan.evaluation.likelihood import likelihoods

    service, port = live
    theirs = LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{port}/v1/completions",
        model=NAME,
        tokenizer=str(Path(longscan.__file__).parent / "assets" / NAME),
    )
    encode = service.tokenizer.encode
    contexts = ["The king is", "Enter the ghost and", "O"]
    pairs = [(encode(c), encode(a)) for c in contexts for a in (" dead.", " the fool of them all.")]
    got = theirs._loglikelihood_tokens([(("", ""), context, answer) for context, answer in pairs])
    scores = likelihoods(service.model, pairs, service.tokenizer.vocab_size)
    for found, expected in zip(got, scores, strict=True):
        assert found[0] == pytest.approx(expected.logprob, abs=1e-4)
        assert found[1] == expected.greedy


# chats


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 25, "seed": 3}
    got = client.chat.completions.create(**settings, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.role for choice in got.choices] == ["assistant"] * 2
    assert len(got.choices[0].logprobs.content) == 25
    chunks = list(client.chat.completions.create(**settings, n=2, stream=True))
    for choice in got.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]


def test_the_second_turn_reads_only_what_is_new(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=30, temperature=0)
    assert first.usage is not None
    said = [*HELLO, {"role": "assistant", "content": first.choices[0].message.content}]
    said.append({"role": "user", "content": "And the queen?"})
    second = client.chat.completions.create(model=NAME, messages=said, max_tokens=30, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
    with running(Limits(cache_bytes=0)) as (_, port):
        cold = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = cold.chat.completions.create(model=NAME, messages=said, max_tokens=30, temperature=0)
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert answer.choices[0].message.content == second.choices[0].message.content


def test_parts_of_content_and_developers(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the king?"}]
    plain = [{"role": "system", "content": "Speak."}, *HELLO]
    split = [{"role": "developer", "content": "Speak."}, {"role": "user", "content": parts}]
    answers = [
        client.chat.completions.create(model=NAME, messages=m, max_tokens=9, temperature=0)
        for m in (plain, split)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_tokens_and_back(live: tuple[Service, int]) -> None:
    _, port = live
    status, found, _ = ask(port, "/tokenize", {"prompt": "Où est le roi ?"})
    assert status == 200
    assert found["tokens"] == live[0].tokenizer.encode("Où est le roi ?")
    assert ask(port, "/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": "Où est le roi ?"}
    whole = ask(port, "/tokenize", {"messages": HELLO})[1]
    assert whole["count"] > 5
    parts = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    assert ask(port, "/tokenize", {"messages": parts})[1] == whole
    assert "chat_template" in ask(port, "/tokenizer_info")[1]


# what may go wrong


def test_errors_of_the_official_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=NAME, input="x")


LONG = "[" * 100_000
BAD: list[tuple[str, Any]] = [
    ("completions", b""),
    ("completions", b"{"),
    ("completions", b'{"prompt": "\xff"}'),
    ("completions", b'{"prompt": "x", "temperature": NaN}'),
    ("completions", b'{"prompt": ' + LONG.encode() + b"}"),
    ("completions", []),
    ("completions", {}),
    ("completions", {"prompt": None}),
    ("completions", {"prompt": []}),
    ("completions", {"prompt": [[]]}),
    ("completions", {"prompt": [1.5]}),
    ("completions", {"prompt": [10**6]}),
    ("completions", {"prompt": [-1]}),
    ("completions", {"prompt": ["x"] * 65}),
    ("completions", {"prompt": "\ud800"}),
    ("completions", {"prompt": "x", "suffix": "y"}),
    ("completions", {"prompt": "x", "logprobs": 6}),
    ("completions", {"prompt": "x", "max_tokens": 0}),
    ("completions", {"prompt": "x " * 40_000}),
    *(
        ("completions", {"prompt": "x", field: value})
        for field in ("max_tokens", "n", "temperature", "top_p", "top_k", "seed", "logprobs", "min_p")
        for value in (-1, 2**63, "1", [], {}, True)
    ),
    ("completions", {"prompt": "x", "n": 10**6}),
    ("completions", {"prompt": ["x"] * 64, "n": 2}),
    ("completions", {"prompt": [10**6], "echo": True, "logprobs": 1}),
    ("completions", {"prompt": "x " * 40_000, "echo": True, "max_tokens": 0}),
    ("completions", {"prompt": "x", "echo": True, "max_tokens": 0, "logit_bias": {"x": 1}}),
    ("completions", {"prompt": "x", "logit_bias": {"9" * 5000: 1}}),
    ("completions", {"prompt": "x", "stop": ["a"] * 5}),
    ("completions", {"prompt": "x", "stop": ["y"] * 100_000}),
    ("completions", {"prompt": "x", "stop": ""}),
    ("completions", {"prompt": "x", "logit_bias": {"x": 1}}),
    ("completions", {"prompt": "x", "logit_bias": {"1": 101}}),
    ("completions", {"prompt": "x", "logit_bias": {"99999999": 1}}),
    ("chat/completions", {"messages": []}),
    ("chat/completions", {"messages": ["x"]}),
    ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}),
    ("chat/completions", {"messages": [{"role": "user"}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("chat/completions", {"messages": HELLO, "response_format": {"type": "xml"}}),
    ("chat/completions", {"messages": HELLO, "top_logprobs": 2}),
    ("chat/completions", {"messages": HELLO, "chat_template_kwargs": {"messages": []}}),
    ("chat/completions", {"messages": HELLO, "max_completion_tokens": 0}),
    *(("chat/completions", {"messages": HELLO, "chat_template_kwargs": {k: 1}}) for k in ("self", "prompt")),
]


@pytest.mark.parametrize(("path", "body"), BAD, ids=range(len(BAD)))
def test_bad_bodies(live: tuple[Service, int], path: str, body: Any) -> None:
    if isinstance(body, dict) and body.get("prompt") == "\ud800":
        body = b'{"prompt": "\\ud800"}'
    status, found, _ = ask(live[1], f"/v1/{path}", body)
    assert status == 400, found
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert found["error"]["type"] == "invalid_request_error"
    assert len(found["error"]["message"]) < 600
    assert ask(live[1], "/health")[0] == 200


def test_other_refusals(live: tuple[Service, int]) -> None:
    port = live[1]
    assert ask(port, "/nowhere")[:2] == (404, ask(port, "/nowhere")[1])
    assert ask(port, "/nowhere")[1]["error"]["code"] == "unknown_url"
    assert ask(port, "/v1/completions")[1]["error"]["code"] == "method_not_allowed"
    big = json.dumps({"prompt": "x" * (5 << 20)}).encode()
    assert ask(port, "/v1/completions", big)[0] == 413


def test_keys_hosts_and_origins() -> None:
    access = Access(keys=("one", "two"), origins=("http://page.example",))
    body = {"prompt": "x", "max_tokens": 1}
    with running(access=access) as (_, port):
        key = {"Authorization": "Bearer two"}
        status, found, headers = ask(port, "/v1/completions", body)
        assert (status, found["error"]["code"], headers["www-authenticate"]) == (
            401,
            "invalid_api_key",
            "Bearer",
        )
        assert ask(port, "/v1/completions", body, {"Authorization": "Bearer tw"})[0] == 401
        assert (
            ask(port, "/v1/completions", body, {"Authorization": "Bearer twö".encode().decode("latin-1")})[0]
            == 401
        )
        assert ask(port, "/v1/completions", body, key)[0] == 200
        assert ask(port, "/health")[0] == 200
        assert ask(port, "/health", method="HEAD")[0] == 200
        assert ask(port, "/v1/completions", body, {**key, "Host": "evil.example"})[0] == 403
        assert ask(port, "/v1/completions", body, {**key, "Origin": "http://evil.example"})[0] == 403
        assert ask(port, "/v1/completions", body, {**key, "Origin": f"http://127.0.0.1:{port}"})[0] == 200
        page = {"Origin": "http://page.example"}
        assert (
            ask(port, "/v1/completions", body, {**key, **page})[2]["access-control-allow-origin"]
            == page["Origin"]
        )
        preflight = ask(port, "/v1/completions", None, page, method="OPTIONS")
        assert preflight[0] == 204
        assert "authorization" in preflight[2]["access-control-allow-headers"]


def wait_until_idle(service: Service, patience: int = 200) -> None:
    for _ in range(patience):
        if not (service.worker.jobs or service.engine.running or service.engine.waiting):
            return
        time.sleep(0.05)
    raise AssertionError("the engine is still at work")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_served_on(stream: bool) -> None:
    with running() as (service, port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": "The", "max_tokens": 30_000, "stream": stream, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        if stream:
            connection.getresponse().read(100)
        for _ in range(200):  # until it has arrived
            if service.worker.jobs:
                break
            time.sleep(0.05)
        assert service.worker.jobs == 1
        connection.close()
        wait_until_idle(service)
        assert service.worker.counts["cancelled"] == 1
        assert "longscan_cancelled_total 1" in ask(port, "/metrics")[1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": HELLO}),
        ("completions", {"prompt": "The", "echo": True, "max_tokens": 30_000}),
    ],
    ids=["chat", "echo"],
)
def test_a_client_that_leaves_at_once_is_not_served_either(path: str, body: Any) -> None:
    """It may be gone before the first event of the engine is read."""
    with running() as (service, port):
        for _ in range(6):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            whole = {**body, "stream": True, "ignore_eos": True}
            connection.request("POST", f"/v1/{path}", json.dumps(whole), JSON)
            connection.close()
        time.sleep(0.3)
        wait_until_idle(service)


def test_scoring_prompts_takes_turns_with_streams() -> None:
    with running() as (service, port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": "The", "max_tokens": 30_000, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        response = connection.getresponse()
        response.read(100)
        scored = {"prompt": [5] * 6000, "max_tokens": 0, "echo": True, "logprobs": 1}
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(ask, port, "/v1/completions", scored) for _ in range(3)]
            time.sleep(0.2)
            before = service.worker.counts["written_tokens"]
            assert service.worker.jobs > 1  # they count
            assert [future.result()[0] for future in waiting] == [200] * 3
        assert service.worker.counts["written_tokens"] - before > 60  # 3 x 47 pieces, a step after each
        connection.close()
        wait_until_idle(service)


def test_a_slow_reader_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longscan.serve.job.MAX_BACKLOG", 50)
    with running() as (service, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps(
                {"prompt": "The", "max_tokens": 30_000, "stream": True, "ignore_eos": True, "logprobs": 5}
            )
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall((head + body).encode())
            wait_until_idle(service, 600)
        assert service.worker.counts["written_tokens"] < 30_000


def test_a_full_queue_says_when_to_come_back() -> None:
    with running(Limits(slots=1, queue=0)) as (service, port):
        busy = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": "The", "max_tokens": 30_000, "stream": True, "ignore_eos": True}
        busy.request("POST", "/v1/completions", json.dumps(body), JSON)
        busy.getresponse().read(100)
        status, found, headers = ask(port, "/v1/completions", {"prompt": "x"})
        assert (status, found["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        busy.close()
        wait_until_idle(service)
        assert ask(port, "/v1/completions", {"prompt": "x"})[0] == 200


def test_a_deadline_ends_a_text() -> None:
    with running(Limits(deadline=0.5)) as (service, port):
        _, found, _ = ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 30_000, "ignore_eos": True})
        assert found["choices"][0]["finish_reason"] == "length"
        assert 1 < found["usage"]["completion_tokens"] < 30_000
        wait_until_idle(service)
    with running(Limits(deadline=1e-3)) as (service, port):
        status, found, _ = ask(port, "/v1/completions", {"prompt": "the king " * 10_000, "max_tokens": 3})
        assert (status, found["error"]["code"]) == (504, "deadline_exceeded")
        wait_until_idle(service)


def test_many_at_once_are_not_mixed_up(live: tuple[Service, int]) -> None:
    service, port = live
    prompts = [f"{word} {i}" for i, word in enumerate(["The", "A king", "Who", "Love", "Now is"] * 5)]
    expected = [
        "".join(event.text for event in alone(service, prompt, max_new_tokens=5 + 3 * (i % 7), seed=i))
        for i, prompt in enumerate(prompts)
    ]

    def one(i: int) -> str:
        body = {"prompt": prompts[i], "max_tokens": 5 + 3 * (i % 7), "seed": i}
        status, found, _ = ask(port, "/v1/completions", body)
        assert status == 200, found
        return str(found["choices"][0]["text"])

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(len(prompts)))) == expected


def test_an_engine_that_fails_says_so() -> None:
    with running() as (service, port):

        def broken() -> list[Any]:
            raise RuntimeError("out of order")

        service.engine.step = broken  # type: ignore[method-assign]
        status, found, _ = ask(port, "/v1/completions", {"prompt": "x"})
        assert status == 500
        assert "out of order" not in json.dumps(found)


# the command


def start(*args: str) -> tuple[subprocess.Popen[str], str]:
    """Return a running `longscan serve` and its address."""
    command = [sys.executable, "-m", "longscan", "serve", "--port", "0", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if " at http" in line:
            return process, line.split(" at ")[1].split("/v1")[0]
    raise AssertionError("the server did not start")


def test_sigterm_lets_texts_end() -> None:
    process, url = start("--drain", "3")
    port = int(url.rsplit(":", 1)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "The", "max_tokens": 30_000, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    response = connection.getresponse()
    response.read(100)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    status, found, _ = ask(port, "/v1/completions", {"prompt": "x"})
    assert (status, found["error"]["code"]) == (503, "draining")
    events = response.read().decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    connection.close()
    response.close()
    assert process.wait(20) == 0
    assert process.stderr
    process.stderr.close()


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longscan", "serve", *args]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_misuse_of_the_command(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        got = run("--port", str(taken.getsockname()[1]))
        assert got.returncode == 1
        assert "in use" in got.stderr
        assert "Traceback" not in got.stderr
    for args, message in (
        (("--port", "99999"), "65535"),
        (("--slots", "0"), "--slots"),
        (("--deadline", "nan"), "--deadline"),
        (("--host", "0.0.0.0"), "without a key"),
        (("--template", "none"), "no chat template"),
    ):
        got = run(*args)
        assert got.returncode == 2, got.stderr
        assert message in got.stderr
    keys = tmp_path / "keys"
    keys.write_text("\n")
    assert "expected API keys" in run("--api-keys", str(keys)).stderr
