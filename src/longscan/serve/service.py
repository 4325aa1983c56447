"""What the routes share: a model, its name, limits, and how a request becomes jobs and texts."""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import longscan
from longscan import ops
from longscan.errors import UsageError
from longscan.inference.engine import Engine
from longscan.inference.prefill import encode
from longscan.inference.prefix_cache import PrefixCache
from longscan.inference.prompt_scores import prompt_scores
from longscan.inference.request import Request
from longscan.inference.turns import Known, Turns, answered, encode_pieces
from longscan.models import LanguageModel
from longscan.serve.answers import Scored
from longscan.serve.bodies import ChatBody, CompletionBody, plain_messages
from longscan.serve.constraints import Constraints
from longscan.serve.errors import ApiError
from longscan.serve.formats import ToolBody
from longscan.serve.job import ChatJob, Job
from longscan.serve.limits import Limits
from longscan.serve.metrics import Metrics
from longscan.serve.states import StateStore
from longscan.serve.worker import Worker
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate, Pieces
from longscan.tokenizers.chat_spans import after
from longscan.tokenizers.chat_templates import DEFAULT

__all__ = ["Service"]

READ_TOKENS = 512  # prompt tokens of a step: what running texts stall for, at most
SCORE_TOKENS = 128  # of a prompt, between two steps
TOOL_USE = "tool_use"  # the name of a template for chats with tools


