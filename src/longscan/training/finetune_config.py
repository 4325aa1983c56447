"""The settings of `longscan finetune`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from longscan.errors import UsageError
from longscan.training.config import RunConfig, setting

__all__ = ["FinetuneConfig"]

FULL_LR = 2e-5  # all weights want a tenth of the rate of adapters


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """The settings of `longscan finetune`."""

    EPOCHS: ClassVar[float] = 3.0

    model: str = setting("", "Checkpoint to start from.", argument=True)
    data: tuple[str, ...] = setting((), "Files or directories of examples.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Validation file; default: DATA's valid.jsonl, or hold out a part. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.05, "Fraction of DATA held out for validation.")
    template: str | None = setting(None, "Chat template: its name, or a file; default: the tokenizer's.")
    tokenizer: str | None = setting(
        None, "A tokenizer.json, a directory or a hub id, if MODEL has no tokenizer."
    )
    train_on: Literal["answers", "all"] = setting(
        "answers", "What is learnt: the assistant's answers and completions, or every token."
    )
    too_long: Literal["cut", "skip", "error"] = setting(
        "cut", "Examples longer than --seq-len: cut at their end, leave out, or refuse."
    )
    skip_invalid: bool = setting(False, "Leave out rows that can't be trained on.")

    method: Literal["lora", "full"] = setting("lora", "Train adapters of low rank (LoRA), or all weights.")
    rank: int = setting(16, "Rank of the adapters.")
    alpha: float | None = setting(None, "LoRA alpha, the scale times the rank; default: twice the rank.")
    lora_dropout: float = setting(0.0, "Dropout before the adapters.")
    target: tuple[str, ...] = setting(
        (), "Matrices with an adapter, such as in_proj; default: all but embedding and head. Repeatable."
    )
    base_precision: Literal["float32", "bf16", "int8", "int4"] = setting(
        "float32", "Precision of the frozen weights under the adapters."
    )

    seq_len: int = setting(1024, "Tokens per row; short examples share one.")
    batch_size: int = setting(1, "Rows per forward pass.")
    accumulate: int = setting(4, "Forward passes per step (gradient accumulation).")
    checkpointing: bool = setting(
        False, "Compute each block again in the backward pass: less memory, a third more time."
    )
    force: bool = setting(False, "Start even if the estimated memory is not available.", harmless=True)

    lr: float = setting(2e-4, "Peak learning rate; with --method full its default is 2e-5.")
    warmup: int = setting(100, "Warm-up steps, at most a tenth of the run.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW, on matrices only.")
    beta2: float = setting(0.999, "AdamW beta2.")

    eval_every: int = setting(50, "Steps between validations; 0 = only before and after.", harmless=True)
    save_every: int = setting(50, "Steps between checkpoints.", harmless=True)
    samples: int = setting(2, "Held-out prompts that are answered before and after.", harmless=True)
    sample_tokens: int = setting(64, "Tokens per sample.", harmless=True)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """Return a configuration made of plain values; see `Config.from_dict`.

        Args:
            mapping: field name -> value.
        """
        rate = {"lr": FULL_LR} if mapping.get("method") == "full" and "lr" not in mapping else {}
        return super().from_dict({**rate, **mapping})

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("seq_len", least=2)
        self.check("batch_size", "accumulate", "sample_tokens", least=1)
        self.check("rank", least=1, most=4096)
        self.check("samples", least=0, most=100)
        self.check("alpha", above=0, most=1e6)
        self.check("valid_fraction", "lora_dropout", least=0, below=1)
        if self.method == "full" and self.base_precision != "float32":
            raise UsageError(
                f"base_precision: expected float32 with method full, which trains all weights, got "
                f"{self.base_precision}."
            )

    def absolute(self) -> Self:
        """Return the configuration with absolute paths; MODEL is one if there is such a file."""
        model = os.path.abspath(self.model) if os.path.exists(self.model) else self.model
        return super().absolute().replace(model=model)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step."""
        return self.batch_size * self.accumulate
