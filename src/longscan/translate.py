"""`longscan translate`: train a translator on sentence pairs, measure it, translate with it.

The directory of a run (see run.py) holds `tokenizer/`, one BPE of both languages, and `data/`, the pairs as
ids, besides. The exported model is the mean of the last few checkpoints, as Vaswani et al. (2017) have it.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
import typer
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_weights
from torch import Tensor

from longscan.bleu import TOKENIZERS, score
from longscan.checkpoint import load_translator, save
from longscan.config import count
from longscan.errors import LongscanError, UsageError
from longscan.files import atomic_directory, atomic_write, read_json, write_json
from longscan.generate import use_threads, utf8
from longscan.models import Model, Translator
from longscan.order import HELD_OUT, RandomStream
from longscan.pairs import EOS, SPECIAL, Batch, Batches, IdPairs, TextPairs, read_pairs
from longscan.recipe import FreshConfig, add_flags, make_model, model_settings, setting
from longscan.run import Run
from longscan.run_command import Out, Recipe, Resume, finished, run_command
from longscan.runs import Signals
from longscan.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longscan.translation import describe, mean_loss, measure, translate
from longscan.wordvectors import read_vectors

__all__ = ["TranslateConfig", "TranslateRun", "commands"]

BLOCK = 512  # lines of stdin translated before the first appears
VALID_SHARE, VALID_MOST = 0.05, 1000  # of the pairs are held out if no files are


@dataclass(frozen=True, kw_only=True)
class TranslateConfig(FreshConfig):
    """Everything that decides what `longscan translate train` computes."""

    KINDS = ("translation",)
    EPOCHS: ClassVar[float] = 20.0

    source: str = setting(
        "", "Sentences, one a line; or, without --target, a table of two columns.", path=True
    )
    target: str | None = setting(None, "Their translations, line by line.", path=True)
    valid_source: str | None = setting(
        None, "Held-out sentences; without them a part of the pairs is held out.", path=True
    )
    valid_target: str | None = setting(None, "Their translations.", path=True)
    tokenizer: str = setting("bpe", "'bpe' trains one on both sides, else a translator's directory.")
    vocab_size: int = setting(8000, "Tokens of the BPE to train.")
    max_len: int = setting(100, "Tokens in a sentence; longer pairs are dropped.")
    embeddings: str | None = setting(
        None, "Word vectors (word2vec, GloVe) that the source embeddings start from.", path=True
    )
    target_embeddings: str | None = setting(None, "Likewise for the target embeddings.", path=True)

    model: str = setting("transformer", "Architecture, see `longscan models`.")
    preset: str = setting("multi30k", "Size of the model; the next flags change it.")
    n_heads: int | None = setting(None, "Heads (transformer).", size=True)
    d_ff: int | None = setting(None, "Width of the feed-forward layer (transformer).", size=True)
    norm_first: bool | None = setting(None, "Normalise before each sublayer (transformer).", size=True)
    d_embedding: int | None = setting(None, "Width of the embeddings (recurrent models).", size=True)
    d_hidden: int | None = setting(None, "Width of the state (recurrent models).", size=True)
    score: str | None = setting(None, "dot, general, concat or location (luong).", size=True)
    where: str | None = setting(None, "global, local-m or local-p (luong).", size=True)
    input_feeding: bool | None = setting(None, "Feed what was attended to back (luong).", size=True)
    d_align: int | None = setting(None, "Width of the alignment (bahdanau).", size=True)
    d_maxout: int | None = setting(None, "Width of the readout (bahdanau).", size=True)
    dropout: float | None = setting(None, "Share of the numbers dropped in training.", size=True)

    batch_tokens: int = setting(3000, "Tokens in a step, on the longer side, with padding.")
    label_smoothing: float = setting(0.1, "Label smoothing: the probability all wrong tokens share.")
    lr: float = setting(1e-3, "Peak learning rate.")
    warmup: int = setting(400, "Steps to reach the peak, at most a tenth of the run but for noam.")
    weight_decay: float = setting(0.0, "AdamW's decay of the matrices.")
    beta2: float = setting(0.98, "AdamW's memory of the gradient's square.")
    eps: float = setting(1e-9, "AdamW's smallest divisor.")
    average: int = setting(5, "Checkpoints whose mean is exported.", harmless=True)
    bleu_sentences: int = setting(200, "Held-out sentences to translate, greedily.", harmless=True)

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its name."""
        super().__post_init__()
        self.check_least(2, "max_len")
        self.check_least(1, "batch_tokens", "average")
        self.check_least(0, "bleu_sentences")
        self.check_fractions("label_smoothing", "dropout")
        if self.valid_target is not None and self.valid_source is None:
            raise UsageError("valid_source: expected one beside valid_target, got none.")


