"""mamba_ssm.utils.generation: decoding with states in InferenceParams."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DecodeOutput",
    "GenerationMixin",
    "InferenceParams",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "update_graph_cache",
]


@dataclasses.dataclass
class InferenceParams:
    """The states of all layers, and how many tokens they have seen.

    Attributes:
        max_seqlen: longest sequence.
        max_batch_size: largest batch.
        seqlen_offset: tokens so far.
        batch_size_offset: the first row of the batch.
        key_value_memory_dict: layer index -> its states.
        lengths_per_sample: (batch,) tokens so far of each row, for attention.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start a new sequence in the same memory."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class DecodeOutput(NamedTuple):
    """What `decode` returns.

    Attributes:
        sequences: (batch, seq_len) prompt and decoded ids.
        scores: (batch, vocab_size) logits of each decoded token, if requested.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] = ()


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set logits (..., vocab_size) below min_p to -inf, in place, if 0 < min_p < 1."""
    if 0 < min_p < 1:
        logits.masked_fill_(logits < min_p, -torch.inf)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set logits (..., vocab_size) below the top_k largest to -inf, in place."""
    logits.masked_fill_(logits < logits.topk(top_k).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set logits (batch, vocab_size) outside the smallest set with probability top_p to -inf, in place."""
    if 0 < top_p < 1:
        ascending, index = logits.sort()
        below = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        logits.masked_fill_(below.scatter(-1, index, below), -torch.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Return logits (batch, vocab_size), in place lowered for ids (batch, seq_len) that occurred.

    Positive logits are divided by the penalty, negative ones multiplied (CTRL, arXiv 1909.05858).
    """
    if repetition_penalty == 1.0:
        return logits
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def sample(
    logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Return ids (batch,) sampled from logits (batch, vocab_size).

    Args:
        logits: of the next token.
        top_k: how many of the most probable ids may be sampled; 1 is greedy decoding, 0 all.
        top_p: nucleus sampling, from the smallest set with this probability; not at 0 or 1.
        min_p: the smallest probability relative to the most probable id, if top_k is 0.
        temperature: by which logits are divided.

    Raises:
        ValueError: top_p is above 1.
    """
    if top_k == 1:
        return logits.argmax(-1)
    if top_p > 1:
        raise ValueError(f"top_p: expected 0 to 1, got {top_p}")
    index = None
    if top_k > 0:
        logits, index = logits.topk(min(top_k, logits.shape[-1]))
    logits = logits / temperature
    if min_p > 0 and top_k == 0:
        probabilities = logits.softmax(-1)
        largest = probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < min_p * largest, -torch.inf)
    else:
        modify_logits_for_top_p_filtering(logits, top_p)
    drawn = logits.softmax(-1).multinomial(1)
    return (drawn if index is None else index.gather(1, drawn)).squeeze(1)


@torch.no_grad()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> DecodeOutput:
    """Return a prompt continued to max_length tokens, or to where every row ends.

    Args:
        input_ids: (batch, seq_len) prompts of equal length.
        model: a `MambaLMHeadModel`.
        max_length: of prompt and continuation.
        top_k: see `sample`; likewise the next three.
        top_p: likewise.
        min_p: likewise.
        temperature: likewise.
        repetition_penalty: see `modify_logit_for_repetition_penalty`.
        eos_token_id: decoding stops where all rows have this id.
        teacher_outputs: (batch, seq_len) ids that are taken instead of sampled ones.
        vocab_size: ids without padding.
        cg: CUDA graphs, which the CPU does not have: without effect.
        enable_timing: of CUDA events: without effect.
        output_scores: whether to return the logits.
        streamer: has put(ids) and end(), as those of transformers.
    """
    params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    n_taught = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    scores: list[Tensor] = []
    sequences, ids = input_ids, input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while True:
        logits = model(ids, inference_params=params, num_last_tokens=1).logits.squeeze(1)[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += ids.shape[1]
        if params.seqlen_offset < n_taught:
            assert teacher_outputs is not None
            ids = teacher_outputs[:, params.seqlen_offset, None]
        else:
            logits = modify_logit_for_repetition_penalty(logits, sequences, repetition_penalty)
            ids = sample(logits, top_k, top_p, min_p, temperature).unsqueeze(1)
        sequences = torch.cat([sequences, ids], 1)
        if streamer is not None:
            streamer.put(ids.cpu())
        ended = eos_token_id is not None and bool((ids == eos_token_id).all())
        if ended or params.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    return DecodeOutput(sequences, tuple(scores))


class GenerationMixin:
    """Gives a model `generate`."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Return the states of zeros; models define it."""
        raise NotImplementedError(f"{type(self).__name__}.allocate_inference_cache is not defined")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> DecodeOutput | Tensor:
        """Return the continued ids (batch, seq_len), or with return_dict_in_generate all of `decode`.

        Args:
            input_ids: see `decode`; likewise the others, and the keywords.
            max_length: likewise.
            top_k: likewise.
            top_p: likewise.
            min_p: likewise.
            temperature: likewise.
            return_dict_in_generate: see above.
            output_scores: likewise.
            **kwargs: likewise.
        """
        output = decode(
            *(input_ids, self, max_length, top_k, top_p, min_p, temperature),
            output_scores=output_scores,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences


def update_graph_cache(*args: Any, **kwargs: Any) -> Any:
    """Raise: CUDA graphs are not covered."""
    raise NotImplementedError("update_graph_cache: longscan.compat has no CUDA graphs; decode with cg=False")
