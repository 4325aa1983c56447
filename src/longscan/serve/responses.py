"""Answers to completions and chats, whole or chunk by chunk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from longscan.serve import answers
from longscan.serve.answers import Head, Listing, Scored, Settled
from longscan.serve.bodies import ChatBody, CompletionBody
from longscan.serve.job import ChatJob, Job, Piece, merged
from longscan.serve.message import Message
from longscan.serve.saving import after_prompt, continued, restored, saved, written
from longscan.serve.service import Service
from longscan.serve.streaming import stream, while_connected

__all__ = ["Chat", "Completion"]


class Completion:
    """An answer to POST /v1/completions.

    Args:
        service: what answers.
        body: of the request.
    """

    def __init__(self, service: Service, body: CompletionBody) -> None:
        self._service, self._body, self._begin = service, body, time.monotonic()
        self._head = Head(answers.new_id("cmpl"), "text_completion", service.name, service.fingerprint)
        self._echoed: list[tuple[str, list[Scored]]] = []  # of each prompt
        self._listings: list[Listing] = []  # of each choice
        self._settled: list[Settled] = []
        self._n_prompt = self._n_written = self._cached = 0
        self._state: dict[str, Any] = {}  # of the answer, if one is saved

    async def respond(self, request: Request) -> Response:
        """Return the response, whole or as a stream.

        Args:
            request: of the client.
        """
        deadline = self._service.seconds_left()
        self._service.check_biases(self._body.biases)
        if self._body.echo:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._service.limits.deadline):
                await while_connected(request, self._echo())
        jobs = await self._begun()
        self._service.metrics.cached += self._cached
        pieces = merged(jobs, deadline)
        n = len(self._body.prompts) * self._body.choices
        self._listings = [Listing(self._service.tokenizer) for _ in range(n)]
        self._settled = [Settled() for _ in range(n)]
        if self._body.stream:
            return stream(self._chunks(pieces, jobs), jobs)
        try:
            return JSONResponse(await while_connected(request, self._whole(pieces, jobs)))
        finally:
            for job in jobs:
                job.cancel()

    async def _begun(self) -> list[Job]:
        """Return the jobs of the prompts; none if no tokens are asked for."""
        service, body, jobs = self._service, self._body, list[Job]()
        before = await restored(service, body)
        if body.echo:
            prompts = [] if body.max_tokens == 0 else await service.ids_of(body.prompts)
        else:
            prompts = (
                await service.ids_of(body.prompts)
                if before is None
                else [await asyncio.to_thread(continued, service, before, body.prompts[0])]
            )
            self._cached = before.length if before else 0
            self._n_prompt = self._cached + sum(map(len, prompts))
        if body.max_tokens != 0:
            return await service.complete(body, prompts, before)
        if body.save_state is not None:
            service.check_lengths([np.zeros(self._n_prompt)], together=True)
            known = await after_prompt(service, prompts[0], before)
            self._state = {"state": await saved(service, body.save_state, known)}
        return jobs

    async def _save(self, jobs: list[Job]) -> None:
        """Save the state after the text, if one is asked for."""
        if jobs and self._body.save_state is not None:
            self._state = {"state": await saved(self._service, self._body.save_state, written(jobs[0]))}

    async def _echo(self) -> None:
        """Find the texts of the prompts, and their log-probabilities if those are asked for."""
        prompts = await self._service.ids_of(self._body.prompts)
        self._service.check_lengths(prompts, together=self._body.logprobs is not None)
        for prompt, ids in zip(self._body.prompts, prompts, strict=True):
            self._n_prompt += len(ids)
            text = prompt if isinstance(prompt, str) else self._service.tokenizer.decode(prompt)
            top = self._body.logprobs
            scored = [] if top is None else await self._service.scores(ids, top)
            self._echoed.append((text, scored))

    def _beginning(self, index: int) -> tuple[str, list[Scored]]:
        """Return what a choice begins with."""
        return self._echoed[index // self._body.choices] if self._echoed else ("", [])

    def _choice(self, index: int, text: str, scored: list[Scored], finish: str | None) -> dict[str, Any]:
        """Return a choice, or the next part of one."""
        listed = None if self._body.logprobs is None else self._listings[index].of(scored)
        return {"index": index, "text": text, "logprobs": listed, "finish_reason": finish}

    async def _whole(self, pieces: AsyncIterator[Piece], jobs: list[Job]) -> dict[str, Any]:
        """Return the whole answer."""
        texts = [self._beginning(i) for i in range(len(self._listings))]
        found = [(text, list(scored), "length") for text, scored in texts]
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            async for index, event in pieces:
                self._count(event.token)
                text, scored, _ = found[index]
                scored += self._settled[index].add(event)
                found[index] = (text + event.text, scored, answers.finish_reason(event.finish) or "length")
        choices = [self._choice(i, *parts) for i, parts in enumerate(found)]
        await self._save(jobs)
        return self._head.around(choices, usage=self._usage(), **self._state)

    async def _chunks(self, pieces: AsyncIterator[Piece], jobs: list[Job]) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer chunk by chunk."""
        for i in range(len(self._listings)):
            text, scored = self._beginning(i)
            if text or scored or self._body.max_tokens == 0:
                finish = "length" if self._body.max_tokens == 0 else None
                yield self._head.around([self._choice(i, text, scored, finish)])
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            async for index, event in pieces:
                self._count(event.token)
                scored = self._settled[index].add(event)
                if event.text or scored or event.finish:
                    finish = answers.finish_reason(event.finish)
                    yield self._head.around([self._choice(index, event.text, scored, finish)])
        await self._save(jobs)
        usage = self._body.stream_options and self._body.stream_options.include_usage
        if usage or self._state:
            yield self._head.around([], **({"usage": self._usage()} if usage else {}), **self._state)

    def _usage(self) -> dict[str, Any]:
        return answers.usage(self._n_prompt, self._n_written, self._cached)

    def _count(self, token: int) -> None:
        """Count a new token."""
        if not self._n_written:
            self._service.metrics.first.add(time.monotonic() - self._begin)
        self._n_written += token >= 0