class TranslateRun(Run[TranslateConfig]):
    """Trains a translator: predict the next word of the target sentence, given the source."""

    verb = "translate train"
    settings = TranslateConfig
    valid_key, valid_unit = "valid_perplexity", "perplexity"
    score, scores = "BLEU of greedy translations", {"valid_bleu": "BLEU"}
    trained_on = ("data/train.safetensors",)
    tokenizer: Tokenizer

    def prepare(self) -> tuple[Model, int, int]:
        """Make tokenizer, pairs and model."""
        config = self.config
        if not config.source:
            raise UsageError("nothing to train on: expected --source FILE and --target FILE.")
        model_settings(config, config.vocab_size)  # a wrong flag is better known before the text is read
        place = self.directory / "data"
        if not place.is_dir():
            self._prepare_data(place)
        self.tokenizer = load_tokenizer(self.directory / "tokenizer")
        self.pairs, self.valid = (
            IdPairs(**load_file(place / f"{name}.safetensors")) for name in ("train", "valid")
        )
        self.text = TextPairs(**read_json(place / "valid.json"))
        self.batches = Batches(self.pairs, config.batch_tokens, config.seed)
        self.model = cast(Translator, make_model(config, self.tokenizer.vocab_size))
        if self.model.max_positions is not None and config.max_len > self.model.max_positions:
            raise UsageError(
                f"--max-len: expected at most the {self.model.max_positions:,} positions of {config.model}, "
                f"got {config.max_len:,}."
            )
        for side in ("source", "target"):
            if (file := place / f"{side}_embeddings.safetensors").is_file():
                known = load_weights(file)
                self.model.load_vectors(known["ids"], known["vectors"], cast(Any, side))
        return self.model, len(self.batches), 1

    def describe(self) -> tuple[str, str]:
        """Return what is trained on, and what a step takes of it."""
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
        """Write the mean of the last checkpoints."""
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
    def kept(self) -> int:
        """As many checkpoints as are averaged."""
        return max(2, self.config.average)

    @torch.inference_mode()
    def validate(self, signals: Signals, *, last: bool) -> dict[str, Any] | None:
        """Measure perplexity on all held-out pairs, BLEU on some, all of them at the end."""
        if signals.received:
            return None
        loss = mean_loss(self.model, self.valid, self.config.batch_tokens)
        found: dict[str, Any] = {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700.0))}
        n = len(self.text.source) if last and self.config.bleu_sentences else self.config.bleu_sentences
        if n:
            sources, references = self.text.source[:n], self.text.target[:n]
            hypotheses = [each.text for each in translate(self.model, self.tokenizer, sources, beam_size=1)]
            shown = self.trainer.step_number % len(sources)
            found["sample"] = {"source": sources[shown], "translation": hypotheses[shown]}
            self.say(f"{sources[shown]}\n  → {hypotheses[shown]}\n  = {references[shown]}")
            try:
                found["valid_bleu"] = score(hypotheses, references)["bleu"]
                held_out = count(len(sources), "held-out sentence")
                self.say(f"greedy BLEU {found['valid_bleu']:.2f} on {held_out}")
            except LongscanError as error:
                self.display.line(str(error))
        return found

    def _prepare_data(self, place: Path) -> None:
        """Read the text, find the tokenizer, write the ids."""
        config, tell = self.config, self.display.line
        text = read_pairs(config.source, config.target)
        tell(f"pairs      {text}")
        if config.valid_source is not None:
            valid = read_pairs(config.valid_source, config.valid_target)
        else:
            order = RandomStream(config.seed, HELD_OUT).permutation(len(text.source)).tolist()
            n_valid = min(VALID_MOST, int(VALID_SHARE * len(order)))
            if not n_valid:
                raise LongscanError(
                    f"{config.source}: too few pairs to hold some out ({len(order)}). Name others with "
                    "--valid-source and --valid-target."
                )
            text, valid = text.select(sorted(order[n_valid:])), text.select(sorted(order[:n_valid]))
        tokenizer = self._make_tokenizer(text)
        with atomic_directory(place) as temporary:
            for name, side in (("train", text), ("valid", valid)):
                ids, kept = IdPairs.encode(side, tokenizer, config.max_len)
                if not len(ids):
                    raise LongscanError(
                        f"no pair to {name} on is shorter than --max-len {config.max_len}: raise it."
                    )
                if long := len(side.source) - len(kept.source):
                    tell(f"{name}      {count(long, 'pair')} of more than {config.max_len} tokens dropped")
                save_file(ids.arrays(), temporary / f"{name}.safetensors")
                if name == "valid":
                    write_json(temporary / "valid.json", kept._asdict())
            for name, path in (("source", config.embeddings), ("target", config.target_embeddings)):
                if path is not None:
                    save_file(self._known(tokenizer, path), temporary / f"{name}_embeddings.safetensors")

    def _make_tokenizer(self, text: TextPairs) -> Tokenizer:
        """Return the tokenizer that the settings ask for, saved."""
        place, name = self.directory / "tokenizer", self.config.tokenizer
        if place.is_dir():
            return load_tokenizer(place)
        if name == "bpe":
            tokenizer: Tokenizer = train_bpe((*text.source, *text.target), self.config.vocab_size, SPECIAL)
        else:
            tokenizer = load_tokenizer(name)
            if tokenizer.eos_id != EOS:
                raise LongscanError(
                    f"{name} is no translator's tokenizer: expected {', '.join(SPECIAL)} as the first ids, "
                    f"but it ends texts with {tokenizer.eos_id}."
                )
        self.display.line(f"tokenizer  {name} of {tokenizer.vocab_size:,} tokens")
        with atomic_directory(place) as temporary:
            tokenizer.save(temporary)
        return tokenizer

    def _known(self, tokenizer: Tokenizer, path: str) -> dict[str, Any]:
        """Find the tokens that are words of a vector file; say how many are not."""
        words = {
            token: tokenizer.decode([token]).strip() for token in range(len(SPECIAL), tokenizer.vocab_size)
        }
        asked = {form for word in words.values() for form in (word, word.lower()) if form}
        vectors = read_vectors(path, asked)
        row = {word: index for index, word in enumerate(vectors.words)}
        found = {t: row.get(word, row.get(word.lower())) for t, word in words.items()}
        ids = [token for token, index in found.items() if index is not None]
        missing = [
            words[token].strip() for token, index in found.items() if index is None and words[token].isalpha()
        ]
        if not ids:
            raise LongscanError(f"{path}: none of its {vectors.total:,} words is a token of this vocabulary.")
        self.display.line(
            f"vectors    {count(len(ids), 'token')} start from {path} ({vectors.format}); out of its "
            f"{vectors.total:,} words are {len(words) - len(ids):,} tokens, such as {', '.join(missing[-3:])}"
        )
        rows = np.array([found[token] for token in ids])
        return {"ids": np.array(ids, np.int64), "vectors": vectors.vectors[rows]}


