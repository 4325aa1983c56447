"""The models that a server offers, by the names that clients see: a base, and its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from longscan.errors import UsageError
from longscan.models import LanguageModel
from longscan.serve.errors import ApiError
from longscan.serve.limits import Limits
from longscan.serve.metrics import Metrics
from longscan.serve.service import Service
from longscan.serve.states import StateStore
from longscan.serve.worker import Worker
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate

__all__ = ["Served", "serve_adapters"]


class Served:
    """The services of a server, which have one worker.

    Args:
        services: at least one; the first is the base.

    Raises:
        UsageError: two have one name.
    """

    def __init__(self, *services: Service) -> None:
        self._services = {service.name: service for service in services}
        if len(self._services) < len(services):
            names = [service.name for service in services]
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{twice!r} is the name of two models: give one of them another name.")

    def __iter__(self) -> Iterator[Service]:
        """Yield the services."""
        return iter(self._services.values())

    @property
    def names(self) -> list[str]:
        """What clients may ask for, the base first."""
        return list(self._services)

    @property
    def usual(self) -> Service:
        """What answers a request that names no model: the first adapter, or the base if there is none."""
        return list(self)[min(1, len(self._services) - 1)]

    @property
    def limits(self) -> Limits:
        """What the server allows."""
        return self.usual.limits

    @property
    def worker(self) -> Worker:
        """The thread that all share."""
        return self.usual.worker

    @property
    def metrics(self) -> Metrics:
        """Of the server."""
        return self.usual.metrics

    def find(self, name: str | None) -> Service:
        """Return what answers a request.

        Args:
            name: of the model; None is the usual one.

        Raises:
            ApiError: there is no such model.
        """
        if name is None:
            return self.usual
        if name not in self._services:
            expected = " or ".join(repr(known[:80]) for known in self.names[:8])
            message = f"the model {name[:80]!r} does not exist here: expected {expected}."
            raise ApiError(404, message, "model_not_found", "model")
        return self._services[name]

    def described(self) -> list[dict[str, Any]]:
        """Return the models in the form of /v1/models; an adapter has its base as `parent`."""
        base = next(iter(self))
        shape = {"object": "model", "created": base.created, "owned_by": "longscan"}
        return [
            {"id": service.name, **shape, "parent": None if service is base else base.name}
            for service in self
        ]


def serve_adapters(
    base: tuple[LanguageModel, Tokenizer, ChatTemplate],
    name: str,
    adapters: Mapping[str, tuple[LanguageModel, Tokenizer, ChatTemplate]],
    limits: Limits,
    states: StateStore | None = None,
) -> Served:
    """Return the services of a model and of its adapters; they share the memory for states.

    Args:
        base: the model, its tokenizer, and how it wants to be talked to.
        name: of the base.
        adapters: name -> likewise, on the weights of the base.
        limits: of the server.
        states: that clients save; None if they may not.

    Raises:
        UsageError: two have one name.
    """
    share = replace(limits, cache_bytes=limits.cache_bytes // (1 + len(adapters)))
    model, tokenizer, template = base
    first = Service(model, tokenizer, name, template, share, states=states)
    others = [
        Service(model, tokenizer, its, template, share, beside=first)
        for its, (model, tokenizer, template) in adapters.items()
    ]
    return Served(first, *others)
