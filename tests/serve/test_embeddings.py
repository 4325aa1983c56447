"""Vectors over HTTP: OpenAI's own client, and what may go wrong."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch

import longscan
from live_server import JSON, NAME, ask, running
from longscan.inference.text_vectors import text_vectors
from longscan.serve.limits import Limits
from longscan.serve.service import Service

TEXTS = ["Where is the king?", "Où est le roi ?", "x"]


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[Service, int]]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(live: tuple[Service, int]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{live[1]}/v1", api_key="none", max_retries=0)


def test_both_encodings_are_what_embed_returns(live: tuple[Service, int], client: openai.OpenAI) -> None:
    service, port = live
    expected = longscan.embed((service.model, service.tokenizer), TEXTS)
    got = client.embeddings.create(model=NAME, input=TEXTS)  # the client asks for base64
    plain = client.embeddings.create(model=NAME, input=TEXTS, encoding_format="float")
    vectors = [torch.tensor([entry.embedding for entry in answer.data]) for answer in (got, plain)]
    assert torch.equal(*vectors)
    # of length 1; in the server's thread a BLAS may add up in another order
    torch.testing.assert_close(vectors[0], expected, rtol=0, atol=1e-6)
    for answer in (got, plain):
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == sum(map(len, service.tokenizer.encode_batch(TEXTS)))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens
    raw = ask(port, "/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"})[1]["data"][0]
    assert base64.b64decode(raw["embedding"]) == vectors[0][0].numpy().astype("<f4").tobytes()


def test_the_vector_is_the_mean_of_the_final_hidden_states(live: tuple[Service, int]) -> None:
    model, tokenizer = live[0].model, live[0].tokenizer
    ids = (tokenizer.encode("It was the best of times, it was the worst of times. ") * 90)[:1300]  # 3 chunks
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), return_hidden=True).hidden
    assert hidden is not None
    mean = torch.nn.functional.normalize(hidden[-1][0].double().mean(0), dim=0)
    [vector] = text_vectors(model, [ids])
    assert torch.allclose(vector.double(), mean, atol=1e-5)
    assert vector.norm().item() == pytest.approx(1, abs=1e-6)


def test_ids_and_fewer_dimensions(live: tuple[Service, int], client: openai.OpenAI) -> None:
    ids = [live[0].tokenizer.encode(text) for text in TEXTS]
    whole = client.embeddings.create(model=NAME, input=TEXTS)
    assert client.embeddings.create(model=NAME, input=ids).data == whole.data
    assert client.embeddings.create(model=NAME, input=ids[0]).data == whole.data[:1]
    short = client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=16).data[0].embedding
    first = np.array(whole.data[0].embedding[:16])
    assert short == pytest.approx(first / np.linalg.norm(first), abs=1e-6)


def test_vectors_take_turns_with_streams() -> None:
    with running() as (service, port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": "The", "max_tokens": 30_000, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        connection.getresponse().read(100)
        before = service.worker.counts["written_tokens"]
        status, found, _ = ask(port, "/v1/embeddings", {"input": [[5] * 2000] * 3})
        assert status == 200
        assert found["data"][0]["embedding"] == found["data"][2]["embedding"]
        assert service.worker.counts["written_tokens"] - before >= 10  # 12 pieces
        connection.close()


BAD: list[Any] = [
    {},
    {"input": None},
    {"input": ""},
    {"input": []},
    {"input": ["x", ""]},
    {"input": [[]]},
    {"input": [1.5]},
    {"input": [-1]},
    {"input": [10**6]},
    {"input": ["x", 1]},
    {"input": ["x"] * 257},
    {"input": "x " * 40_000},
    {"input": {"text": "x"}},
    {"input": "x", "encoding_format": "int8"},
    {"input": "x", "dimensions": 0},
    {"input": "x", "dimensions": 257},
    {"input": "x", "dimensions": "16"},
    {"input": "x", "dimensions": 2**40},
]


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_bad_bodies(live: tuple[Service, int], body: Any) -> None:
    status, found, _ = ask(live[1], "/v1/embeddings", body)
    assert status == 400, found
    assert found["error"]["param"] == (list(body)[-1] if body else "input")
    assert len(found["error"]["message"]) < 300


def test_other_refusals(live: tuple[Service, int], client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="x")
    assert ask(live[1], "/v1/embeddings", b'{"input": "\\ud800"}')[0] == 400
    with running(Limits(deadline=1e-3)) as (_, port):
        status, found, _ = ask(port, "/v1/embeddings", {"input": "the king " * 10_000})
        assert (status, found["error"]["code"]) == (504, "deadline_exceeded")
