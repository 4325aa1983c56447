"""Fine-tuning: a published checkpoint learns conversations, completions or texts, by LoRA or as a whole.

    data/       the examples as tokens, and what was counted
    adapter/    what was learnt (LoRA), in PEFT's files
    model/      the model (--method full)

The run stores the fingerprint of the base, not its weights: it resumes with that model alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.adapter import save_adapter
from longscan.checkpoints.load import load_with_tokenizer
from longscan.checkpoints.save import save
from longscan.core.config import count, nearest
from longscan.core.files import read_json, write_json
from longscan.core.random import EpochOrder
from longscan.core.runtime import StopSignals, available_memory
from longscan.data.examples import Batch, Example, collate, pack
from longscan.errors import LongscanError, UsageError
from longscan.inference.generate import generate_ids
from longscan.inference.sampling import SamplingConfig
from longscan.models import LanguageModel, Model
from longscan.models.common.lora import LoraLayer, adaptable, adapted, attach
from longscan.models.common.losses import IGNORE, next_tokens
from longscan.models.common.quantization import dequantized, kind_of, precision, quantize_model
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import find_template
from longscan.tokenizers.chat_templates import DEFAULT
from longscan.training.build import check_device
from longscan.training.finetune_config import FinetuneConfig
from longscan.training.finetune_data import prepare, read
from longscan.training.footprint import Footprint, check_memory, footprint, memory_size
from longscan.training.run import Run

__all__ = ["FinetuneRun"]

BASE = "base.json"


class FinetuneRun(Run[FinetuneConfig]):
    """Fine-tunes a language model."""

    verb = "finetune"
    settings = FinetuneConfig
    unit, item = "nats per learnt token", "learnt tok"
    score, scores = "exact answers", {"valid_exact": "exact"}
    trained_on = (BASE, "data/meta.json", "data/train.safetensors", "data/valid.safetensors")
    tokenizer: Tokenizer
    needs: Footprint

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, with adapters unless all of it is trained."""
        config = self.config
        if not config.model or not config.data:
            raise UsageError("expected a MODEL and its DATA, files or directories of examples.")
        check_device(config.device)
        self.model, self.tokenizer = load_with_tokenizer(config.model, None, False, None, config.tokenizer)
        self.base = self._same_base()
        folder = self.directory / "data"
        if not folder.is_dir():
            prepare(config, folder, self.tokenizer, self.display.prepare)
        self.data = read(folder)
        self.rows, self.valid_rows = (_packed(part, config.seq_len) for part in self.data[:2])
        self.orders = EpochOrder(config.seed, lambda stream: stream.permutation(len(self.rows)).tolist())
        self._adapt()
        self.model.to(config.device).train()
        self.model.backbone.checkpointing = config.checkpointing
        width = max(sum(len(one.ids) for one in row) for row in self.rows)
        self.needs = footprint(self.model, self._probe, config.batch_size * width)
        if not config.force:
            check_memory(self.needs, available_memory())
        return self.model, len(self.rows), config.rows_per_step

    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step."""
        meta, examples = self.data.meta, self.data.train
        what = "conversation" if meta["conversations"] == meta["rows"] else "example"
        tokens, learnt = sum(len(one.ids) for one in examples), sum(one.learnt for one in examples)
        parts = [f"{count(len(examples), what)} of {count(tokens, 'token')}, {learnt:,} of them learnt"]
        for name, remark in (("cut", "cut"), ("skipped", "left out"), ("invalid", "not valid, left out")):
            parts += [f"{meta[name]:,} {remark}"] if meta[name] else []
        valid = len(self.data.valid)
        parts.append(f"{valid:,} held out" if valid else "none held out: no validation")
        return ", ".join(parts), count(self.config.rows_per_step, "row")

    def introduce(self) -> None:
        """Show what is trained, on what, and what that takes."""
        super().introduce()
        config, meta = self.config, self.data.meta
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        how = f"all {trained:,} weights"
        if config.method == "lora":
            how = f"LoRA of rank {config.rank}, {trained:,} weights beside a base in {precision(self.model)}"
        self.display.line(f"trains     {how}")
        if meta["conversations"]:
            self.display.line(f"template   {meta['template']}")
        for note in meta["notes"]:
            self.display.line(f"note       {note}")
        for fault in meta["first_faults"]:
            self.display.line(f"left out   {fault}")
        free = available_memory()
        known = "" if free is None else f", {memory_size(free)} are available"
        self.display.line(f"memory     about {self.needs}{known}")

    def batch(self, step: int) -> list[tuple[Batch, int]]:
        """Return the rows of a step in parts, with the number of tokens that each learns."""
        config, n = self.config, len(self.rows)
        numbers = range(step * config.rows_per_step, (step + 1) * config.rows_per_step)
        chosen = [self.rows[self.orders[number // n][number % n]] for number in numbers]
        return [(collate(part), _learnt(part)) for part in _parts(chosen, config.batch_size)]

    def loss(self, model: LanguageModel, part: Batch) -> Tensor:
        """Return the mean loss of the learnt tokens."""
        ids, seq_idx, labels = (tensor.to(self.config.device) for tensor in part)
        loss: Tensor = model(ids, seq_idx=seq_idx, labels=labels, return_logits=False).loss
        return loss

    @property
    def n_parameters(self) -> int:
        """The size of the model without adapters."""
        adapters = [layer.lora_A.numel() + layer.lora_B.numel() for _, layer in adapted(self.model)]
        return super().n_parameters - sum(adapters)

    @property
    def validates(self) -> bool:
        """Whether examples are held out."""
        return bool(self.valid_rows)

    @torch.inference_mode()
    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Measure the loss of the learnt tokens in held-out examples, and how many would be written exactly.

        If each learnt token is the most likely one behind those before it, greedy decoding writes just these.
        """
        total, n, exact = 0.0, 0, 0
        for part in _parts(self.valid_rows, self.config.batch_size):
            if signals.received:
                return None
            ids, seq_idx, labels = (tensor.to(self.config.device) for tensor in collate(part))
            hidden, _ = self.model.backbone(ids, None, seq_idx)
            targets = next_tokens(labels, seq_idx)
            learnt = targets != IGNORE  # (rows, seq_len)
            losses, hits = self.model.token_scores(hidden[learnt], targets[learnt])
            total, n = total + float(losses.double().sum()), n + len(losses)
            width = int(seq_idx.max()) + 1
            examples = (torch.arange(len(ids), device=ids.device)[:, None] * width + seq_idx)[learnt]
            missed = torch.bincount(examples, (~hits).float())
            exact += int(((torch.bincount(examples) > 0) & (missed == 0)).sum())
        found = {"valid_loss": total / n}
        if self.data.meta["texts"] < self.data.meta["rows"]:  # running text has no answers
            found["valid_exact"] = exact / len(self.data.valid)
        return found

    def remark(self, metrics: Mapping[str, Any]) -> str:
        """Return how many of the held-out answers are exact."""
        return f", {metrics['valid_exact']:.1%} of the answers exact" if "valid_exact" in metrics else ""

    def due(self, key: str, every: int, *, always: bool = False) -> bool:
        """Whether a metric is due, see `Run.due`; before the first step it is."""
        return super().due(key, every, always=always or self.trainer.step_number == 0)

    def report(self, signals: StopSignals) -> None:
        """Validate; before and after, answer prompts too."""
        super().report(signals)
        step = self.trainer.step_number
        if not signals.received and self.due("samples", 0, always=self.trainer.done):
            texts = list(self._samples())
            self.metrics.write({"step": step, "samples": texts})
            when = "after" if step else "before"
            for prompt, answer in texts:
                self.display.line(f"{when:<10} {_short(prompt)} → {_short(answer)}")

    def export(self, directory: Path) -> None:
        """Save the adapters, or the model if all of it was trained, with the chat template it has learnt."""
        config, template = self.config, self._template()
        if config.method == "full":
            if template:
                self.tokenizer.chat_templates = {**self.tokenizer.chat_templates, DEFAULT: template}
            save(self.trainer.model, directory, self.tokenizer)
            return
        save_adapter(
            self.model,
            directory.with_name("adapter"),
            base=config.model,
            fingerprint=self.base,
            dropout=config.lora_dropout,
            template=template,
        )

    def _template(self) -> str | None:
        """Return the chat template that the model has learnt, if another one was named; not the plain one."""
        if self.config.template is None or not self.data.meta["conversations"]:
            return None
        chat = find_template(self.tokenizer, self.config.template)
        if chat.name == "plain" and not chat.own:
            return None  # what ends its answers is more than a template says
        begin = "{{ bos_token }}" if self.tokenizer.prefix and not chat.own else ""
        return begin + chat.source

    def _same_base(self) -> str:
        """Return the fingerprint of the base, which must be that of the run."""
        path, fingerprint = self.directory / BASE, self.model.fingerprint()
        if not path.is_file():
            write_json(path, {"model": self.config.model, "fingerprint": fingerprint})
        if (stated := read_json(path).get("fingerprint")) != fingerprint:
            raise LongscanError(
                f"{self.config.model} has other weights than when the run began ({fingerprint}, then "
                f"{stated}). Put the first ones back, or start a new run."
            )
        return fingerprint

    def _adapt(self) -> None:
        """Make the trained part: adapters on the matrices that are named, or everything."""
        config = self.config
        if config.method == "full":
            self.model = dequantized(self.model)
            self.model.requires_grad_(True)
            return
        model = self.model
        if config.base_precision != "float32" and config.base_precision != kind_of(model):
            quantize_model(model, config.base_precision)
        names = adaptable(model)
        chosen = list(names)
        if config.target:
            chosen = [name for name in names if any(_ends(name, target) for target in config.target)]
        for target in config.target:
            if not any(_ends(name, target) for name in names):
                known = {name.rpartition(".")[2] for name in names}
                raise UsageError(f"--target: no matrix called {target!r}{nearest(target, known)}")
        if not chosen:
            raise LongscanError(f"{config.model} has no matrices for adapters: choose --method full.")
        layer = LoraLayer(config.rank, config.scale)
        generator = torch.Generator().manual_seed(config.seed)
        attach(model, dict.fromkeys(chosen, layer), config.lora_dropout, generator)

    def _probe(self, tokens: int) -> Tensor:
        """Return the loss of a row of so many tokens."""
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        return self.loss(self.model, Batch(ids, torch.zeros_like(ids), ids))

    def _samples(self) -> Iterator[tuple[str, str]]:
        """Yield held-out prompts and what the model answers, the most likely tokens."""
        examples = (self.data.valid or self.data.train)[: self.config.samples]
        ends, stops = self.data.meta["ends"]
        tokens = self.config.sample_tokens
        settings = SamplingConfig(max_new_tokens=tokens, temperature=0.0, stop=tuple(stops))
        for ids, trained in examples:
            first = int(trained.argmax()) or 1
            prompt = ids[:first].tolist()
            events = generate_ids(self.model, [prompt], settings, eos_id=ends, tokenizer=self.tokenizer)
            yield self.tokenizer.decode(prompt), "".join(event.text for event in events)


def _packed(examples: list[Example], seq_len: int) -> list[list[Example]]:
    """Return rows of examples."""
    return [[examples[i] for i in row] for row in pack([len(one.ids) for one in examples], seq_len)]


def _parts(rows: Sequence[list[Example]], batch_size: int) -> list[Sequence[list[Example]]]:
    """Return rows in batches."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _learnt(rows: Sequence[list[Example]]) -> int:
    """Return how many tokens rows teach."""
    return sum(example.learnt for row in rows for example in row)


def _ends(name: str, target: str) -> bool:
    """Whether a matrix is meant: by its name, or the end of it."""
    return name == target or name.endswith(f".{target}")


def _short(text: str) -> str:
    """Return the end of a text in a line."""
    line = " ".join(text.split())
    return line if len(line) <= 70 else f"…{line[-69:]}"