def train(
    out: Out = None,
    resume_from: Resume = None,
    recipe: Recipe = None,
    **settings: Any,
) -> None:
    """Train a translator on sentence pairs, or resume a run.

    --source and --target are files of one sentence a line, line n of one the translation of line n of the
    other; or --source alone is a table of two tab-separated columns. Also .gz or .xz. The directory --out
    receives the tokenizer, checkpoints, metrics.jsonl, loss.png and in the end model/, the mean of the last
    checkpoints, for `longscan translate evaluate` and `text`. Ctrl-C stops after the step in hand.

    Args:
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of TranslateConfig.

    Raises:
        UsageError: flags that contradict each other or have impossible values.
    """
    result = run_command(TranslateRun, out, resume_from, recipe, settings)
    measured = f"perplexity {result.valid:.2f} on held-out pairs"
    finished(result, measured, f'translate text {result.directory / "model"} "..."')


add_flags(train, TranslateConfig)


def evaluate(
    model: Annotated[str, typer.Argument(help="A translator's directory.")],
    source: Annotated[
        Path, typer.Argument(help="Sentences, one a line; or, without REFERENCE, a table of two columns.")
    ],
    reference: Annotated[Path | None, typer.Argument(help="Their translations by people.")] = None,
    beam: Annotated[int, typer.Option(help="Hypotheses to follow; 1 = greedy.")] = 5,
    length_penalty: Annotated[float, typer.Option(help="Exponent that favours long translations.")] = 0.6,
    tokenize: Annotated[str, typer.Option(help="How BLEU finds words: 13a, zh, char, ...")] = "13a",
    out: Annotated[Path | None, typer.Option(help="Write the translations into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")] = None,
) -> None:
    """BLEU, chrF and perplexity, also by length of source.

    Pairs with an empty side are left out. The numbers are sacrebleu's, with its signatures.
    `longscan plot bleu` draws the JSON of several translators.

    Raises:
        UsageError: a number makes no sense.
        LongscanError: a file can't be read, or a sentence is too long for the model.
    """
    if tokenize not in TOKENIZERS:
        raise UsageError(f"--tokenize: expected one of {', '.join(TOKENIZERS)}, got {tokenize!r}.")
    _check_search(beam, length_penalty)
    use_threads(threads)
    network, tokenizer = load_translator(model)
    pairs = read_pairs(source, reference)
    typer.echo(f"{pairs} · {describe(network)}", err=True)
    report = {
        "model": model,
        "parameters": network.num_parameters(),
        "beam": beam,
        "length_penalty": length_penalty,
        **measure(network, tokenizer, pairs, beam, length_penalty, tokenize),
    }
    hypotheses = report.pop("translations")
    if out is not None:
        atomic_write(out, "".join(f"{line}\n" for line in hypotheses))
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    typer.echo(f"BLEU {report['bleu']:.2f}   {report['bleu_signature']}")
    typer.echo(f"chrF {report['chrf']:.2f}   {report['chrf_signature']}")
    typer.echo(
        f"perplexity {report['perplexity']:.2f}   {report['sentences']:,} sentences in "
        f"{report['seconds']:.1f} s ({report['sentences_per_second']:.1f}/s)"
    )
    typer.echo("source words   sentences   BLEU")
    for row in report["by_length"]:
        typer.echo(f"{row['words']:>12} {row['sentences']:>11,} {row['bleu']:>6.2f}")


