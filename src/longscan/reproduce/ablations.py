"""What each part of Mamba's design is worth: tables 6 to 10 of its paper (Gu and Dao 2023), in miniature.

The published models have 350 million parameters and the Pile; these have about 80,000 and the help texts of
Python, which every installation has. So the perplexities don't compare, but their order may: which variant is
better than which, and by how much relative to others.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from longscan.core.text_table import lay_out
from longscan.models import MODELS, ModelEntry
from longscan.plotting.style import BLUE, GREY, VERMILION, new_figure, reduced_note, save_figure, tidy
from longscan.reproduce.experiment import NO_RESULT, Plan, minutes, seeded
from longscan.reproduce.mamba_variants import Variant, VariantConfig
from longscan.training.config import TrainConfig
from longscan.training.language_model import LanguageRun

__all__ = ["FILES", "SOURCE", "run", "show", "write_text"]

FILES, SOURCE = (), ""
SEEDS = (0, 1, 2)  # of --full
STEPS, FULL_STEPS = 600, 8000
PUBLISHED = 8.71  # perplexity of the whole
HELD_OUT = 10  # every tenth block of paragraphs
BLOCK = 16  # paragraphs

SHARED: dict[str, Any] = {
    "model": "mamba",
    "preset": "tiny",
    "tokenizer": "bytes",
    "d_model": 64,
    "n_layers": 2,
    "seq_len": 256,
    "batch_size": 4,
    "lr": 6e-3,
    "warmup": 100,
    "weight_decay": 0.1,
    "eval_every": 0,
    "save_every": 500,
    "sample_every": 0,
}
CONSTANT = ("select_dt=false", "select_B=false", "select_C=false")
VARIANTS: dict[str, tuple[str, ...]] = {  # what is undone
    "mamba": (),
    "no-gate": ("gate=false",),
    "none": CONSTANT,
    "none-complex": (*CONSTANT, "A_init=complex"),
    "only-B": ("select_dt=false", "select_C=false"),
    "only-C": ("select_dt=false", "select_B=false"),
    "only-dt": ("select_B=false", "select_C=false"),
    "complex": ("A_init=complex",),
    "half": ("A_init=half",),
    "random": ("A_init=random",),
    "no-dt": ("select_dt=false",),
    **{f"rank-{rank}": (f"dt_rank={rank}",) for rank in (1, 2, 16, 64)},
    **{f"N-{n}": (f"d_state={n}",) for n in (1, 2, 4, 8)},
    **{f"N-{n}-constant": (f"d_state={n}", "select_B=false", "select_C=false") for n in (1, 2, 4, 8)},
}
#: the table -> its rows, each a variant and its published perplexity
TABLES: dict[str, dict[str, tuple[str, float | None]]] = {
    "block and state space (table 6)": {
        "gate, selective": ("mamba", 8.69),
        "gate, S4 real": ("none", 10.56),
        "gate, S4 complex": ("none-complex", 10.54),
        "no gate, selective": ("no-gate", None),
    },
    "selective parameters (table 7)": {
        "none": ("none", 10.93),
        "B": ("only-B", 10.15),
        "C": ("only-C", 9.98),
        "Δ": ("only-dt", 9.81),
        "Δ, B, C": ("mamba", 8.71),
    },
    "initial A (table 8)": {
        "-1/2 + n i": ("complex", 9.16),
        "-1/2": ("half", 8.85),
        "-(n + 1)": ("mamba", 8.71),
        "-exp(normal)": ("random", 8.71),
    },
    "rank of Δ over d_model (table 9)": {
        "constant Δ": ("no-dt", 9.12),
        "1/64": ("rank-1", 8.84),
        "1/32": ("rank-2", 8.80),
        "1/16": ("mamba", 8.71),
        "1/4": ("rank-16", None),
        "1": ("rank-64", None),
    },
    "N, selective B and C (table 10)": {
        **{f"{n}": (f"N-{n}", ppl) for n, ppl in ((1, 9.73), (2, 9.40), (4, 9.09), (8, 8.84))},
        "16": ("mamba", 8.71),
    },
    "N, constant B and C (table 10)": {
        **{f"{n}": (f"N-{n}-constant", ppl) for n, ppl in ((1, 9.88), (2, 9.86), (4, 9.82), (8, 9.82))},
        "16": ("only-dt", 9.81),
    },
}
NOTES = (
    "published: perplexity per token on the Pile, 350 million parameters; no table is without the gate",
    "measured:  bits per byte of held-out text, 2 layers of width 64; less is better",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _VariantTraining(TrainConfig):
    """The settings of training a variant."""

    @property
    def choice(self) -> Mapping[str, ModelEntry]:
        """Mamba's entry, with the class of the variants."""
        return {"mamba": dataclasses.replace(MODELS["mamba"], cls=Variant, config=VariantConfig)}


class _VariantRun(LanguageRun):
    """Trains a variant."""

    verb = "reproduce"
    settings = _VariantTraining

    @classmethod
    def again(cls, directory: Path) -> str:
        """Return the command that resumes a run."""
        return "the same command"

    def export(self, directory: Path) -> None:
        """Save nothing: a variant is no model to load, its last validation is all that counts."""


