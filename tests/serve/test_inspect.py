"""/v1/inspect: what the page shows is what the library computes, and nobody waits long for it."""

from __future__ import annotations

import base64
import http.client
import json
import math
import time
from typing import Any

import numpy as np
import pytest
import torch

import longscan
from live_server import ask, serving
from longscan.inference.text_layers import states, time_steps, visit_layers
from longscan.models import MODELS, LanguageModel
from longscan.serve.guard import Access
from longscan.serve.inspect_routes import MAX_SQUARE, MAX_TOKENS, TOP
from longscan.serve.limits import Limits
from longscan.serve.service import Service
from longscan.tokenizers.base import ByteTokenizer

NAME = "longscan-tiny-en"
TEXT = "It was a bright morning, and the Captain said:\n“Où est le roi?”"
KINDS: dict[str, dict[str, Any]] = {
    "mamba2": {},
    "mamba3": {},
    "hybrid": {"d_model": 32, "d_ff": 32, "d_ssm_head": 8, "d_state": 8, "pattern": "m-P*M", "n_layers": 5},
    "zamba2": {},
    "llama": {},
    "lstm": {},
    "hippo": {},
}


def tiny(name: str) -> LanguageModel:
    entry = MODELS[name]
    config = entry.config.from_dict({**entry.presets["tiny"], **KINDS[name]})
    model = entry.cls(config, torch.Generator().manual_seed(0)).eval()
    assert isinstance(model, LanguageModel)
    return model


def array(given: dict[str, Any]) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(given["float32"]), "<f4")
    return torch.from_numpy(values.reshape(given["shape"]).copy())


def test_a_report_is_what_the_library_computes(served: tuple[Service, int]) -> None:
    service, port = served
    status, found, _ = ask(port, "/v1/inspect", {"text": TEXT})
    assert status == 200
    ids = torch.tensor(service.tokenizer.encode(TEXT))
    assert [token["id"] for token in found["tokens"]] == ids.tolist()
    shown = "".join(token["text"] for token in found["tokens"])
    assert shown.replace("·", "") == TEXT.replace("\n", "↵")  # a dot for each part of a character
    assert found["layers"] == list(range(service.model.config.n_layers))
    torch.testing.assert_close(array(found["dt"]), time_steps(service.model, ids).float())
    norms, half_lives = states(service.model, ids)
    torch.testing.assert_close(array(found["norms"]), norms.float())
    expected = [[None if math.isinf(x) else x for x in row] for row in half_lives.tolist()]
    assert found["half_lives"] == expected


def test_the_next_tokens_are_the_models(served: tuple[Service, int]) -> None:
    service, port = served
    found = ask(port, "/v1/inspect", {"text": TEXT})[1]
    ids = torch.tensor(service.tokenizer.encode(TEXT))
    with torch.no_grad():
        logits = service.model(ids[None]).logits[0, :, : service.tokenizer.vocab_size].double()
    shares = logits.softmax(-1)
    assert len(found["next"]) == len(ids)  # after the last token, too
    for row, share in zip(found["next"], shares, strict=True):
        assert [value for _, value in row] == pytest.approx(share.topk(TOP).values.tolist(), abs=1e-5)
        assert [value for _, value in row] == pytest.approx([float(share[i]) for i, _ in row], abs=1e-5)
        assert all(found["names"][str(token)] for token, _ in row)
    assert found["tokens"][0]["logprob"] is None
    for i, token in enumerate(found["tokens"][1:]):
        assert token["logprob"] == pytest.approx(math.log(float(shares[i, ids[i + 1]])), abs=1e-4)


@pytest.mark.parametrize("lane", [None, 3])
def test_the_hidden_attention_of_a_layer(served: tuple[Service, int], lane: int | None) -> None:
    service, port = served
    ids = service.tokenizer.encode(TEXT)
    found = ask(port, "/v1/inspect/attention", {"tokens": ids, "layer": 2, "lane": lane})[1]
    layers = visit_layers(service.model, torch.tensor(ids), lambda layer: (layer.number, layer.scan))
    scan = dict(layers)[2]
    assert scan is not None
    [part] = found["parts"]
    assert (part["kind"], part["noun"], part["lanes"]) == ("scan", "channel", 512)
    torch.testing.assert_close(array(part["matrix"]), scan.matrix(lane).float())


