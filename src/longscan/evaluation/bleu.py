"""How good translations are: BLEU and chrF as sacrebleu computes them, with the signatures it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from longscan.core.checks import check_texts
from longscan.core.optional import require

__all__ = ["BUCKETS", "TOKENIZERS", "by_length", "score"]

TOKENIZERS = ("13a", "zh", "char", "intl", "none")  # of sacrebleu's, those that need nothing else
BUCKETS = (5, 10, 15, 20, 25, 30)  # the last source words of each bucket; what is longer makes one more


def score(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, Any]:
    """Score translations of a whole text.

    BLEU: Papineni et al. 2002. chrF: Popović 2015. Signatures: Post 2018 (arXiv:1804.08771).

    Args:
        hypotheses: the translations.
        references: those of people, one for each.
        tokenize: how BLEU finds words, one of TOKENIZERS.

    Returns:
        bleu, chrf: from 0 to 100; bleu_signature, chrf_signature: what was computed, for others to repeat.

    Raises:
        LongscanError: sacrebleu is not installed.
    """
    check_texts("hypotheses", hypotheses)
    check_texts("references", references)
    metrics = require("sacrebleu", "BLEU and chrF", "sacrebleu.metrics")
    result: dict[str, Any] = {}
    for name, metric in (("bleu", metrics.BLEU(tokenize=tokenize)), ("chrf", metrics.CHRF())):
        result[name] = round(metric.corpus_score(list(hypotheses), [list(references)]).score, 2)
        result[f"{name}_signature"] = str(metric.get_signature())
    return result


def by_length(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a"
) -> list[dict[str, Any]]:
    """Score translations of short and long sentences apart, as Bahdanau et al. do in figure 2.

    Args:
        sources: the sentences; their length is in words between spaces.
        hypotheses: the translations.
        references: those of people.
        tokenize: see `score`.

    Returns:
        For each bucket that has sentences: words (its name), mean_words, sentences, bleu.
    """
    lengths = [len(source.split()) for source in sources]
    rows = []
    for low, high in _buckets():
        chosen = [i for i, length in enumerate(lengths) if low <= length and (high is None or length <= high)]
        if chosen:
            measured = score([hypotheses[i] for i in chosen], [references[i] for i in chosen], tokenize)
            rows.append(
                {
                    "words": f"{low}-{high}" if high else f"{low}+",
                    "mean_words": round(sum(lengths[i] for i in chosen) / len(chosen), 2),
                    "sentences": len(chosen),
                    "bleu": measured["bleu"],
                }
            )
    return rows


def _buckets() -> Iterator[tuple[int, int | None]]:
    """Yield the first and the last length of each."""
    yield from zip((0, *(last + 1 for last in BUCKETS)), (*BUCKETS, None), strict=True)
