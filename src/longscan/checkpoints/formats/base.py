"""One object per layout of a checkpoint: its config.json and its names of tensors, both ways.

Reading is strict: a field of config.json that is in no table is an error, because nobody knows what it would
have changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from longscan.core.config import Config, nearest
from longscan.errors import LongscanError

__all__ = [
    "ELSEWHERE",
    "IDLE",
    "QUANTIZATION",
    "TIED_HEAD",
    "BareFormat",
    "Copy",
    "Format",
    "build",
    "check_fields",
    "check_twins",
    "unpadded",
]

QUANTIZATION = "quantization_config"

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Copy:
    """A tensor that repeats another one in some files: the output matrix that is the embedding.

    Attributes:
        name: of the copy, ours.
        original: of the tensor that it repeats, ours.
        field: of the Config, true if it is a copy; None: it always is.
        refusal: the error if it holds other numbers; `{name}` is its name.
    """

    name: str
    original: str
    field: str | None
    refusal: str


#: of language models
TIED_HEAD = Copy(
    "lm_head.weight",
    "backbone.embedding.weight",
    "tie_embeddings",
    "config.json says the head is the embedding, the file holds another {name}. "
    "Set tie_word_embeddings (official: tie_embeddings) to false to use it.",
)


@dataclass(frozen=True)
class Format:
    """How one model stands in files.

    Attributes:
        read: the Config, of the content of config.json and the number of ids of the tokenizer beside it, if
            there is one: files that give the padded vocabulary only don't say how much of it is real.
        write: the content of config.json, of the Config; the type of the weights and the special tokens come
            from elsewhere.
        ours: our name of a tensor, of theirs; None: it says nothing and is left out.
        theirs: their name, of ours.
        copy: what the file may hold twice, if anything.
        buffers: endings of the names of whole numbers that were saved along and say nothing.
        arrange: tensors by our names and in our shapes, of those that are renamed and the Config, where names
            depend on it or a file has several tensors in one.
        restore: the inverse of `arrange`, before `theirs`.
    """

    read: Callable[[Mapping[str, Any], int | None], Config]
    write: Callable[[Any], dict[str, Any]]
    ours: Callable[[str], str | None] = str
    theirs: Callable[[str], str] = str
    copy: Copy | None = None
    buffers: tuple[str, ...] = ()
    arrange: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] | None = None
    restore: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] | None = None

    def incoming(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Return the tensors of a file as the model has them.

        Args:
            tensors: by their names.
            config: of the model.

        Raises:
            LongscanError: a tensor is there twice, and differs.
        """
        renamed = self.rename(tensors)
        return self.without_copy(self.arrange(renamed, config) if self.arrange else renamed, config)

    def outgoing(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Return the tensors of a model as a file has them.

        Args:
            tensors: by our names.
            config: of the model.
        """
        restored = self.restore(dict(tensors), config) if self.restore else tensors
        return {self.theirs(name): tensor for name, tensor in restored.items()}

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file under our names.

        Args:
            tensors: by their names, or by ours already.

        Raises:
            LongscanError: two of them are one under two names, and they differ.
        """
        return _renamed(tensors, self.ours)

    def without_copy(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Return tensors without the one that repeats another.

        Args:
            tensors: by our names.
            config: of the model.

        Returns:
            All of them if the original is missing, which the model then misses.

        Raises:
            LongscanError: the copy is none: its shape or its numbers differ.
        """
        rest, copy = dict(tensors), self.copy
        if copy is None or (copy.field is not None and not getattr(config, copy.field)):
            return rest
        repeated = copy.name in rest and copy.original in rest
        if repeated and not _same(rest.pop(copy.name), rest[copy.original]):
            raise LongscanError(copy.refusal.format(name=copy.name))
        return rest


def _as_is(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that has our shape already."""
    return tensor


@dataclass(frozen=True)
class BareFormat:
    """How one model stands in a file of tensors alone, without config.json.

    The names come without the prefixes of wrappers, such as `module.`.

    Attributes:
        name: of the model, in MODELS.
        matches: whether the tensors, by their names, are of this model.
        infer: the Config, of the tensors by our names and in our shapes.
        ours: our name of a tensor, of theirs; None: it says nothing and is left out.
        arrange: a tensor in our shape, of our name and the tensor.
        sized: whether the tensors say the size of the training images; learned positions do.
    """

    name: str
    matches: Callable[[Mapping[str, Tensor]], bool]
    infer: Callable[[Mapping[str, Tensor]], Config]
    ours: Callable[[str], str | None] = str
    arrange: Callable[[str, Tensor], Tensor] = _as_is
    sized: bool = True

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file under our names and in our shapes.

        Args:
            tensors: by their names.

        Raises:
            LongscanError: two of them are one under two names, and they differ.
        """
        renamed = _renamed(tensors, self.ours)
        return {name: self.arrange(name, tensor) for name, tensor in renamed.items()}


def _renamed(tensors: Mapping[str, Tensor], ours: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return tensors under our names."""
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in tensors.items():
        name = ours(theirs)
        if name is None:
            continue
        if not _same(renamed.setdefault(name, tensor), tensor):
            raise LongscanError(f"{theirs} is another name of {name}, and both hold different numbers.")
    return renamed


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers in the same shape and type."""
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


# fields about running, initialising or generating, which leave the logits alone
IDLE = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path architectures attn_implementation
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    fused_add_norm id2label initializer_range is_decoder label2id length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty rescale_prenorm_residual return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unpadded_vocab_size
    use_associative_scan use_bfloat16 use_cache use_mambapy
    """.split()
)


# fields that change any model that is known here: name -> the values with which they don't
FOREIGN: dict[str, tuple[Any, ...]] = {
    "layer_types": (None, []),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (None, 1.0),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": (None, {}),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
}
ELSEWHERE = (
    "that model is not computed here, and without the field it would be another one. Use transformers."
)


def check_fields(
    raw: Mapping[str, Any], known: Collection[str], only: Mapping[str, tuple[Any, ...]], idle: Collection[str]
) -> None:
    """Raise if a field makes this another model.

    Args:
        raw: the fields.
        known: those that are understood.
        only: those with which one model is meant: name -> the values that mean it.
        idle: those that leave the numbers alone.

    Raises:
        LongscanError: a field is none of these, or has another value.
    """
    for name in FOREIGN.keys() & raw.keys():  # the field is known, and it is off
        if name not in known and raw[name] not in FOREIGN[name]:
            raise LongscanError(f"unknown field {name!r} = {raw[name]!r}: {ELSEWHERE}")
    unknown = [name for name in raw if name not in {*known, *only, *idle, *FOREIGN}]
    if unknown:
        hint = nearest(unknown[0], [*known, *only])
        hint = hint if len(unknown) == 1 and "did you mean" in hint else "."
        raise LongscanError(
            f"unknown field {', '.join(map(repr, unknown))}{hint}\n"
            "It may change what the model computes, so it is not ignored; if it does not, remove it."
        )
    for name, values in only.items():
        if name in raw and raw[name] not in values:
            raise LongscanError(f"{name}: expected {values[0]!r}, got {raw[name]!r}: that is another model.")


def check_twins(raw: Mapping[str, Any], twins: Mapping[str, Any]) -> None:
    """Raise unless fields that say the same under another name agree.

    Args:
        raw: the fields.
        twins: name -> what the other fields say.

    Raises:
        LongscanError: one does not.
    """
    for name, value in twins.items():
        if raw.get(name, value) != value:
            raise LongscanError(f"{name}: expected {value}, as the other fields say, got {raw[name]!r}.")


def unpadded(
    raw: Mapping[str, Any], padded: int, multiple: int, tokenizer_size: int | None
) -> dict[str, int]:
    """Return how much of a padded vocabulary is real.

    Args:
        raw: the fields; what we wrote says it as unpadded_vocab_size.
        padded: rows of the embedding.
        multiple: to which it is said to be padded.
        tokenizer_size: ids of the tokenizer; without it, and without the field, all rows are real.

    Returns:
        vocab_size and pad_vocab_size_multiple.

    Raises:
        LongscanError: it is no possible number.
    """
    size = raw.get("unpadded_vocab_size", min(tokenizer_size or padded, padded))
    if type(size) is not int or not 1 <= size <= padded:
        raise LongscanError(f"unpadded_vocab_size: expected 1 to vocab_size = {padded}, got {size!r}.")
    multiples = (multiple, 1, padded)  # the last one always fits
    multiple = next(multiple for multiple in multiples if -(-size // multiple) * multiple == padded)
    return {"vocab_size": size, "pad_vocab_size_multiple": multiple}


def build(kind: type[ConfigT], fields: Mapping[str, Any], names: Mapping[str, str]) -> ConfigT:
    """Return our Config of their fields; an error has their names, which the user's file has.

    Args:
        kind: the Config.
        fields: by their names.
        names: theirs -> ours.

    Returns:
        The Config.

    Raises:
        LongscanError: a value is missing or impossible.
    """
    try:
        return kind.from_dict({names[name]: value for name, value in fields.items()})
    except LongscanError as error:
        theirs = {ours: name for name, ours in names.items()}
        ours = "|".join(theirs)
        text = re.sub(rf"(?:{kind.__name__}\.)?\b({ours})\b", lambda match: theirs[match[1]], str(error))
        raise LongscanError(text) from error