def run(plan: Plan) -> dict[str, Any]:
    """Return the bits per byte of the variants, trained here.

    Args:
        plan: where, and how much.
    """
    train, valid = (plan.out / f"{plan.name}-{part}.txt" for part in ("train", "valid"))
    if not valid.is_file():
        plan.out.mkdir(parents=True, exist_ok=True)
        write_text(train, valid)
    steps = FULL_STEPS if plan.full else STEPS
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for name, options in VARIANTS.items():
            fields = {"data": [str(train)], "valid": [str(valid)], "option": list(options), "seed": seed}
            config = _VariantTraining.from_dict({**SHARED, **fields, "steps": steps})
            directory = plan.train(seeded(f"{plan.name}-{steps}-{name}", seed), config, _VariantRun)
            sizes = {**MODELS["mamba"].presets["tiny"], **config.sizes, **config.options, "vocab_size": 257}
            runs[name].append(
                {
                    "bits_per_byte": _last_validation(directory),
                    "parameters": Variant(VariantConfig.from_dict(sizes)).num_parameters(),
                    "seed": seed,
                    "minutes": minutes(directory),
                }
            )
    reduced = f"80,000 parameters, {STEPS:,} steps of 1,024 bytes, one seed"
    report = {
        "experiment": plan.name,
        "reduced": NO_RESULT if plan.quick else "80,000 parameters" if plan.full else reduced,
        "tables": {
            title: {row: list(cells) for row, cells in rows.items()} for title, rows in TABLES.items()
        },
        "notes": list(NOTES),
        "machine": plan.machine,
        "runs": runs,
    }
    plan.save(report, lambda path: _plot(report, path))
    return report


def write_text(train: Path, valid: Path) -> None:
    """Write the help texts of this Python, each paragraph once, a tenth of them held out.

    Args:
        train: receives nine of ten blocks of paragraphs.
        valid: receives the others.
    """
    paragraphs: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.rstrip())
    texts = [text for text in paragraphs.values() if text]
    blocks = ["\n\n".join(texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
    train.write_text("\n\n".join(b for n, b in enumerate(blocks) if n % HELD_OUT) + "\n", encoding="utf-8")
    valid.write_text("\n\n".join(blocks[::HELD_OUT]) + "\n", encoding="utf-8")


def show(report: Mapping[str, Any]) -> str:
    """Return the results as text: each table, the published perplexities beside our bits per byte.

    Args:
        report: of `run`.
    """
    lines: list[str] = []
    for title, rows in report["tables"].items():
        cells = [[title, "published", "bits per byte", "parameters", "minutes"]]
        for label, (name, published) in rows.items():
            found = report["runs"][name]
            values = [row["bits_per_byte"] for row in found]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            mean, spent = (sum(each) / len(found) for each in (values, [row["minutes"] for row in found]))
            known = "-" if published is None else f"{published:.2f}"
            cells.append([label, known, f"{mean:.3f}{spread}", f"{found[0]['parameters']:,}", f"{spent:.1f}"])
        lines += [*lay_out(cells), ""]
    seeds = f"seeds:     {len(next(iter(report['runs'].values())))}"
    return "\n".join([*lines, f"reduced: {report['reduced']}", seeds, *report["notes"]])


def _last_validation(directory: Path) -> float:
    """Return the bits per byte of a finished run, on all held-out text."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in reversed(lines))
    return float(next(row[LanguageRun.valid_key] for row in rows if LanguageRun.valid_key in row))


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw by how much the cross-entropy of each variant exceeds that of Mamba as it is."""
    figure = new_figure(10.0, 5.6)
    panels = figure.subplots(2, 3).flatten()
    for number, (ax, (title, rows)) in enumerate(zip(panels, report["tables"].items(), strict=False)):
        found = {name: report["runs"][name] for name, _ in rows.values()}
        means = {name: sum(r["bits_per_byte"] for r in some) / len(some) for name, some in found.items()}
        whole = report["runs"]["mamba"]
        base = sum(row["bits_per_byte"] for row in whole) / len(whole)
        known = [ppl for name, ppl in rows.values() if name == "mamba"]
        best = math.log(known[0] if known else PUBLISHED)
        for y, (name, published) in enumerate(reversed(rows.values())):
            ours = ax.barh(y, 100 * (means[name] / base - 1), 0.6, color=BLUE)
            if published is not None:
                there = 100 * (math.log(published) / best - 1)
                [line] = ax.plot([there, there], [y - 0.4, y + 0.4], color=VERMILION, linewidth=2.5)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_yticks(range(len(rows)), list(reversed(rows)))
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("above Mamba's (%)" if number >= 3 else "")
        tidy(ax)
    for ax in panels[len(report["tables"]) :]:
        ax.set_axis_off()
    labels = ["cross-entropy, measured", "published"]
    figure.legend([ours, line], labels, frameon=False, loc="outside upper center", ncols=2)
    save_figure(figure, path, reduced_note(report))
