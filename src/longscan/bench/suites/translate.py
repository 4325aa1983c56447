"""`longscan bench translate`: throughput of the translators beside peers of the same size."""

from __future__ import annotations

from typing import Any

from longscan.bench.measure import Contender, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table
from longscan.models import MODELS

__all__ = ["run"]

PRESET, QUICK_PRESET = "multi30k", "tiny"
PAIRS, QUICK_PAIRS = 256, 8  # of a training step
SENTENCES, QUICK_SENTENCES = 64, 2  # translated together
N_TOKENS, QUICK_N_TOKENS = 20, 3  # of each translation
BEAMS = (1, 5)
LENGTHS, QUICK_LENGTHS = (64, 128, 256, 512), (2, 4, 8)  # tokens decoded with a KV cache
N_DECODED = 8  # sentences in the batch
UNCACHED = 256  # the longest decoded without
TARGET_TOKENS = 14  # per pair on average, eos_id included: see `translators.sentences`

OURS, TORCH, MARIAN = "longscan", "torch.nn.Transformer", "transformers, Marian"
ELDERS = {"luong": "longscan, Luong", "bahdanau": "longscan, Bahdanau", "seq2seq": "longscan, no attention"}


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of training steps and translations.

    Args:
        settings: of the benchmark.
        quick: small models, to see that it works.
    """
    report = Report(suite="translate")
    n_pairs = QUICK_PAIRS if quick else PAIRS
    results = settings.compare("training", _contenders("train", quick, n=n_pairs), settings)
    report.add("training", results.values(), n_pairs * TARGET_TOKENS, "tokens/s")
    goal = "≥ 1 ×"
    for peer in (TORCH, MARIAN):
        report.ratios.append(
            Ratio(what=f"training: faster than {peer}", measured=faster(results, OURS, peer), goal=goal)
        )
    n, n_tokens = (QUICK_SENTENCES, QUICK_N_TOKENS) if quick else (SENTENCES, N_TOKENS)
    for beam_size in BEAMS:
        case = "greedy" if beam_size == 1 else f"beam of {beam_size}"
        contenders = _contenders("translate", quick, n=n, beam_size=beam_size, n_tokens=n_tokens)
        results = settings.compare(case, contenders, settings)
        report.add(case, results.values(), n, "sentences/s", beam_size=beam_size)
        what = f"{case}: faster than {MARIAN}"
        report.ratios.append(Ratio(what=what, measured=faster(results, OURS, MARIAN), goal=goal))
    training = [row for row in report.rows if row["case"] == "training"]
    translating = [row for row in report.rows if row["case"] != "training"]
    lengths = _decode(report, settings, quick)
    report.tables = [
        rate_table("training a translator: target tokens/s (min–max)", training, rate),
        rate_table(f"translating into {n_tokens} tokens: sentences/s (min–max)", translating, rate),
        rate_table(f"decoding {N_DECODED} long sentences: tokens/s (min–max)", lengths, rate),
    ]
    report.notes.append(
        f"A step: forward, backward and AdamW in float32 on {n_pairs} pairs of about {TARGET_TOKENS} tokens, "
        f"with label smoothing; {n} sentences are translated together. Random weights; the sizes, and the "
        f"dropout in training, are those of the preset {QUICK_PRESET if quick else PRESET}."
    )
    return report


def _decode(report: Report, settings: Settings, quick: bool) -> list[dict[str, Any]]:
    """Compare decoding by length, with the KV cache and without."""
    lengths, before = QUICK_LENGTHS if quick else LENGTHS, len(report.rows)
    fields = dict(MODELS["transformer"].presets[QUICK_PRESET if quick else PRESET])
    seconds = {}
    for length in lengths:
        contenders = [
            Contender(
                name=f"{OURS}, {name}",
                job="longscan.bench.contenders.translators:decode_ours",
                arguments={"fields": fields, "n": N_DECODED, "n_tokens": length, "cached": cached},
            )
            for name, cached in (("KV cache", True), ("no cache", False))
            if cached or length <= UNCACHED
        ]
        case = f"{length} tokens"
        results = settings.compare(case, contenders, settings)
        report.add(case, results.values(), N_DECODED * length, "tokens/s")
        seconds[length] = {name: measured.median for name, measured in results.items()}
        if len(results) == 2:
            ratio = faster(results, *results)
            report.ratios.append(Ratio(what=f"{case}: faster with the cache", measured=ratio))
    cached = [times[f"{OURS}, KV cache"] for times in seconds.values()]
    growth = (
        (cached[-1] - cached[-2]) / (cached[-2] - cached[-3]) / 2
    )  # twice the tokens, each at twice the position
    what = f"{lengths[-1]} tokens: time of a token over that at {lengths[-2]}"
    report.ratios.append(Ratio(what=what, measured=growth, goal="≤ 2 ×, linear"))
    return report.rows[before:]


def _contenders(task: str, quick: bool, **arguments: Any) -> list[Contender]:
    """Return the contenders of a task, "train" or "translate"."""
    preset = QUICK_PRESET if quick else PRESET

    def ours(model: str, name: str) -> Contender:
        fields = dict(MODELS[model].presets[preset])
        job = f"longscan.bench.contenders.translators:{task}_ours"
        return Contender(name=name, job=job, arguments={"name": model, "fields": fields, **arguments})

    fields = {"dropout": 0.0, **MODELS["transformer"].presets[preset]}
    peers: list[tuple[str, str, tuple[str, ...]]] = [("marian", MARIAN, ("transformers",))]
    if task == "train":  # torch's has no beam search
        peers.insert(0, ("torch", TORCH, ()))
    return [
        ours("transformer", OURS),
        *(
            Contender(
                name=name,
                job=f"longscan.bench.contenders.translators:{task}_{job}",
                arguments={"fields": fields, **arguments},
                packages=packages,
                peer=True,
            )
            for job, name, packages in peers
        ),
        *(ours(model, name) for model, name in ELDERS.items()),
    ]
