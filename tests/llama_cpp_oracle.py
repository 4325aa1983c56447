"""llama.cpp as an oracle of GGUF files; tests that ask it are skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer

TEXTS = ["Hello, it's 1234 o'clock\n\n\tnow.", "größer 漢字 🦙  two  spaces ", "<|endoftext|>"]
# largest |difference| of logits between llama.cpp and longscan, relative to the largest logit: llama.cpp
# rounds activations to the type of the weights
AGREEMENT = {"F32": 1e-5, "F16": 5e-3, "BF16": 2e-2, "Q8_0": 5e-2, "Q4_0": 5e-2}


def llama_cpp_reads(path: Path, ids: list[int], texts: list[str]) -> tuple[torch.Tensor, list[list[int]]]:
    """Run llama.cpp: the logits after each id, and the ids of each text."""
    api = pytest.importorskip("llama_cpp")
    import ctypes

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    assert model, "llama.cpp does not load the file"
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
    settings.type_k = settings.type_v = 0  # float32: by default the KV cache is float16,
    settings.flash_attn_type = 0  # and so is the attention
    context, vocab = api.llama_init_from_model(model, settings), api.llama_model_get_vocab(model)
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, index, 1
        batch.seq_id[index][0], batch.logits[index] = 0, 1
    assert api.llama_decode(context, batch) == 0
    size = api.llama_vocab_n_tokens(vocab)
    rows = [api.llama_get_logits_ith(context, index)[:size] for index in range(len(ids))]
    encoded = []
    for text in texts:
        buffer = (api.llama_token * 256)()
        data = text.encode()
        count = api.llama_tokenize(vocab, data, len(data), buffer, 256, False, False)
        encoded.append(list(buffer[:count]))
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    api.llama_log_set(api.llama_log_callback(0), ctypes.c_void_p(0))
    return torch.tensor(rows), encoded


def agree(model: LanguageModel, tokenizer: Tokenizer, path: Path, tolerance: float) -> None:
    ids = torch.randint(model.config.vocab_size, (20,), generator=torch.Generator().manual_seed(0))
    theirs, encoded = llama_cpp_reads(path, ids.tolist(), TEXTS)
    with torch.inference_mode():
        ours = model(ids[None]).logits[0]
    assert ((ours - theirs).abs().max() / ours.abs().max()).item() < tolerance
    assert encoded == tokenizer.encode_batch(TEXTS)
