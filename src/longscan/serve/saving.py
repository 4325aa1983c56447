"""Saving and restoring states by name, for requests: what `save_state` and `load_state` of a body do."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from longscan.errors import LongscanError
from longscan.inference.prefill import CHUNK, encode, read
from longscan.inference.turns import Known
from longscan.models.common.state import SavedState
from longscan.serve.bodies import ChatBody, CompletionBody
from longscan.serve.errors import ApiError, api_error
from longscan.serve.job import Job
from longscan.serve.service import Service
from longscan.serve.states import StateStore

__all__ = ["after_prompt", "continued", "restored", "saved", "store_of", "written"]


def store_of(service: Service) -> StateStore:
    """Return the states of a server.

    Args:
        service: of it.

    Raises:
        ApiError: it has none.
    """
    if service.states is None:
        message = "this server saves no states: start it with --state-dir."
        raise ApiError(400, message, "unsupported_parameter", "save_state")
    return service.states


async def restored(service: Service, body: ChatBody | CompletionBody) -> Known | None:
    """Return the state that a request continues, if it names one.

    Args:
        service: of its model.
        body: of the request.

    Raises:
        ApiError: there is none of this name, or it is another model's; or the server saves none.
    """
    if body.save_state is not None:
        store_of(service)
    name = body.load_state
    if name is None:
        return None
    store = store_of(service)
    return await asyncio.to_thread(lambda: store.load(name, service.model, service.weights))


async def saved(service: Service, name: str, known: Known | None) -> dict[str, Any]:
    """Save a state, and return the field `state` of the answer: what failed does not take the answer away.

    Args:
        service: of its model.
        name: of the state.
        known: it; None if the answer's text is not what the state holds.
    """
    store = store_of(service)
    try:
        if known is None:
            message = "the state holds tokens that the answer's text does not show: it was not saved."
            raise ApiError(400, message, "state_not_saved", "save_state")
        found = known
        return await asyncio.to_thread(
            lambda: store.save(name, service.model, service.weights, found, service.name)
        )
    except (ApiError, LongscanError) as error:
        refused = api_error(error)
        shape = {
            "message": str(refused),
            "type": refused.kind,
            "code": refused.code,
            "param": refused.param,
        }
        return {"name": name, "error": shape}


def continued(service: Service, known: Known, prompt: str | list[int]) -> np.ndarray:
    """Return the ids of a prompt that follows a state.

    Args:
        service: of its model.
        known: the state.
        prompt: text or ids, or nothing if the state has a pending token.

    Raises:
        ApiError: there is nothing to begin with.
    """
    ids = (
        encode(service.tokenizer, [prompt], begins=False)[0]
        if isinstance(prompt, str)
        else np.array(prompt, np.int64)
    )
    if not len(ids) and not known.saved.pending:
        message = "prompt: expected some text after this state, which has no pending token."
        raise ApiError(400, message, "invalid_value", "prompt")
    return ids


async def after_prompt(service: Service, ids: np.ndarray, known: Known | None) -> Known:
    """Return the state after a prompt, which is prefilled between the steps of running texts.

    Args:
        service: of its model.
        ids: of the prompt, without what the state holds.
        known: the state before it.
    """
    before = known.saved if known else SavedState(service.model.init_state(1), 0, [])
    whole = np.concatenate([np.array(before.pending, np.int64), ids])
    state, position = before.state, before.position
    with service.worker.reserve(len(whole)):
        while len(whole):
            if service.worker.ended:
                raise ApiError(503, "the server is shutting down.", "draining")
            part, start = whole[: CHUNK - position % CHUNK], state if position else None
            _, state = await service.worker.call(
                lambda part=part, start=start, at=position: read(service.model, part, start, at),  # type: ignore[misc]
                slow=True,
            )
            position, whole = position + len(part), whole[len(part) :]
    return Known([], SavedState(state, position, []))


def written(job: Job) -> Known | None:
    """Return the state after the only text of a completion, without the token that ended it.

    Args:
        job: that has ended.
    """
    text = job.texts[0]
    if text.saved is None:
        return None
    return Known([], text.saved._replace(pending=[]) if text.finish == "eos" else text.saved)