class Service:
    """A model behind a worker. Its caches are its own: no other model's state gets in.

    Args:
        model: any causal model.
        tokenizer: the one it was trained with.
        name: that clients see.
        template: how it wants to be talked to.
        limits: what is allowed.
        beside: another model of the server, with which it shares the worker, the metrics and saved states.
        states: that clients save; None if they may not.

    Attributes:
        metrics: of the server.
        worker: see `Worker`.
        engine: of this model.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        name: str,
        template: ChatTemplate,
        limits: Limits | None = None,
        beside: Service | None = None,
        states: StateStore | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.template, self.limits = template, limits or Limits()
        self.created = int(time.time())
        self.metrics: Metrics = beside.metrics if beside else Metrics()
        self._ends, self._stops = template.ends(tokenizer)
        self.constraints = Constraints(tokenizer, self._ends, self.limits.queue, self.limits.deadline)
        own = tokenizer.chat_templates
        named = template.own and template.name == DEFAULT and TOOL_USE in own
        self._tool_template = replace(template, source=own[TOOL_USE], name=TOOL_USE) if named else template
        cache = PrefixCache(model, self.limits.cache_bytes)
        self.engine = Engine(
            model,
            tokenizer,
            slots=self.limits.slots,
            prefix_cache=cache,
            read_tokens=READ_TOKENS,
            max_tokens=self.limits.max_length,
        )
        self.states: StateStore | None = beside.states if beside else states
        self.worker: Worker = beside.worker if beside else Worker(self.limits.slots, self.limits.queue)
        self.worker.engines.append(self.engine)
        self.turns = Turns(model, self.limits.cache_bytes)
        self.fingerprint = f"{longscan.__version__}-{ops.backend().replace(':', '-')}"

    @functools.cached_property
    def weights(self) -> str:
        """The fingerprint of the model; to compute it takes a while, and only saved states need it."""
        return self.model.fingerprint()

    def seconds_left(self) -> float:
        """Return the deadline of a request that arrives now, on the clock of `time.monotonic`."""
        return time.monotonic() + self.limits.deadline

    async def submit(self, request: Request, n: int = 1) -> Job:
        """Return the job of a request, for which the worker has room: see `Worker.check`.

        Args:
            request: what to generate.
            n: continuations.

        Raises:
            LongscanError: the request is invalid, or the engine has failed.
        """
        return await self.worker.submit(self.engine, request, n)

    async def complete(
        self, body: CompletionBody, prompts: Sequence[np.ndarray], before: Known | None = None
    ) -> list[Job]:
        """Return the jobs of the prompts of a completion.

        Args:
            body: of the request.
            prompts: their ids.
            before: the state that they continue, if any.

        Raises:
            ApiError: a prompt is too long.
            LongscanError: a prompt is invalid.
            BusyError: too much is waiting.
        """
        asked = 16 if body.max_tokens is None else body.max_tokens
        seed, jobs, n = secrets.randbelow(2**62), list[Job](), len(body.prompts) * body.choices
        if n > self.worker.capacity:
            message = f"{n} continuations: expected at most {self.worker.capacity}, prompts times n."
            raise ApiError(400, message, "invalid_value", "n")
        known = before or self.turns.nothing()
        state, position, pending = known.saved
        constraint = (await self.constraints.of(body)).constraint
        self.worker.check(n, sum(map(len, prompts)))
        try:
            for i, ids in enumerate(prompts):
                config = body.sampling(
                    self._bounded(known.length + len(ids), asked, "prompt"), body.logprobs, seed
                )
                assert config.seed is not None
                config = replace(config, seed=(config.seed + i * body.choices) % 2**64)
                ends = self._ends if constraint else () if body.ignore_eos else self.tokenizer.eos_ids
                request = Request(
                    ids=ids,
                    config=config,
                    eos_id=ends,
                    state=state if position else None,
                    position=position,
                    pending=pending,
                    keep=body.save_state is not None,
                    before_stop=body.save_state is not None,
                    logit_bias=body.biases,
                    constraint=constraint,
                )
                jobs.append(await self.submit(request, body.choices))
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        return jobs

    async def ids_of(self, prompts: Sequence[str | list[int]], param: str = "prompt") -> list[np.ndarray]:
        """Return the ids of prompts; an empty one starts a new text.

        Args:
            prompts: each text or ids.
            param: the field they come from.
        """

        def run() -> list[np.ndarray]:
            texts = [prompt for prompt in prompts if isinstance(prompt, str)]
            encoded = iter(encode(self.tokenizer, texts))
            start = np.array(self.tokenizer.start[-1:], np.int64)
            found = [
                next(encoded) if isinstance(prompt, str) else np.array(prompt, np.int64) for prompt in prompts
            ]
            return [ids if len(ids) else start for ids in found]

        encoded = await asyncio.to_thread(run)
        most = self.model.config.vocab_size - 1
        for ids in encoded:
            if ids.max() > most:
                message = f"{param}: expected token ids up to {most:,}, got {ids.max():,}."
                raise ApiError(400, message, "invalid_value", param)
        return encoded

    def check_biases(self, biases: Mapping[int, float]) -> None:
        """Raise unless all ids of biases are the model's.

        Args:
            biases: by id.

        Raises:
            ApiError: one is not.
        """
        most = self.model.config.vocab_size - 1
        if biases and max(biases) > most:
            message = f"logit_bias: expected token ids up to {most:,}, got {max(biases):,}."
            raise ApiError(400, message, "invalid_value", "logit_bias")

    def check_lengths(self, prompts: Sequence[np.ndarray], together: bool, param: str = "prompt") -> None:
        """Raise unless prompts are short enough.

        Args:
            prompts: their ids.
            together: whether they may have so many tokens together, instead of each.
            param: the field they come from.

        Raises:
            ApiError: they are longer.
        """
        lengths = [len(ids) for ids in prompts]
        self._bounded(sum(lengths) if together else max(lengths), 0, param)

    async def scores(self, ids: np.ndarray, top: int) -> list[Scored]:
        """Return the tokens of a prompt with their log-probabilities.

        Args:
            ids: of the prompt.
            top: how many of the most likely tokens to list.
        """
        found = prompt_scores(self.model, ids, top, self.tokenizer.vocab_size)
        scored: list[Scored] = []
        with self.worker.reserve(len(ids)):
            while len(scored) < len(ids):
                if self.worker.ended:
                    raise ApiError(503, "the server is shutting down.", "draining")
                part = await self.worker.call(lambda: list(itertools.islice(found, SCORE_TOKENS)), slow=True)
                scored += [Scored(*score) for score in part]
        return scored

    async def chat(self, body: ChatBody, before: Known | None = None) -> ChatJob:
        """Return the job of a chat.

        Args:
            body: of the request.
            before: a state that the messages continue.

        Raises:
            ApiError: the messages are too long.
            LongscanError: they are invalid, or the template rejects them.
            BusyError: too much is waiting.
        """
        messages = plain_messages(body.messages)
        rules = await self.constraints.of(body, self._tool_template.source)
        more = body.chat_template_kwargs or {}
        prompt = await asyncio.to_thread(self.render, messages, tools=body.tools, **more)
        known = self.turns.best(prompt)
        if before is not None:
            if not before.pieces or after(prompt, before.pieces) is None:
                message = f"load_state: the messages do not continue what {body.load_state!r} holds."
                raise ApiError(400, message, "state_mismatch", "load_state")
            known = max(known, before, key=lambda one: one.length)
        rest = await asyncio.to_thread(self.encode, after(prompt, known.pieces) or [])
        if not len(rest) and not known.saved.pending:
            known = self.turns.nothing()
            rest = await asyncio.to_thread(self.encode, prompt)
        if not len(rest) and not known.saved.pending:
            raise UsageError("messages: the chat template renders nothing to answer.")
        total = known.length + len(rest)
        asked = self.limits.max_length if body.max_new_tokens is None else body.max_new_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        config = body.sampling(self._bounded(total, asked, "messages"), logprobs, secrets.randbelow(2**62))
        self.check_biases(body.biases)
        self.worker.check(body.choices, len(rest))
        state, position, pending = known.saved
        request = Request(
            ids=rest,
            config=config if body.form else replace(config, stop=(*config.stop, *self._stops)),
            eos_id=() if body.ignore_eos else self._ends,
            state=state if position else None,
            position=position,
            pending=pending,
            keep=True,
            before_stop=True,
            logit_bias=body.biases,
            constraint=rules.constraint,
            shown=rules.shown,
        )
        job = await self.submit(request, body.choices)
        return ChatJob(job, prompt, total, known.length, rules)

    def remember(self, chat: ChatJob) -> list[Known | None]:
        """Store the states after the answers of a chat, for its next turn, and return them.

        Args:
            chat: that has ended.

        Returns:
            For each answer its state; None if that does not hold what the answer's text says.
        """
        found: list[Known | None] = []
        for text in chat.job.texts:
            known = None
            if text.saved is not None:
                n = text.saved.position + len(text.saved.pending) - chat.n_prompt
                ended = text.finish == "eos"
                known = answered(self.tokenizer, chat.prompt, text.ids[:n], text.text, text.saved, ended)
                if known is not None:
                    self.turns.store(known)
            found.append(known)
        return found

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        prompt: bool = True,
        tools: Sequence[ToolBody] | None = None,
        **variables: Any,
    ) -> Pieces:
        """Return the pieces of messages.

        Args:
            messages: of a chat.
            prompt: whether the beginning of an answer follows.
            tools: that may be called.
            variables: others that the template reads.
        """
        template = self._tool_template if tools else self.template
        given = [tool.model_dump(exclude_none=True) for tool in tools or ()] or None
        return template.render(self.tokenizer, messages, prompt=prompt, tools=given, **variables)

    def encode(self, pieces: Pieces) -> np.ndarray:
        """Return the ids of pieces (n,).

        Args:
            pieces: see `render`.
        """
        return encode_pieces(self.tokenizer, pieces)

    def _bounded(self, n_prompt: int, asked: int, param: str) -> int:
        """Return how many tokens may follow a prompt."""
        most = self.limits.max_length
        if n_prompt + min(asked, 1) > most:
            expected = f"at most {most - min(asked, 1):,}"
            message = f"the prompt has {n_prompt:,} tokens: expected {expected}. Shorten it."
            raise ApiError(400, message, "context_length_exceeded", param)
        return max(1, min(asked, most - n_prompt))
