"""What a language model does with a text, token by token: a report computed in short pieces of work.

The functions are generators: each `next` does a bounded piece, at most a layer's, and what they return is the
report. Between two pieces the model may serve others.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from longscan.errors import UsageError
from longscan.inference.layer_scans import Scan, Softmax
from longscan.inference.prompt_scores import Score, prompt_scores
from longscan.inference.text_layers import states_of, walk_layers
from longscan.models import LanguageModel

__all__ = ["Inspection", "Matrix", "Pieces", "ScanReport", "inspect_attention", "inspect_text"]

T = TypeVar("T")
Pieces: TypeAlias = Generator[None, None, T]
ELEMENTS = 1 << 22  # of the largest tensor of a piece of a matrix, about


class ScanReport(NamedTuple):
    """The selective scan of a layer over a text.

    Attributes:
        number: of the layer, from 0.
        dt: (n,) step sizes, means over channels or heads.
        norms: (n,) of the state after each token.
        half_lives: (3,) quartiles over tokens, channels and states, in tokens; see `layer_scans`.
    """

    number: int
    dt: Tensor
    norms: Tensor
    half_lives: Tensor


class Inspection(NamedTuple):
    """A report on a text of n tokens.

    Attributes:
        scans: of the layers that have one, first to last.
        scores: (n + 1) the tokens with their log-probabilities and the likeliest ones at their positions; the
            last is of an arbitrary token, for what is likely after the text.
    """

    scans: list[ScanReport]
    scores: list[Score]


class Matrix(NamedTuple):
    """A matrix between the tokens of a text.

    Attributes:
        part: whose it is.
        values: (n, n) of queries and keys.
    """

    part: Scan | Softmax
    values: Tensor


@torch.no_grad()
def inspect_text(model: LanguageModel, ids: Tensor, top: int, vocab_size: int) -> Pieces[Inspection]:
    """Return a report on a text; see the module on how.

    Args:
        model: in evaluation mode.
        ids: (n,) int64, a text from its start.
        top: how many of the likeliest tokens to list at each position.
        vocab_size: see `prompt_scores`.

    Raises:
        LongscanError: a layer computes NaN or infinity.
    """
    scans, scores = list[ScanReport](), list[Score]()
    for layer in walk_layers(model, ids):
        if layer.scan is not None:
            yield  # the layer itself was a piece
            scans.append(ScanReport(layer.number, layer.scan.dt.mean(1), *states_of(layer.scan)))
        yield
    for score in prompt_scores(model, torch.cat([ids, ids[-1:]]), top, vocab_size):
        scores.append(score)
        if len(scores) % 128 == 0:  # as many as it computes at a time
            yield
    return Inspection(scans, scores)


@torch.no_grad()
def inspect_attention(
    model: LanguageModel, ids: Tensor, number: int, lane: int | None = None
) -> Pieces[list[Matrix]]:
    """Return the hidden attention of the scan of a layer, and its attention, as far as it has them.

    Args:
        model: in evaluation mode.
        ids: (n,) int64, a text from its start.
        number: of the layer.
        lane: a channel or head; None: the mean over all, of absolute values in a scan.

    Raises:
        UsageError: the layer has neither, or not so many channels or heads.
        LongscanError: a layer computes NaN or infinity.
    """
    for layer in walk_layers(model, ids):
        yield
        if layer.number != number:
            continue
        parts = [part for part in (layer.scan, layer.attention) if part is not None]
        most = max(part.lanes for part in parts)
        if lane is not None and lane >= most:
            raise UsageError(f"lane: expected 0 to {most - 1}, got {lane}.")
        found = []
        for part in parts:
            if isinstance(part, Softmax) or lane is not None:
                if lane is None or lane < part.lanes:
                    found.append(Matrix(part, part.matrix(lane)))
                continue
            total = torch.zeros((), device=ids.device)
            for some in part.parts(ELEMENTS):
                total = total + some.cpu()
                yield
            found.append(Matrix(part, total / part.lanes))
        return found
    raise UsageError(f"layer: expected one with a selective state or attention, got {number}.")
