"""Models whose weights or modules others changed: averaged weights, adapters, hooks, replaced methods."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longscan.models import MODELS, LanguageModel, Model, Translator

LANGUAGE = [name for name, entry in MODELS.items() if entry.kind == "language"]


def build(name: str, **fields: Any) -> Any:
    entry = MODELS[name]
    settings = {**entry.presets["tiny"], **fields}
    return entry.cls(entry.config.from_dict(settings), torch.Generator().manual_seed(0)).double().eval()


def steps(model: LanguageModel, ids: Tensor) -> Tensor:
    state = model.init_state(len(ids))
    return torch.stack([model.step(column, state)[0] for column in ids.unbind(1)], 1)


def close(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-9


def scaled(model: Model) -> None:
    """What swapping in averaged weights does: neither addresses nor versions change."""
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def doubled(model: Model) -> None:
    """What a wrapper of forward does, on every module that maps vectors."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            before = module.forward
            module.forward = lambda *args, before=before: before(*args) * 1.5  # type: ignore[method-assign]


def hooked(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            module.register_forward_hook(lambda module, args, out: out * 1.5)


def sentences() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(4, 60, (3, 5), generator=draw), torch.randint(4, 60, (3, 6), generator=draw)


CHANGES = {change.__name__: change for change in (scaled, doubled, hooked)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LANGUAGE)
def test_steps_follow_what_was_changed(name: str, change: str) -> None:
    model = build(name)
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        close(steps(model, ids), before)
        CHANGES[change](model)
        after = model(ids).logits
    assert float((after - before).abs().max()) > 1e-6
    close(steps(model, ids), after)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["mamba", "llama", "cnn"])
def test_the_loss_follows_what_was_changed(name: str, change: str) -> None:
    model = build(name, tie_embeddings=False)
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1))
    CHANGES[change](model)
    close(model(ids, labels=ids, return_logits=False).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("change", CHANGES)
def test_translators_follow_what_was_changed(change: str) -> None:
    model: Translator = build("transformer", tie_embeddings=False)
    draw = torch.Generator().manual_seed(1)
    source, target = (
        torch.randint(4, 60, (3, 5), generator=draw),
        torch.randint(4, 60, (3, 6), generator=draw),
    )
    CHANGES[change](model)
    logits = model(source, target).logits
    state = model.start(source)
    close(torch.stack([model.step(ids, state)[0] for ids in target.unbind(1)], 1), logits)
    for smoothing in (0.0, 0.1):
        scores = logits[:, :-1].log_softmax(-1)
        aim = torch.full_like(scores, smoothing / (scores.shape[-1] - 1))
        aim.scatter_(2, target[:, 1:, None], 1 - smoothing)
        close(model.loss(source, target, smoothing), -(aim * scores).sum(-1).mean())


def test_an_adapter_on_the_projections_is_used_everywhere() -> None:
    model: Any = build("transformer")
    draw = torch.Generator().manual_seed(1)
    source, target = (
        torch.randint(4, 60, (3, 5), generator=draw),
        torch.randint(4, 60, (3, 6), generator=draw),
    )
    before = model(source, target).logits
    cross = model.decoder[0].cross_attn
    cross.in_proj.forward = lambda x, old=cross.in_proj.forward: old(x) * 2
    assert not torch.equal(model(source, target).logits, before)


@pytest.mark.parametrize("name", ["s4", "s4d", "lssl", "h3", "hyena"])
def test_tables_are_left_behind_by_copies(name: str) -> None:
    model = build(name)
    ids = torch.randint(100, (1, 3), generator=torch.Generator().manual_seed(1))
    small = len(pickle.dumps(model))
    expected = steps(model, ids)
    assert len(pickle.dumps(model)) == small
    twin = copy.deepcopy(model)
    scaled(model)
    close(steps(twin, ids), expected)
