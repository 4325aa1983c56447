"""What the model does inside, for the page: /v1/inspect and what is below it.

A report on a text is computed on the engine's thread in short pieces, one between two of its steps, so that
running texts do not stall for longer than a layer takes.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import torch
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

import longscan
from longscan.inference.inspection import Inspection, Pieces, inspect_attention, inspect_text
from longscan.inference.layer_scans import Softmax
from longscan.inference.prefill import encode
from longscan.inference.request import Request as Text
from longscan.inference.sampling import SamplingConfig
from longscan.inference.text_layers import mixing_layers
from longscan.models.common.quantization import precision
from longscan.serve.answers import finish_reason
from longscan.serve.bodies import Float, Id, Int, Str, plain_messages
from longscan.serve.errors import ApiError
from longscan.serve.formats import UnsupportedError
from longscan.serve.job import merged
from longscan.serve.served import Served
from longscan.serve.service import Service
from longscan.serve.streaming import while_connected
from longscan.tokenizers.words import visible

__all__ = ["MAX_SQUARE", "MAX_TOKENS", "TOP", "add_inspect_routes"]

MAX_TOKENS = 1024  # of a text
MAX_SQUARE = 512  # of one whose tokens are compared pairwise
TOP = 10  # of the likeliest next tokens

T = TypeVar("T")
BodyOf = Callable[[Request, type[Any], Served], Awaitable[Any]]


class InspectBody(BaseModel):
    """POST /v1/inspect: a text, its tokens, or messages."""

    model: Str | None = None
    text: Str | None = None
    tokens: Annotated[list[Id], Field(min_length=1, max_length=MAX_TOKENS)] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(each is not None for each in (self.text, self.tokens, self.messages)) != 1:
            raise UnsupportedError("text", "expected text, tokens or messages, one of them.")
        return self


class AttentionBody(BaseModel):
    """POST /v1/inspect/attention."""

    model: Str | None = None
    tokens: Annotated[list[Id], Field(min_length=1, max_length=MAX_SQUARE)]
    layer: Annotated[Int, Field(ge=0)]
    lane: Annotated[Int, Field(ge=0)] | None = None


class ContinueBody(BaseModel):
    """POST /v1/inspect/continue: continuations of a text, all from forks of one state."""

    model: Str | None = None
    tokens: Annotated[list[Id], Field(min_length=1, max_length=MAX_TOKENS)]
    n: Annotated[Int, Field(ge=1, le=4)] = 1
    max_tokens: Annotated[Int, Field(ge=1, le=128)] = 32
    temperature: Annotated[Float, Field(ge=0, le=100)] = 0.7
    seed: Annotated[Int, Field(ge=0, lt=2**62)] | None = None


def add_inspect_routes(app: FastAPI, served: Served, body_of: BodyOf) -> None:
    """Add what describes the model and its work on a text.

    Args:
        app: that serves it.
        served: the models.
        body_of: returns the checked body of a request.
    """
    described: dict[Service, Any] = {}

    @app.get("/v1/inspect")
    async def describe(model: str | None = None) -> Any:
        service = served.find(model)
        if service not in described:
            layers = await service.worker.call(lambda: mixing_layers(service.model), slow=True)
            described[service] = {**_description(service, layers), "models": served.names}
        return described[service]

    @app.post("/v1/inspect")
    async def inspect(request: Request) -> Any:
        body = await body_of(request, InspectBody, served)
        service = served.find(body.model)
        ids = await _ids_of(service, body)
        work = inspect_text(service.model, torch.from_numpy(ids), TOP, service.tokenizer.vocab_size)
        found = await while_connected(request, _in_turns(service, work, len(ids)))
        return await asyncio.to_thread(_report, service, ids.tolist(), found)

    @app.post("/v1/inspect/attention")
    async def attention(request: Request) -> Any:
        body = await body_of(request, AttentionBody, served)
        service = served.find(body.model)
        ids = torch.tensor(_checked(service, body.tokens))
        work = inspect_attention(service.model, ids, body.layer, body.lane)
        found = await while_connected(request, _in_turns(service, work, len(ids)))
        return {
            "layer": body.layer,
            "parts": [
                {
                    "kind": "attention" if isinstance(each.part, Softmax) else "scan",
                    "noun": each.part.noun,
                    "lanes": each.part.lanes,
                    "matrix": _array(each.values),
                }
                for each in found
            ],
        }

    @app.post("/v1/inspect/continue")
    async def go_on(request: Request) -> Any:
        body = await body_of(request, ContinueBody, served)
        service = served.find(body.model)
        ids = _checked(service, body.tokens)
        return await while_connected(request, _continuations(service, ids, body))


async def _in_turns(service: Service, work: Pieces[T], n_tokens: int) -> T:
    """Do work on a text piece by piece, each between two steps of the engine, and return its result."""
    result: list[T] = []

    def piece() -> None:
        try:
            next(work)
        except StopIteration as end:
            result.append(end.value)

    async with asyncio.timeout(service.limits.deadline):
        with service.worker.reserve(n_tokens):
            while not result:
                if service.worker.ended:
                    raise ApiError(503, "the server is shutting down.", "draining")
                await service.worker.call(piece, slow=True)
    return result[0]


async def _ids_of(service: Service, body: InspectBody) -> np.ndarray:
    """Return the ids of a text (n,), not too many."""

    def run() -> np.ndarray:
        if body.messages is not None:
            return service.encode(service.render(plain_messages(body.messages), prompt=False))
        return encode(service.tokenizer, [body.text or ""])[0]

    if body.tokens is not None:
        return np.array(_checked(service, body.tokens), np.int64)
    ids = await asyncio.to_thread(run)
    if len(ids) == 0 or (body.text is not None and len(ids) == len(service.tokenizer.prefix)):
        raise ApiError(400, "text: expected some tokens, got none.", "invalid_value", "text")
    if len(ids) > MAX_TOKENS:
        message = f"the text has {len(ids):,} tokens: expected at most {MAX_TOKENS:,}. Shorten it."
        raise ApiError(400, message, "context_length_exceeded", "text")
    return ids


def _checked(service: Service, tokens: list[int]) -> list[int]:
    """Return tokens, which must be of the vocabulary and of the server's length."""
    most = service.tokenizer.vocab_size - 1
    if max(tokens) > most:
        message = f"tokens: expected ids up to {most:,}, got {max(tokens):,}."
        raise ApiError(400, message, "invalid_value", "tokens")
    return tokens


