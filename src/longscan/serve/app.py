"""The routes."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from longscan.errors import LongscanError
from longscan.serve import answers
from longscan.serve.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
    plain_messages,
)
from longscan.serve.embeddings import Embeddings
from longscan.serve.errors import ApiError, BusyError, api_error
from longscan.serve.formats import UnsupportedError
from longscan.serve.guard import Access, App, Guard
from longscan.serve.inspect_routes import add_inspect_routes
from longscan.serve.limits import Limits
from longscan.serve.page_routes import add_page_routes
from longscan.serve.responses import Chat, Completion
from longscan.serve.served import Served

__all__ = ["make_app"]

# of fields that may be one of several things
EXPECTED = {
    "prompt": "text, token ids, or a list of up to 64 of either, not empty",
    "input": "text, token ids, or a list of up to 256 of either, none of them empty",
    "stop": "a string or up to 4, of 1 to 256 characters each",
}
BodyT = TypeVar("BodyT", bound=BaseModel)


def make_app(served: Served, access: Access | None = None) -> App:
    """Return the ASGI application of some models.

    Args:
        served: whose worker runs already, or will.
        access: who may ask.
    """
    app = FastAPI(title="longscan", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_model_routes(app, served)
    _add_text_routes(app, served)
    _add_generation_routes(app, served)
    add_inspect_routes(app, served, _body_of)
    _add_state_routes(app, served)
    add_page_routes(app)
    routes = [route.path for route in app.routes if hasattr(route, "path")]
    return Guard(app, access or Access(), served.metrics, routes)


def _add_errors(app: FastAPI) -> None:
    """Let every error have OpenAI's shape."""

    def respond(_: Request, error: Exception) -> Response:
        return _error_response(error)

    for kind in (
        ApiError,
        BusyError,
        LongscanError,
        TimeoutError,
        HTTPException,
        UnsupportedError,
        Exception,
    ):
        app.add_exception_handler(kind, respond)


def _error_response(error: Exception) -> Response:
    found = api_error(error)
    body = answers.error(str(found), found.kind, found.code, found.param)
    return JSONResponse(body, found.status, headers=found.headers)


def _add_model_routes(app: FastAPI, served: Served) -> None:
    """Add what describes the server."""
    described = served.described()

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": described}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        served.find(name)
        return next(model for model in described if model["id"] == name)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Any:
        worker = served.worker
        if worker.failed is not None or worker.draining:
            state = "draining" if worker.failed is None else "failed"
            return JSONResponse({"status": state}, 503, headers={"Retry-After": "5"})
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Any:
        worker = served.worker
        gauges = {
            "running": worker.running,
            "waiting": worker.waiting,
            "waiting_tokens": worker.waiting_tokens,
            "conversation_states": sum(service.turns.count for service in served),
            "conversation_state_bytes": sum(service.turns.nbytes for service in served),
        }
        return PlainTextResponse(served.metrics.text(worker.counts, gauges))


def _add_text_routes(app: FastAPI, served: Served) -> None:
    """Add the tokenizer."""
    tokenizer = served.usual.tokenizer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        body = await _body_of(request, TokenizeBody, served)
        service = served.find(body.model)
        if body.messages is not None:
            pieces = await asyncio.to_thread(
                service.render, plain_messages(body.messages), body.add_generation_prompt, body.tools
            )
            ids = [int(i) for i in await asyncio.to_thread(service.encode, pieces)]
        else:
            encode = tokenizer.encode_prompts if body.add_special_tokens else tokenizer.encode_batch
            [ids] = await asyncio.to_thread(encode, [body.prompt or ""])
        return {"tokens": ids, "count": len(ids), "max_model_len": service.limits.max_length}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        body = await _body_of(request, DetokenizeBody, served)
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> Any:
        service = served.find(model)
        return {**tokenizer.roles, "chat_template": service.template.source}


def _add_generation_routes(app: FastAPI, served: Served) -> None:
    """Add completions, chats and embeddings."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await _body_of(request, CompletionBody, served)
        return await Completion(served.find(body.model), body).respond(request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await _body_of(request, ChatBody, served)
        return await Chat(served.find(body.model), body).respond(request)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Any:
        body = await _body_of(request, EmbeddingBody, served)
        return await Embeddings(served.find(body.model), body).respond(request)


def _add_state_routes(app: FastAPI, served: Served) -> None:
    """Add the states that clients have saved; see `save_state` and `load_state` of a request."""
    states = served.usual.states
    if states is None:
        return

    @app.get("/v1/state")
    async def listed() -> Any:
        return {"object": "list", "data": await asyncio.to_thread(states.listed)}

    @app.get("/v1/state/{name}")
    async def one(name: str) -> Any:
        return await asyncio.to_thread(states.describe, name)

    @app.delete("/v1/state/{name}")
    async def delete(name: str) -> Any:
        await asyncio.to_thread(states.delete, name)
        return {"name": name, "object": "state", "deleted": True}


async def _body_of(request: Request, kind: type[BodyT], served: Served) -> BodyT:
    """Return the checked body of a request."""
    if served.worker.draining:
        raise ApiError(503, "the server is shutting down.", "draining", headers={"Retry-After": "5"})
    data = await _content(request, served.limits)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UnsupportedError):
            raise cause from None
        field = str(first["loc"][0]) if first["loc"] else None
        if field in EXPECTED:
            raise ApiError(400, f"{field}: expected {EXPECTED[field]}.", "invalid_value", field) from None
        where = ".".join(map(str, first["loc"]))
        code = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
        message = f"{where or 'the body'}: {first['msg'][:300]}."
        raise ApiError(400, message, code, field) from None


async def _content(request: Request, limits: Limits) -> bytes:
    """Return the bytes of a body, if they are few enough and come soon enough."""
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                data += part
                if len(data) > limits.body_bytes:
                    message = f"the body: expected at most {limits.body_bytes:,} bytes."
                    raise ApiError(413, message, "request_too_large")
    except TimeoutError:
        message = f"the body: expected its end within {limits.body_seconds:g} seconds."
        raise ApiError(408, message, "request_timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(499, "the client has gone.") from None
    return bytes(data)
