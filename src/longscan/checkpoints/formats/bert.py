"""BERT as transformers' BertModel, BertForPreTraining and BertForSequenceClassification have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.base import IDLE, Copy, Format, build, check_fields
from longscan.errors import LongscanError
from longscan.models.bert import BertConfig, Score

__all__ = ["FORMAT"]

# their name -> ours
HUGGINGFACE = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "n_types",
    "pad_token_id": "pad_id",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
}
# gelu_new and gelu_pytorch_tanh are one formula; the file of the original code says gelu and means this one
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
HEADS = {
    "none": "BertModel",
    "pretraining": "BertForPreTraining",
    "classifier": "BertForSequenceClassification",
}

# fields with which only one model is meant: name -> the values that mean it
ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
}
IDLE_HERE = IDLE.union(
    "classifier_dropout directionality gradient_checkpointing layer_norm_type pooler_fc_size "
    "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type "
    "problem_type sentence_transformers sbert_ce_default_activation_function".split()  # see _score
)
IDENTITY = "torch.nn.modules.linear.Identity"
# of one output, what sentence-transformers applies -> ours
ACTIVATION_FNS: dict[str, Score] = {
    IDENTITY: "none",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}
# of transformers
PROBLEMS: dict[str | None, Score] = {
    None: "softmax",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
TIED = Copy(
    "cls.predictions.decoder.weight",
    "bert.embeddings.word_embeddings.weight",
    None,
    "{name} is not the word embedding: that is another model.",
)


def _read(raw: Mapping[str, Any], tokenizer_size: int | None) -> BertConfig:
    """Return the Config; the head is the one that `architectures` names, if it is one of ours."""
    check_fields(raw, HUGGINGFACE, ONLY, IDLE_HERE)
    act = raw.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise LongscanError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}.")
    written = raw.get("architectures") or []
    known = [head for head, name in HEADS.items() if name in written] if isinstance(written, list) else []
    head = known[0] if known else "none"
    fields = {name: raw[name] for name in HUGGINGFACE if raw.get(name) is not None}
    labels = _labels(raw) if head == "classifier" else ()
    own = {"head": head, "labels": labels, "score": _score(raw, len(labels))}
    names = HUGGINGFACE | {name: name for name in own}
    return build(BertConfig, {**fields, "hidden_act": ACTIVATIONS[act], **own}, names)


def _score(raw: Mapping[str, Any], n_labels: int) -> Score:
    """Return what makes scores of a classifier's logits, as sentence-transformers and transformers do.

    A cross-encoder has one output. sentence-transformers takes its sigmoid unless config.json names another
    function; transformers takes it unless the problem is a regression.
    """
    problem = raw.get("problem_type")
    if problem is not None and problem not in PROBLEMS:
        known = ", ".join(name for name in PROBLEMS if name)
        raise LongscanError(f"problem_type: expected one of {known}, got {problem!r}.")
    if n_labels != 1:
        return PROBLEMS[problem] if n_labels else "softmax"
    theirs = raw.get("sentence_transformers")
    named = theirs.get("activation_fn") if isinstance(theirs, Mapping) else None
    named = named or raw.get("sbert_ce_default_activation_function")
    if named is None:
        return "none" if problem == "regression" else "sigmoid"
    if named not in ACTIVATION_FNS:
        known = ", ".join(ACTIVATION_FNS)
        raise LongscanError(f"sentence_transformers.activation_fn: expected one of {known}, got {named!r}.")
    return ACTIVATION_FNS[named]


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a classifier's outputs."""
    named = raw.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    try:
        labels = {int(number): label for number, label in named.items()}
        names = tuple(labels[number] for number in range(len(labels)))
        if not all(isinstance(name, str | int) for name in names) or len(set(map(str, names))) < len(named):
            raise ValueError("names of their own")
        return tuple(map(str, names))
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise LongscanError(
            f'id2label: expected {{"0": a name, "1": another, ...}}, got {named!r}.'
        ) from error


def _write(config: BertConfig) -> dict[str, Any]:
    """Return config.json as transformers reads it."""
    fields = {theirs: getattr(config, ours) for theirs, ours in HUGGINGFACE.items()}
    ids = {str(number): label for number, label in enumerate(config.labels)}
    named: dict[str, Any] = {
        "id2label": ids,
        "label2id": {label: int(number) for number, label in ids.items()},
    }
    if config.score == "none":
        named |= {"problem_type": "regression", "sentence_transformers": {"activation_fn": IDENTITY}}
    elif config.score == "sigmoid" and len(ids) > 1:
        named["problem_type"] = "multi_label_classification"
    return {
        "architectures": [HEADS[config.head]],
        "model_type": "bert",
        **fields,
        "intermediate_size": config.d_inner,
        "hidden_act": "gelu" if config.activation == "gelu" else "gelu_new",
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **(named if ids else {}),
    }


def _ours(name: str) -> str | None:
    """Return the present name of a tensor.

    A bare encoder has no `bert.` prefix; files of the first years say gamma and beta; some hold the bias of
    the masked-LM head twice, and buffers that say nothing.
    """
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    name = "cls.predictions.bias" if name == "cls.predictions.decoder.bias" else name
    return None if name.endswith(BUFFERS) else name


FORMAT = Format(read=_read, write=_write, ours=_ours, copy=TIED, buffers=BUFFERS)
