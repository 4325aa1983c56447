"""What the dialects of config.json have in common: fields that are looked up, refused, or left alone.

A field that is in no table is an error, because nobody knows what it would have changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from longscan.core.config import Config, nearest
from longscan.errors import LongscanError

__all__ = ["ELSEWHERE", "IDLE", "QUANTIZATION", "Dialect", "build", "check_fields", "check_twins", "unpadded"]

QUANTIZATION = "quantization_config"

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Dialect:
    """How one model stands in files that other programs read too.

    Attributes:
        read: from the content of config.json, and the ids of the tokenizer beside it, to the Config.
        write: from the Config to that content; the type of the weights and the special tokens come from
            elsewhere.
        publish: from our name of a tensor to theirs; the way back is the model's `rename`.
    """

    read: Callable[[Mapping[str, Any], int | None], Config]
    write: Callable[[Any], dict[str, Any]]
    publish: Callable[[str], str]


# fields that say how to run, to start afresh or to finish a text, and leave the logits alone
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


# fields that make another model of any that is known here: name -> the values with which they don't
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
    """Refuse what would make another model.

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
    """Insist that fields which say the same thing under another name agree.

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
    """Find out how much of a padded vocabulary is real.

    Args:
        raw: the fields; what we wrote says it as unpadded_vocab_size.
        padded: rows of the embedding.
        multiple: to which it is said to be padded.
        tokenizer_size: ids of the tokenizer; if nobody says anything, all rows are real.

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
    """Make our Config of their fields; what is wrong is told with their names, which the user's file has.

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
