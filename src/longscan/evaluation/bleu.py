"""BLEU and chrF of translations, computed by sacrebleu, with its signatures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from longscan.core.checks import check_texts
from longscan.core.optional import require

__all__ = ["BUCKETS", "TOKENIZERS", "by_length", "score"]

TOKENIZERS = ("13a", "zh", "char", "intl", "none")  # those of sacrebleu without further packages
BUCKETS = (5, 10, 15, 20, 25, 30)  # the largest number of source words of each bucket; one more for the rest


def score(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, Any]:
    """Return the corpus scores of translations.

    BLEU: Papineni et al. 2002. chrF: Popović 2015. Signatures: Post 2018 (arXiv:1804.08771).

    Args:
        hypotheses: the translations.
        references: the reference translations, one for each.
        tokenize: the tokenizer of BLEU, one of TOKENIZERS.

    Returns:
        bleu, chrf: from 0 to 100; bleu_signature, chrf_signature: how to reproduce them.

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
    """Return BLEU by source length, as in figure 2 of Bahdanau et al.

    Args:
        sources: the sentences; their length is the number of words between spaces.
        hypotheses: the translations.
        references: the reference translations.
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
    """Yield the smallest and the largest length of each bucket."""
    yield from zip((0, *(last + 1 for last in BUCKETS)), (*BUCKETS, None), strict=True)