def test_continuations_fork_one_state(served: tuple[Service, int]) -> None:
    service, port = served
    ids = service.tokenizer.encode("The king is")
    before = service.engine.prefilled
    body = {"tokens": ids, "n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 4}
    found = ask(port, "/v1/inspect/continue", body)[1]["continuations"]
    assert service.engine.prefilled - before == len(ids)  # once, for all of them
    assert len({each["text"] for each in found}) == 3
    for each in found:
        assert service.tokenizer.decode([token["id"] for token in each["tokens"]]) == each["text"]
        assert len(each["tokens"]) == 12
    assert ask(port, "/v1/inspect/continue", body)[1]["continuations"] == found
    whole = {"prompt": ids, "n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 4}
    others = ask(port, "/v1/completions", whole)[1]["choices"]
    assert {each["text"] for each in found} == {choice["text"] for choice in others}


def test_a_conversation_is_inspected_as_its_template_renders_it(served: tuple[Service, int]) -> None:
    _, port = served
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    found = ask(port, "/v1/inspect", {"messages": messages})[1]
    text = "".join(token["text"] for token in found["tokens"])
    assert text.startswith("User: Hello")
    assert text.rstrip("↵").endswith("Assistant: Good day")


BAD: list[tuple[str, Any]] = [
    ("", {}),
    ("", {"text": ""}),
    ("", {"text": None}),
    ("", {"text": 5}),
    ("", {"text": "\ud800"}),
    ("", {"text": "x", "tokens": [1]}),
    ("", {"tokens": []}),
    ("", {"tokens": [-1]}),
    ("", {"tokens": [4096]}),
    ("", {"tokens": [2**31]}),
    ("", {"tokens": [1.5]}),
    ("", {"tokens": [5] * (MAX_TOKENS + 1)}),
    ("", {"text": "x y " * MAX_TOKENS}),
    ("", {"messages": []}),
    ("", {"messages": [{"role": "nobody", "content": "x"}]}),
    ("", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("", b"{"),
    ("/attention", {"tokens": [5]}),
    ("/attention", {"tokens": [5], "layer": 8}),
    ("/attention", {"tokens": [5], "layer": -1}),
    ("/attention", {"tokens": [5], "layer": 2**63}),
    ("/attention", {"tokens": [5], "layer": 0, "lane": 512}),
    ("/attention", {"tokens": [5], "layer": 0, "lane": -1}),
    ("/attention", {"tokens": [5], "layer": 0, "lane": 2**63}),
    ("/attention", {"tokens": [5] * (MAX_SQUARE + 1), "layer": 0}),
    ("/attention", {"tokens": [5000], "layer": 0}),
    ("/continue", {"tokens": []}),
    ("/continue", {"tokens": [5], "n": 5}),
    ("/continue", {"tokens": [5], "n": 0}),
    ("/continue", {"tokens": [5], "max_tokens": 129}),
    ("/continue", {"tokens": [5], "temperature": 1e308}),
    ("/continue", b'{"tokens": [5], "temperature": NaN}'),
    ("/continue", {"tokens": [5], "seed": 2**62}),
]


@pytest.mark.parametrize(("path", "body"), BAD, ids=lambda value: str(value)[:40])
def test_bad_bodies(served: tuple[Service, int], path: str, body: Any) -> None:
    status, found, _ = ask(served[1], f"/v1/inspect{path}", body)
    assert status == 400, found
    assert found["error"]["type"] == "invalid_request_error"
    assert served[0].worker.jobs == 0


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_shows_what_it_has(name: str) -> None:
    model = tiny(name)
    with serving(model, ByteTokenizer(), name) as (_, port):
        described = ask(port, "/v1/inspect")[1]
        found = ask(port, "/v1/inspect", {"text": "Hello"})[1]
        scans = [layer["number"] for layer in described["layers"] if layer["scan"]]
        attends = [layer["number"] for layer in described["layers"] if layer["attention"]]
        assert found["layers"] == scans
        assert bool(scans) == (name in ("mamba2", "mamba3", "hybrid", "zamba2"))
        assert bool(attends) == (name in ("llama", "hybrid", "zamba2"))
        assert (described["state_bytes_per_token"] > 0) == bool(attends)
        assert len(found["next"]) == len(found["tokens"]) == 5
        assert (found["dt"] is None) == (not scans)
        for number in {*scans, *attends}:
            body = {"tokens": list(b"Hello"), "layer": number}
            kinds = [part["kind"] for part in ask(port, "/v1/inspect/attention", body)[1]["parts"]]
            assert ("scan" in kinds, "attention" in kinds) == (number in scans, number in attends)
            for part in ask(port, "/v1/inspect/attention", body)[1]["parts"]:
                assert part["matrix"]["shape"] == [5, 5]


def test_a_description_counts_what_a_transformer_would_have(served: tuple[Service, int]) -> None:
    service, port = served
    found = ask(port, "/v1/inspect")[1]
    model = service.model
    body = model.num_parameters() - model.backbone.embedding.weight.numel()
    assert found["body_parameters"] == body
    assert found["state_bytes"] == model.init_state(1).nbytes
    assert found["template"] == {"name": "plain", "own": False}
    assert str(longscan.__path__[0]) not in json.dumps(found)  # no path is given away


def test_inspecting_takes_turns_with_streams(served: tuple[Service, int]) -> None:
    service, port = served
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"prompt": "The", "max_tokens": 30_000, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    response.read(100)
    before = service.worker.counts["written_tokens"]
    assert ask(port, "/v1/inspect/attention", {"tokens": [5] * 256, "layer": 7})[0] == 200
    # 8 layers, then the matrix in at least 8 pieces, and a step of the stream after each
    assert service.worker.counts["written_tokens"] - before >= 16
    connection.close()
    deadline = time.monotonic() + 20
    while service.worker.jobs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not service.worker.jobs


def test_a_full_server_says_when_to_come_back(served: tuple[Service, int]) -> None:
    model, tokenizer = served[0].model, served[0].tokenizer
    with serving(model, tokenizer, NAME, limits=Limits(slots=1, queue=0)) as (service, port):
        with service.worker.reserve(1):
            status, found, headers = ask(port, "/v1/inspect", {"text": "Hello"})
        assert status == 429, found
        assert int(headers["retry-after"]) >= 1
        assert ask(port, "/v1/inspect", {"text": "Hello"})[0] == 200
        assert ask(port, "/v1/inspect/continue", {"tokens": [5], "n": 2})[0] == 400


def test_inspecting_needs_the_key(served: tuple[Service, int]) -> None:
    model, tokenizer = served[0].model, served[0].tokenizer
    with serving(model, tokenizer, NAME, access=Access(keys=("secret",))) as (_, port):
        for path, body in (("", None), ("", {"text": "x"}), ("/attention", {}), ("/continue", {})):
            assert ask(port, f"/v1/inspect{path}", body)[0] == 401
        assert ask(port, "/v1/inspect", None, {"Authorization": "Bearer secret"})[0] == 200