class Chat:
    """An answer to POST /v1/chat/completions.

    Args:
        service: what answers.
        body: of the request.
    """

    def __init__(self, service: Service, body: ChatBody) -> None:
        self._service, self._body, self._begin = service, body, time.monotonic()
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = Head(answers.new_id("chatcmpl"), kind, service.name, service.fingerprint)
        self._n_written = 0
        self._state: dict[str, Any] = {}  # of the answer, if one is saved

    async def respond(self, request: Request) -> Response:
        """Return the response, whole or as a stream.

        Args:
            request: of the client.
        """
        deadline = self._service.seconds_left()
        chat = await self._service.chat(self._body, await restored(self._service, self._body))
        self._service.metrics.cached += chat.cached
        pieces = merged([chat.job], deadline)
        if self._body.stream:
            return stream(self._chunks(chat, pieces), [chat.job])
        try:
            return JSONResponse(await while_connected(request, self._whole(chat, pieces)))
        finally:
            chat.job.cancel()

    async def _events(self, chat: ChatJob, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """Yield the events, and store the states once all texts have ended."""
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            async for piece in pieces:
                if not self._n_written:
                    self._service.metrics.first.add(time.monotonic() - self._begin)
                self._n_written += piece.event.token >= 0
                yield piece
        states = await asyncio.to_thread(self._service.remember, chat)
        if self._body.save_state is not None:
            self._state = {"state": await saved(self._service, self._body.save_state, states[0])}

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any] | None:
        """Return log-probabilities if they are asked for."""
        return answers.chat_logprobs(self._service.tokenizer, scored) if self._body.logprobs else None

    async def _whole(self, chat: ChatJob, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        """Return the whole answer."""
        scored: list[list[Scored]] = [[] for _ in range(self._body.choices)]
        settled = [Settled() for _ in scored]
        messages = [Message(chat.rules.reader()) for _ in range(self._body.choices)]
        async for index, event in self._events(chat, pieces):
            messages[index].add(event)
            scored[index] += settled[index].add(event)
        choices = [
            {
                "index": index,
                "message": message.whole(),
                "logprobs": self._logprobs(scored[index]),
                "finish_reason": message.finish,
            }
            for index, message in enumerate(messages)
        ]
        return self._head.around(choices, usage=self._usage(chat), **self._state)

    async def _chunks(self, chat: ChatJob, pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer chunk by chunk."""
        for index in range(self._body.choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        messages = [Message(chat.rules.reader()) for _ in range(self._body.choices)]
        settled = [Settled() for _ in messages]
        async for index, event in self._events(chat, pieces):
            scored = settled[index].add(event)
            deltas = messages[index].add(event) or ([{"content": ""}] if scored else [])
            for delta in deltas:
                yield self._chunk(index, delta, self._logprobs(scored) if delta is deltas[0] else None)
            if event.finish:
                yield self._chunk(index, {}, None, messages[index].finish)
        usage = self._body.stream_options and self._body.stream_options.include_usage
        if usage or self._state:
            yield self._head.around([], **({"usage": self._usage(chat)} if usage else {}), **self._state)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head.around([choice])

    def _usage(self, chat: ChatJob) -> dict[str, Any]:
        return answers.usage(chat.n_prompt, self._n_written, chat.cached)
