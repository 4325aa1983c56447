"""Several adapters behind one server: each answers as it does alone, and nothing of one gets into another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import longscan
from adapters import write_adapter
from live_server import NAME, post, serving_all
from longscan.checkpoints.adapter import beside
from longscan.inference.engine import Engine
from longscan.inference.request import Request
from longscan.inference.sampling import SamplingConfig
from longscan.models import LanguageModel
from longscan.serve.limits import Limits
from longscan.serve.served import Served, serve_adapters
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import find_template

NAMES = ("one", "two")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
HELLO = [{"role": "user", "content": "Where is the king?"}]
LONG = "It was the best of times, it was the worst of times. " * 60


@pytest.fixture(scope="module")
def loaded() -> tuple[LanguageModel, Tokenizer]:
    model, tokenizer = longscan.load(NAME)
    assert tokenizer is not None
    return model, tokenizer


@pytest.fixture(scope="module")
def directories(
    loaded: tuple[LanguageModel, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    templates = {"one": None, "two": TEMPLATE}
    return {
        name: write_adapter(loaded[0], home / name, seed, template=templates[name], std=0.02)
        for seed, name in enumerate(NAMES, 1)
    }


def served(
    loaded: tuple[LanguageModel, Tokenizer], directories: dict[str, Path], limits: Limits | None = None
) -> Served:
    pairs = {name: beside(*loaded, directory) for name, directory in directories.items()}
    whole = {
        name: (model, own, find_template(own, None))
        for name, (model, own) in pairs.items()
        if own is not None
    }
    return serve_adapters((*loaded, find_template(loaded[1], None)), NAME, whole, limits or Limits())


@pytest.fixture(scope="module")
def live(
    loaded: tuple[LanguageModel, Tokenizer], directories: dict[str, Path]
) -> Iterator[tuple[Served, openai.OpenAI]]:
    with serving_all(served(loaded, directories)) as (both, port):
        yield both, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, model: str, prompt: str = "The king", **more: Any) -> Any:
    given = {"max_tokens": 24, "temperature": 1.0, "seed": 5, "logprobs": 1, **more}
    return client.completions.create(model=model, prompt=prompt, **given).choices[0]


def test_all_are_listed_and_found(live: tuple[Served, openai.OpenAI]) -> None:
    _, client = live
    assert [model.id for model in client.models.list()] == [NAME, *NAMES]
    assert client.models.retrieve("two").model_dump()["parent"] == NAME
    with pytest.raises(openai.NotFoundError, match=f"expected '{NAME}' or 'one' or 'two'"):
        complete(client, "three")
    assert client.completions.create(model="one", prompt="a", max_tokens=1).model == "one"


def test_each_answers_as_generate_does_with_it(
    live: tuple[Served, openai.OpenAI], directories: dict[str, Path]
) -> None:
    """`generate --adapter` merges the adapter: the same up to rounding."""
    _, client = live
    texts = set()
    for name in (NAME, *NAMES):
        model, tokenizer = longscan.load(NAME, adapter=directories.get(name))
        assert tokenizer is not None
        for temperature in (0.0, 1.0):
            engine = Engine(model, tokenizer)
            config = SamplingConfig(
                max_new_tokens=24, temperature=temperature, seed=5, top_p=1.0, top_k=0, logprobs=1
            )
            engine.submit(Request(ids=tokenizer.encode_prompts(["The king"])[0], config=config))
            events = list(engine.run())
            got = complete(client, name, temperature=temperature)
            assert got.text == "".join(event.text for event in events)
            assert got.logprobs.token_logprobs == pytest.approx([e.logprob for e in events], abs=1e-4)
        texts.add(got.text)
    assert len(texts) == 3


def test_mixed_requests_are_answered_as_alone(
    live: tuple[Served, openai.OpenAI], loaded: tuple[LanguageModel, Tokenizer], directories: dict[str, Path]
) -> None:
    """Bit for bit, also as on a server with that adapter alone."""
    _, client = live
    asked = [(name, seed) for seed in range(4) for name in (NAME, *NAMES)]
    with ThreadPoolExecutor(len(asked)) as pool:
        mixed = list(pool.map(lambda one: complete(client, one[0], seed=one[1], max_tokens=40), asked))
    for (name, seed), choice in zip(asked, mixed, strict=True):
        alone = complete(client, name, seed=seed, max_tokens=40)
        assert choice.text == alone.text
        assert choice.logprobs.token_logprobs == alone.logprobs.token_logprobs
    with serving_all(served(loaded, {"two": directories["two"]})) as (_, port):
        single = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert complete(single, "two").logprobs == complete(client, "two").logprobs


def test_caches_are_not_shared(live: tuple[Served, openai.OpenAI]) -> None:
    both, client = live
    fresh = {name: complete(client, name, "A" + LONG) for name in (NAME, *NAMES)}
    assert all(service.engine._cache and service.engine._cache.count for service in both)
    again = {name: complete(client, name, "A" + LONG) for name in reversed((NAME, *NAMES))}
    for name, choice in fresh.items():
        assert again[name].logprobs == choice.logprobs

    def chat(model: str, messages: list[Any]) -> tuple[Any, int]:
        got = client.chat.completions.create(model=model, messages=messages, max_tokens=12, seed=1)
        assert got.usage is not None
        assert got.usage.prompt_tokens_details is not None
        return got.choices[0].message.content, got.usage.prompt_tokens_details.cached_tokens or 0

    text, cached = chat("one", HELLO)
    assert cached == 0
    turn = [*HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
    assert chat(NAME, turn)[1] == 0
    assert chat("two", turn)[1] == 0
    assert chat("one", turn)[1] > 0


def test_weights_are_in_memory_once(live: tuple[Served, openai.OpenAI]) -> None:
    base, *others = live[0]
    owned = {tensor.data_ptr() for tensor in base.model.state_dict().values()}
    for other in others:
        new = {
            name: tensor
            for name, tensor in other.model.state_dict().items()
            if tensor.data_ptr() not in owned
        }
        assert new
        assert all(name.endswith(("lora_A", "lora_B")) for name in new)
        assert other.model.fingerprint() != base.model.fingerprint()


def test_each_has_its_template_and_is_looked_into(live: tuple[Served, openai.OpenAI]) -> None:
    both, _ = live
    port = live[1].base_url.port
    assert port is not None
    counts = {
        name: post(port, "/tokenize", {"model": name, "messages": HELLO})[1]["tokens"] for name in NAMES
    }
    assert counts["one"] != counts["two"]
    answers = {}
    for name in (NAME, *NAMES):
        status, answers[name] = post(port, "/v1/inspect", {"model": name, "text": "The king"})
        assert status == 200
        service = both.find(name)
        ids = torch.tensor([service.tokenizer.encode("The king")])
        with torch.no_grad():
            scores = service.model(ids).logits[0, -1, : service.tokenizer.vocab_size].softmax(-1)
        assert answers[name]["next"][-1][0][1] == pytest.approx(float(scores.max()), abs=1e-4)
    assert len({str(one["next"]) for one in answers.values()}) == 3


def test_vectors_are_of_the_model_that_is_asked(live: tuple[Served, openai.OpenAI]) -> None:
    both, client = live
    for service in both:
        got = client.embeddings.create(model=service.name, input="The king", encoding_format="float")
        [expected] = longscan.embed((service.model, service.tokenizer), ["The king"])
        assert got.data[0].embedding == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_request_without_a_name_is_for_the_first_adapter(live: tuple[Served, openai.OpenAI]) -> None:
    port = live[1].base_url.port
    assert port is not None
    status, got = post(port, "/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert (status, got["model"]) == (200, "one")
