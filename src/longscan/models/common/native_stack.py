"""A language model as the native decoder sees it: its sublayers in order, if it knows all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from longscan import ops
from longscan.models.common.adapted import PLAIN
from longscan.models.common.backbone import Backbone
from longscan.models.common.layers import (
    DtProjection,
    Linear,
    PlainRMSNorm,
    RMSNorm,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
)
from longscan.models.common.mixer import Block, Blocks, Mixer
from longscan.models.common.native_decode import matrix, plain

__all__ = ["stack_of"]

SHARED = (Backbone, Blocks, Block)
USUAL = (
    *(Linear, DtProjection, PlainRMSNorm, RMSNorm, WeightOnlyLinear, WeightOnlyEmbedding, *PLAIN),
    *(nn.Embedding, nn.Conv1d, nn.ModuleList),
)


def stack_of(model: Any, kinds: tuple[type[nn.Module], ...]) -> tuple[ops.Stack, list[Tensor]] | None:
    """Return the weights of a language model for the native decoder; None if it cannot run it as it is.

    Args:
        model: a LanguageModel.
        kinds: the model's own module types, beside the shared ones.

    Returns:
        stack: the weights.
        copied: the parameters it holds in another form.
    """
    body = model.backbone
    if not (usual(model, (*SHARED, *kinds)) and ops.decodes()):
        return None  # below, embedded tokens and weights are float32, and so is the residual stream
    embedding = matrix(body.embedding)
    head = embedding if model.lm_head is None else matrix(model.lm_head)
    norms = [body.norm_f, *(m for block in body.layers for m in block.children() if type(m) is RMSNorm)]
    found = body.native()
    if embedding is None or head is None or None in found or len({norm.eps for norm in norms}) > 1:
        return None
    width = (model.config.d_model,)
    if not all(plain(norm.weight) and norm.weight.shape == width for norm in norms):
        return None
    sublayers = [sublayer for block in found for sublayer in block or ()]
    try:
        factors = body.embedding_multiplier, body.hidden_multiplier
        stack = ops.Stack(sublayers, embedding, head, norms[0].weight, norms[0].eps, *factors)
    except ValueError:  # other shapes, as after pruning
        return None
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return stack, [mixer.get_parameter(name) for mixer in mixers for name in mixer.copied]


def usual(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether the decoder supports all modules of a model: no parametrisation.

    Args:
        model: any.
        kinds: the model's own module types, beside the shared layers.
    """
    known = {*USUAL, *kinds}
    return all(type(module) in known for module in model.modules() if module is not model)
