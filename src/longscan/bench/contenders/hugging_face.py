"""transformers as a contender of prefill and decode. Runs in the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.bench.contenders import workloads
from longscan.bench.worker import Run

__all__ = [
    "decode_llama",
    "decode_transformers",
    "export",
    "prefill_llama",
    "prefill_transformers",
    "random_transformers",
]


def export(model: dict[str, Any], directory: Path) -> Path:
    """Return a directory with the contenders' random model, as transformers reads it.

    Args:
        model: see `contenders.longscan.fresh`.
        directory: to write.
    """
    from longscan.bench.contenders.longscan import ready
    from longscan.checkpoints.save import save

    save(ready(model), directory)
    return directory


def prefill_transformers(directory: str, vocab_size: int, seq_len: int, precision: str = "float32") -> Run:
    """Prepare the prefill of a prompt by the model in a directory."""
    return _prefill(_loaded(directory, precision), vocab_size, seq_len)


def prefill_llama(model: dict[str, Any], seq_len: int) -> Run:
    """Prepare the prefill of a prompt by a Llama with random weights."""
    return _prefill(random_transformers(model).eval(), model["vocab_size"], seq_len)


def _prefill(peer: Any, vocab_size: int, seq_len: int) -> Run:
    """Prepare the prefill of a prompt; only the last logits are requested."""
    ids = workloads.random_ids(1, seq_len, vocab_size)

    def run() -> None:
        with torch.no_grad():
            peer(ids, use_cache=True, logits_to_keep=1)

    return run


def decode_transformers(
    directory: str, vocab_size: int, prompt: int, n_tokens: int, precision: str = "float32"
) -> Run:
    """Prepare greedy decoding after a prompt by the model in a directory."""
    return _decode(_loaded(directory, precision), vocab_size, prompt, n_tokens)


def decode_llama(model: dict[str, Any], prompt: int, n_tokens: int) -> Run:
    """Prepare greedy decoding after a prompt by a Llama with random weights."""
    return _decode(random_transformers(model).eval(), model["vocab_size"], prompt, n_tokens)


def _decode(peer: Any, vocab_size: int, prompt: int, n_tokens: int) -> Run:
    """Prepare greedy decoding after a prompt; the cache grows from run to run."""
    with torch.no_grad():
        output = peer(workloads.random_ids(1, prompt, vocab_size), use_cache=True, logits_to_keep=1)
    cache = next(name for name in ("cache_params", "past_key_values") if output.get(name) is not None)
    past = {cache: output[cache], "use_cache": True}
    logits = output.logits[:, -1]

    def advance(ids: Tensor) -> Tensor:
        logits: Tensor = peer(ids[:, None], **past).logits[:, -1]
        return logits

    steps = workloads.decoding(logits.argmax(-1), n_tokens, advance)
    weights = sum(parameter.nbytes for parameter in peer.parameters())
    details = {"weight_bytes": weights, "excerpt": workloads.excerpt(logits[0])}
    return lambda: (steps() or {}) | details


def _loaded(directory: str, precision: str) -> Any:
    """Return the model in a directory as transformers reads it."""
    from transformers import AutoModelForCausalLM

    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    peer: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return peer.eval()


def random_transformers(model: dict[str, Any], use_mambapy: bool = False) -> Any:
    """Return transformers' Mamba, or Llama, in float32; model is as in `contenders.longscan.fresh`."""
    from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

    sizes = {
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["n_layers"],
        "vocab_size": model["vocab_size"],
        "tie_word_embeddings": True,
    }
    if model.get("model") != "llama":
        return MambaForCausalLM(MambaConfig(**sizes, use_mambapy=use_mambapy))
    from longscan.models import LlamaConfig as Ours

    ours = Ours.from_dict({name: value for name, value in model.items() if name != "model"})
    heads, d_ff = ours.n_heads, ours.ff_width
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, intermediate_size=d_ff))