def text(
    model: Annotated[str, typer.Argument(help="A translator's directory.")],
    sentences: Annotated[
        list[str] | None, typer.Argument(help="What to translate; without, the lines of stdin.")
    ] = None,
    beam: Annotated[int, typer.Option(help="Hypotheses to follow; 1 = greedy.")] = 5,
    length_penalty: Annotated[float, typer.Option(help="Exponent that favours long translations.")] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a sentence.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")] = None,
) -> None:
    """Translate sentences, lines of stdin, or what is typed.

    Each translation is a line; an empty line gives an empty one.

    Raises:
        UsageError: a number makes no sense.
        LongscanError: the model can't be read, or a sentence is too long for it.
    """
    _check_search(beam, length_penalty)
    use_threads(threads)
    network, tokenizer = load_translator(model)

    def answer(lines: list[str]) -> None:
        found = translate(network, tokenizer, lines, beam_size=beam, length_penalty=length_penalty)
        for line, each in zip(lines, found, strict=True):
            shown = {"source": line, "translation": each.text, "score": each.score}
            typer.echo(json.dumps(shown, ensure_ascii=False) if as_json else each.text)

    if sentences:
        answer(sentences)
    elif _watched():
        typer.echo(f"{describe(network)} · a sentence a line, Ctrl-D ends", err=True)
        while line := _prompt():
            answer([line.rstrip("\n")])
    else:
        lines = utf8(sys.stdin.buffer.read(), "stdin").removeprefix("\ufeff").removesuffix("\n").split("\n")
        for start in range(0, len(lines), BLOCK):
            answer(lines[start : start + BLOCK])


commands = {"train": train, "evaluate": evaluate, "text": text}


def _watched() -> bool:
    """Tell whether somebody types."""
    return sys.stdin.isatty()


def _prompt() -> str:
    """Ask for a line; "" when there are no more."""
    typer.echo("> ", nl=False, err=True)
    return sys.stdin.readline()


def _check_search(beam: int, length_penalty: float) -> None:
    """Refuse impossible numbers."""
    if beam < 1:
        raise UsageError(f"--beam: expected 1 or more, got {beam}.")
    if not 0 <= length_penalty < 100:
        raise UsageError(f"--length-penalty: expected 0 or more, got {length_penalty}.")