async def _continuations(service: Service, ids: list[int], body: ContinueBody) -> dict[str, Any]:
    """Return continuations of a text with their tokens."""
    deadline = service.seconds_left()
    if len(ids) + body.max_tokens > service.limits.max_length:
        message = f"expected at most {service.limits.max_length:,} tokens with the new ones."
        raise ApiError(400, message, "context_length_exceeded", "tokens")
    if body.n > service.worker.capacity:
        message = f"n: expected at most {service.worker.capacity}, got {body.n}."
        raise ApiError(400, message, "invalid_value", "n")
    service.worker.check(body.n, len(ids))
    config = SamplingConfig(
        max_new_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=body.seed,
    )
    text = Text(ids=np.array(ids, np.int64), config=config, eos_id=service.tokenizer.eos_ids)
    job = await service.submit(text, body.n)
    try:
        async for _ in merged([job], deadline):
            pass
    finally:
        job.cancel()
    spell = _speller(service)
    return {
        "continuations": [
            {
                "tokens": [
                    {"id": token, "text": text} for token, text in zip(each.ids, spell(each.ids), strict=True)
                ],
                "text": each.text,
                "finish_reason": finish_reason(each.finish),
            }
            for each in job.texts
        ]
    }


def _description(service: Service, layers: list[Any]) -> dict[str, Any]:
    """Return what the page must know of the model."""
    model, state = service.model, service.model.init_state(1)
    embeddings = model.backbone.embedding.weight.numel() * (1 if model.lm_head is None else 2)
    return {
        "model": service.name,
        "class": type(model).__name__,
        "version": longscan.__version__,
        "parameters": model.num_parameters(),
        "body_parameters": model.num_parameters() - embeddings,
        "n_layers": model.config.n_layers,
        "d_model": model.config.d_model,
        "precision": precision(model),
        "state_bytes": state.nbytes,
        "state_bytes_per_token": state.growth,
        "template": {"name": service.template.name, "own": service.template.own},
        "max_length": service.limits.max_length,
        "max_tokens": MAX_TOKENS,
        "max_attention_tokens": MAX_SQUARE,
        "layers": [
            {
                "number": each.number,
                "scan": None if each.scan is None else {"noun": each.scan.noun, "lanes": each.scan.lanes},
                "attention": None if each.attention is None else {"lanes": each.attention.lanes},
            }
            for each in layers
        ],
    }


def _report(service: Service, ids: list[int], found: Inspection) -> dict[str, Any]:
    """Return a report on a text in the form of the answer."""
    after = [score.top for score in found.scores[1:]]  # what is likely after each token
    spell = _speller(service)
    names = {token: spell([token])[0] for token in {token for top in after for token, _ in top}}
    half_lives = [scan.half_lives.tolist() for scan in found.scans]
    arrays = {
        name: _array(torch.stack([getattr(scan, name) for scan in found.scans])) if found.scans else None
        for name in ("dt", "norms")
    }
    return {
        "tokens": [
            {"id": token, "text": text, "logprob": score.logprob}
            for token, text, score in zip(ids, spell(ids), found.scores[:-1], strict=True)
        ],
        "next": [[[token, round(math.exp(value), 6)] for token, value in top] for top in after],
        "names": names,
        "layers": [scan.number for scan in found.scans],
        **arrays,
        "half_lives": [[None if math.isinf(x) else x for x in quartiles] for quartiles in half_lives],
    }


def _speller(service: Service) -> Callable[[list[int]], list[str]]:
    """Return what gives the text of each token; special ones have their name."""
    names = {token: name for name, token in service.tokenizer.special_tokens.items()}

    def spell(ids: list[int]) -> list[str]:
        texts = visible(service.tokenizer, ids)
        return [names.get(token, text) for token, text in zip(ids, texts, strict=True)]

    return spell


def _array(values: Tensor) -> dict[str, Any]:
    """Return an array for the page: its shape, and float32 values, little-endian, in base64."""
    content = values.detach().float().cpu().numpy().astype("<f4")
    return {"shape": list(content.shape), "float32": base64.b64encode(content.tobytes()).decode()}
