"""The translation task: sentence pairs in batches of about equal length, label smoothing, validation BLEU."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_weights
from torch import Tensor

from longscan.checkpoints.save import save
from longscan.core.config import count
from longscan.core.files import atomic_directory, read_json, write_json
from longscan.core.random import HELD_OUT, RandomStream
from longscan.core.runtime import StopSignals
from longscan.data.sentence_pairs import EOS, SPECIAL, Batch, Batches, IdPairs, TextPairs, read_pairs
from longscan.data.word_vectors import read_vectors
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.bleu import score
from longscan.evaluation.translation import mean_loss
from longscan.inference.translate import translate
from longscan.models import Model, Translator
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.bpe import load_tokenizer, train_bpe
from longscan.training.build import make_model, model_settings
from longscan.training.config import FreshConfig, setting
from longscan.training.run import Run

__all__ = ["BLOCK", "TranslateConfig", "TranslateRun"]


BLOCK = 512  # lines of stdin that are translated together

VALID_FRACTION, MAX_VALID = 0.05, 1000  # of the pairs are held out if there are no validation files


@dataclass(frozen=True, kw_only=True)
class TranslateConfig(FreshConfig):
    """The settings of `longscan translate train`."""

    KINDS = ("translation",)
    EPOCHS: ClassVar[float] = 20.0

    source: str = setting(
        "", "Source sentences, one per line; without --target, a table of two columns.", path=True
    )
    target: str | None = setting(None, "Target sentences, line by line.", path=True)
    valid_source: str | None = setting(
        None, "Validation sentences; default: hold out a part of the pairs.", path=True
    )
    valid_target: str | None = setting(None, "Reference translations of --valid-source.", path=True)
    tokenizer: str = setting("bpe", "'bpe' trains one on both sides; or a translator's directory.")
    vocab_size: int = setting(8000, "Vocabulary size of the BPE to train.")
    max_len: int = setting(100, "Tokens per sentence, at most; longer pairs are dropped.")
    embeddings: str | None = setting(
        None, "Word vectors (word2vec, GloVe) that initialise the source embeddings.", path=True
    )
    target_embeddings: str | None = setting(
        None, "Word vectors that initialise the target embeddings.", path=True
    )

    model: str = setting("transformer", "Architecture, see `longscan models`.")
    preset: str = setting("multi30k", "Model size; the next flags override it.")
    n_heads: int | None = setting(None, "Attention heads (transformer).", size=True)
    d_ff: int | None = setting(None, "Hidden width of the feed-forward layers (transformer).", size=True)
    norm_first: bool | None = setting(
        None, "Pre-norm: normalise before each sublayer (transformer).", size=True
    )
    d_embedding: int | None = setting(None, "Width of the embeddings (recurrent models).", size=True)
    d_hidden: int | None = setting(None, "Width of the hidden state (recurrent models).", size=True)
    score: str | None = setting(None, "Attention score: dot, general, concat or location (luong).", size=True)
    where: str | None = setting(None, "Attention span: global, local-m or local-p (luong).", size=True)
    input_feeding: bool | None = setting(None, "Feed the attentional state back in (luong).", size=True)
    d_align: int | None = setting(None, "Width of the alignment model (bahdanau).", size=True)
    d_maxout: int | None = setting(None, "Width of the maxout layer (bahdanau).", size=True)
    dropout: float | None = setting(None, "Dropout probability.", size=True)

    batch_tokens: int = setting(3000, "Tokens per step, padding included, on the longer side.")
    label_smoothing: float = setting(0.1, "Label smoothing.")
    lr: float = setting(1e-3, "Peak learning rate.")
    ssm_lr: float = setting(1e-3, "Of no translator: none has A, B and dt.", argument=True)
    warmup: int = setting(400, "Warm-up steps, at most a tenth of the run except for noam.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW, on matrices only.")
    beta2: float = setting(0.98, "AdamW beta2.")
    eps: float = setting(1e-9, "AdamW epsilon.")
    average: int = setting(5, "Checkpoints to average for the exported model.", harmless=True)
    bleu_sentences: int = setting(200, "Validation sentences to translate greedily for BLEU.", harmless=True)

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("max_len", least=2)
        self.check("batch_tokens", "average", least=1)
        self.check("bleu_sentences", least=0)
        self.check("label_smoothing", "dropout", least=0, below=1)
        if self.valid_target is not None and self.valid_source is None:
            raise UsageError("valid_source: expected a file to go with valid_target, got none.")


class TranslateRun(Run[TranslateConfig]):
    """Trains a translator: predict the next token of the target sentence, given the source."""

    verb = "translate train"
    settings = TranslateConfig
    valid_key, valid_unit = "valid_perplexity", "perplexity"
    score, scores = "BLEU of greedy translations", {"valid_bleu": "BLEU"}
    trained_on = ("data/train.safetensors",)
    tokenizer: Tokenizer

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after making the tokenizer and the pairs."""
        config = self.config
        if not config.source:
            raise UsageError("nothing to train on: expected --source FILE and --target FILE.")
        model_settings(config, vocab_size=config.vocab_size)  # check the flags before the text is read
        data = self.directory / "data"
        if not data.is_dir():
            self._prepare_data(data)
        self.tokenizer = load_tokenizer(self.directory / "tokenizer")
        self.pairs, self.valid = (
            IdPairs(**load_file(data / f"{name}.safetensors")) for name in ("train", "valid")
        )
        self.text = TextPairs(**read_json(data / "valid.json"))
        self.batches = Batches(self.pairs, config.batch_tokens, config.seed)
        self.model = cast(Translator, make_model(config, self.tokenizer.vocab_size))
        if self.model.max_positions is not None and config.max_len > self.model.max_positions:
            raise UsageError(
                f"--max-len: expected at most the {self.model.max_positions:,} positions of {config.model}, "
                f"got {config.max_len:,}."
            )
        for side in ("source", "target"):
            if (file := data / f"{side}_embeddings.safetensors").is_file():
                known = load_weights(file)
                self.model.load_vectors(known["ids"], known["vectors"], cast(Any, side))
        return self.model, len(self.batches), 1

    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step."""
        tokens = int(self.pairs.target_lengths.sum())
        held_out = f"{count(len(self.valid), 'pair')} held out"
        data = f"{count(len(self.pairs), 'pair')}, {count(tokens, 'target token')}, {held_out}"
        return data, count(round(tokens / len(self.batches)), "target token")

    def batch(self, step: int) -> list[tuple[Batch, int]]:
        """Return the sentences of a step, in one part."""
        batch = self.batches.batch(step)
        return [(batch, batch.tokens)]

    def loss(self, model: Translator, part: Batch) -> Tensor:
        """Return the mean loss of the next target token."""
        source, target = part.source.to(self.config.device), part.target.to(self.config.device)
        return model.loss(source, target, self.config.label_smoothing)

    def export(self, directory: Path) -> None:
        """Save the average of the last checkpoints."""
        paths = self.checkpoints.directories()[: self.config.average]
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
            for path in paths:
                for name, weight in load_weights(path / "model.safetensors").items():
                    sums[name] += weight.to(sums[name].device)
            for name, parameter in model.named_parameters():
                parameter.copy_(sums[name] / len(paths))
        save(model, directory, self.tokenizer)

    @property
    def n_checkpoints(self) -> int:
        """As many checkpoints as are averaged."""
        return max(2, self.config.average)

    @torch.inference_mode()
    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return the perplexity on all held-out pairs, and BLEU on some of them, at the end on all."""
        if signals.received:
            return None
        loss = mean_loss(self.model, self.valid, self.config.batch_tokens)
        metrics: dict[str, Any] = {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700.0))}
        n = len(self.text.source) if last and self.config.bleu_sentences else self.config.bleu_sentences
        if n:
            sources, references = self.text.source[:n], self.text.target[:n]
            hypotheses = [each.text for each in translate(self.model, self.tokenizer, sources, beam_size=1)]
            shown = self.trainer.step_number % len(sources)
            metrics["sample"] = {"source": sources[shown], "translation": hypotheses[shown]}
            self.say(f"{sources[shown]}\n  → {hypotheses[shown]}\n  = {references[shown]}")
            try:
                metrics["valid_bleu"] = score(hypotheses, references)["bleu"]
                held_out = count(len(sources), "held-out sentence")
                self.say(f"greedy BLEU {metrics['valid_bleu']:.2f} on {held_out}")
            except LongscanError as error:
                self.display.line(str(error))
        return metrics

    def _prepare_data(self, directory: Path) -> None:
        """Read and split the text, make the tokenizer, save the ids."""
        config, notify = self.config, self.display.line
        text = read_pairs(config.source, config.target)
        notify(f"pairs      {text}")
        if config.valid_source is not None:
            valid = read_pairs(config.valid_source, config.valid_target)
        else:
            order = RandomStream(config.seed, HELD_OUT).permutation(len(text.source)).tolist()
            n_valid = min(MAX_VALID, int(VALID_FRACTION * len(order)))
            if not n_valid:
                raise LongscanError(
                    f"{config.source}: too few pairs to hold some out ({len(order)}). Name validation files "
                    "with --valid-source and --valid-target."
                )
            text, valid = text.select(sorted(order[n_valid:])), text.select(sorted(order[:n_valid]))
        tokenizer = self._make_tokenizer(text)
        with atomic_directory(directory) as temporary:
            for name, side in (("train", text), ("valid", valid)):
                ids, rest = IdPairs.encode(side, tokenizer, config.max_len)
                if not len(ids):
                    raise LongscanError(
                        f"no pair to {name} on is shorter than --max-len {config.max_len}: raise it."
                    )
                if long := len(side.source) - len(rest.source):
                    notify(f"{name}      {count(long, 'pair')} of more than {config.max_len} tokens dropped")
                save_file(ids.arrays(), temporary / f"{name}.safetensors")
                if name == "valid":
                    write_json(temporary / "valid.json", rest._asdict())
            for name, path in (("source", config.embeddings), ("target", config.target_embeddings)):
                if path is not None:
                    save_file(self._known(tokenizer, path), temporary / f"{name}_embeddings.safetensors")

    def _make_tokenizer(self, text: TextPairs) -> Tokenizer:
        """Return the run's tokenizer, made from its settings if it is not saved yet."""
        directory, name = self.directory / "tokenizer", self.config.tokenizer
        if directory.is_dir():
            return load_tokenizer(directory)
        if name == "bpe":
            tokenizer: Tokenizer = train_bpe((*text.source, *text.target), self.config.vocab_size, SPECIAL)
        else:
            tokenizer = load_tokenizer(name)
            if tokenizer.eos_id != EOS:
                raise LongscanError(
                    f"{name} is no translator's tokenizer: expected {', '.join(SPECIAL)} as the first ids, "
                    f"but it ends texts with {tokenizer.eos_id}."
                )
        self.display.line(f"tokenizer  {'BPE' if name == 'bpe' else name} of {tokenizer.vocab_size:,} tokens")
        with atomic_directory(directory) as temporary:
            tokenizer.save(temporary)
        return tokenizer

    def _known(self, tokenizer: Tokenizer, path: str) -> dict[str, Any]:
        """Return the ids and vectors of the tokens that are words of a vector file."""
        words = {
            token: tokenizer.decode([token]).strip() for token in range(len(SPECIAL), tokenizer.vocab_size)
        }
        forms = {form for word in words.values() for form in (word, word.lower()) if form}
        vectors = read_vectors(path, forms)
        row = {word: index for index, word in enumerate(vectors.words)}
        indices = {t: row.get(word, row.get(word.lower())) for t, word in words.items()}
        ids = [token for token, index in indices.items() if index is not None]
        missing = [
            words[token].strip()
            for token, index in indices.items()
            if index is None and words[token].isalpha()
        ]
        if not ids:
            raise LongscanError(f"{path}: none of its {vectors.total:,} words is a token of this vocabulary.")
        self.display.line(
            f"vectors    {count(len(ids), 'token')} initialised from {path} ({vectors.format}, "
            f"{vectors.total:,} words); {len(words) - len(ids):,} tokens are not in it, such as "
            f"{', '.join(missing[-3:])}"
        )
        rows = np.array([indices[token] for token in ids])
        return {"ids": np.array(ids, np.int64), "vectors": vectors.vectors[rows]}
