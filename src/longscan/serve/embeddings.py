"""Answers to POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from longscan.inference.text_vectors import fill_vectors, shortened
from longscan.serve.bodies import EmbeddingBody
from longscan.serve.errors import ApiError
from longscan.serve.service import READ_TOKENS, Service
from longscan.serve.streaming import while_connected

__all__ = ["Embeddings"]


class Embeddings:
    """An answer to a request for the vectors of texts.

    Args:
        service: what answers.
        body: of the request.
    """

    def __init__(self, service: Service, body: EmbeddingBody) -> None:
        self._service, self._body = service, body

    async def respond(self, request: Request) -> Response:
        """Return the response.

        Args:
            request: of the client.

        Raises:
            ApiError: a text is too long, or there are fewer dimensions.
            BusyError: too much is waiting.
            TimeoutError: it takes too long.
        """
        service, size = self._service, self._service.model.config.d_model
        dimensions = size if self._body.dimensions is None else self._body.dimensions
        if dimensions > size:
            message = f"dimensions: expected at most {size:,}, got {dimensions:,}."
            raise ApiError(400, message, "invalid_value", "dimensions")
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + service.limits.deadline):
            texts = await service.ids_of(self._body.texts, "input")
            service.check_lengths(texts, together=False, param="input")
            vectors = torch.empty(len(texts), size)
            await while_connected(request, self._fill(texts, vectors))
        n = sum(map(len, texts))
        rows = shortened(vectors, dimensions)
        data = [
            {"object": "embedding", "index": index, "embedding": self._shown(row)}
            for index, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": n, "total_tokens": n}
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

    async def _fill(self, texts: list[Any], vectors: Tensor) -> None:
        """Compute the vectors, a few tokens at a time between the steps of running texts."""
        worker, passes = self._service.worker, fill_vectors(self._service.model, texts, vectors)

        def some() -> bool:
            """Process some tokens; return whether there are more."""
            left = READ_TOKENS
            while left > 0:
                n = next(passes, None)
                if n is None:
                    return False
                left -= n
            return True

        with worker.reserve(sum(map(len, texts))):
            while await worker.call(some, slow=True):
                if worker.ended:
                    raise ApiError(503, "the server is shutting down.", "draining")

    def _shown(self, vector: Tensor) -> list[float] | str:
        """Return a vector as the client wants it."""
        if self._body.encoding_format == "base64":
            return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers
