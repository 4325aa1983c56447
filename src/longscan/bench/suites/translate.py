"""`longscan bench translate`: how fast the translators learn and write, beside others of the same size."""

from __future__ import annotations

from typing import Any

from longscan.bench.measure import Contender, Pace, faster, race
from longscan.bench.report import Ratio, Report, rate, rate_table
from longscan.models import MODELS

__all__ = ["run"]

PRESET, QUICK_PRESET = "multi30k", "tiny"
PAIRS, QUICK_PAIRS = 256, 8  # of a training step
SENTENCES, QUICK_SENTENCES = 64, 2  # translated together
N_TOKENS, QUICK_N_TOKENS = 20, 3  # of each translation
BEAMS = (1, 5)
LENGTHS, QUICK_LENGTHS = (64, 128, 256, 512), (2, 4, 8)  # of what is written with a cache
N_WRITTEN = 8  # sentences side by side
UNCACHED = 256  # the longest that is written without
TARGET_TOKENS = 14  # of a pair on average, eos_id included: see `translators.sentences`

OURS, TORCH, MARIAN = "longscan", "torch.nn.Transformer", "transformers, Marian"
ELDERS = {"luong": "longscan, Luong", "bahdanau": "longscan, Bahdanau", "seq2seq": "longscan, no attention"}


def run(pace: Pace, quick: bool) -> Report:
    """Race training steps and translations.

    Args:
        pace: how thoroughly.
        quick: small models, to see that it works.

    Returns:
        The report.
    """
    report = Report(suite="translate")
    n_pairs = QUICK_PAIRS if quick else PAIRS
    found = race("training", _contenders("train", quick, n=n_pairs), pace)
    report.add("training", found.values(), n_pairs * TARGET_TOKENS, "tokens/s")
    goal = "≥ 1 ×"
    for peer in (TORCH, MARIAN):
        report.ratios.append(
            Ratio(what=f"training: faster than {peer}", measured=faster(found, OURS, peer), goal=goal)
        )
    n, n_tokens = (QUICK_SENTENCES, QUICK_N_TOKENS) if quick else (SENTENCES, N_TOKENS)
    for beam_size in BEAMS:
        case = "greedy" if beam_size == 1 else f"beam of {beam_size}"
        contenders = _contenders("translate", quick, n=n, beam_size=beam_size, n_tokens=n_tokens)
        found = race(case, contenders, pace)
        report.add(case, found.values(), n, "sentences/s", beam_size=beam_size)
        what = f"{case}: faster than {MARIAN}"
        report.ratios.append(Ratio(what=what, measured=faster(found, OURS, MARIAN), goal=goal))
    training = [row for row in report.rows if row["case"] == "training"]
    writing = [row for row in report.rows if row["case"] != "training"]
    lengths = _write(report, pace, quick)
    report.tables = [
        rate_table("training a translator: target tokens/s (min–max)", training, rate),
        rate_table(f"translating into {n_tokens} tokens: sentences/s (min–max)", writing, rate),
        rate_table(f"writing {N_WRITTEN} long sentences: tokens/s (min–max)", lengths, rate),
    ]
    report.notes.append(
        f"A step: forward, backward and AdamW in float32 on {n_pairs} pairs of about {TARGET_TOKENS} tokens, "
        f"with label smoothing; {n} sentences are translated together. Random weights; the sizes, and the "
        f"dropout in training, are those of the preset {QUICK_PRESET if quick else PRESET}."
    )
    return report


def _write(report: Report, pace: Pace, quick: bool) -> list[dict[str, Any]]:
    """Measure what the length of a sentence costs, with the cache of keys and values and without."""
    lengths, before = QUICK_LENGTHS if quick else LENGTHS, len(report.rows)
    fields = dict(MODELS["transformer"].presets[QUICK_PRESET if quick else PRESET])
    seconds = {}
    for length in lengths:
        contenders = [
            Contender(
                name=f"{OURS}, {name}",
                job="longscan.bench.contenders.translators:write_ours",
                arguments={"fields": fields, "n": N_WRITTEN, "n_tokens": length, "cached": cached},
            )
            for name, cached in (("cached", True), ("all anew", False))
            if cached or length <= UNCACHED
        ]
        case = f"{length} tokens"
        found = race(case, contenders, pace)
        report.add(case, found.values(), N_WRITTEN * length, "tokens/s")
        seconds[length] = {name: measured.median for name, measured in found.items()}
        if len(found) == 2:
            ratio = faster(found, *found)
            report.ratios.append(Ratio(what=f"{case}: faster with the cache", measured=ratio))
    cached = [times[f"{OURS}, cached"] for times in seconds.values()]
    growth = (
        (cached[-1] - cached[-2]) / (cached[-2] - cached[-3]) / 2
    )  # twice as many tokens, each twice as far
    what = f"{lengths[-1]} tokens: time of a token over that at {lengths[-2]}"
    report.ratios.append(Ratio(what=what, measured=growth, goal="≤ 2 ×, linear"))
    return report.rows[before:]


def _contenders(what: str, quick: bool, **arguments: Any) -> list[Contender]:
    """List who trains ("train") or translates ("translate")."""
    preset = QUICK_PRESET if quick else PRESET

    def mine(model: str, name: str) -> Contender:
        fields = dict(MODELS[model].presets[preset])
        job = f"longscan.bench.contenders.translators:{what}_ours"
        return Contender(name=name, job=job, arguments={"name": model, "fields": fields, **arguments})

    fields = {"dropout": 0.0, **MODELS["transformer"].presets[preset]}
    peers: list[tuple[str, str, tuple[str, ...]]] = [("marian", MARIAN, ("transformers",))]
    if what == "train":  # torch's has no search of its own
        peers.insert(0, ("torch", TORCH, ()))
    return [
        mine("transformer", OURS),
        *(
            Contender(
                name=name,
                job=f"longscan.bench.contenders.translators:{what}_{job}",
                arguments={"fields": fields, **arguments},
                packages=packages,
                peer=True,
            )
            for job, name, packages in peers
        ),
        *(mine(model, name) for model, name in ELDERS.items()),
    ]
