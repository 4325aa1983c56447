"""`longscan bench position`: decoding at position 100 and at 100,000: what grows with the prompt?"""

from __future__ import annotations

from typing import Any

from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table
from longscan.bench.suites.generate_contenders import SHAPES, tiny

__all__ = ["run"]

POSITIONS, QUICK_POSITIONS = (100, 1_000, 10_000, 100_000), (8, 64)
TOKENS, QUICK_TOKENS = 16, 4
NAMES = ("130m", "mamba2", "falcon-h1", "granite-h")
LLAMA = "Llama 130m"
SPARE = 10**9  # bytes beside the state of a Llama


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of decoding by models with states of constant size, hybrids and a Llama.

    Args:
        settings: of the benchmark.
        quick: small models and positions, to see that it works.
    """
    report = Report(suite="position")
    positions, n_tokens = (QUICK_POSITIONS, QUICK_TOKENS) if quick else (POSITIONS, TOKENS)
    models = _models(quick, positions[-1] + n_tokens)
    results: dict[int, dict[str, Measurement]] = {}
    for position in positions:
        contenders = [_contender(name, model, position, n_tokens) for name, model in models.items()]
        case = f"{position:,}"
        results[position] = settings.compare(f"decode at position {case}", contenders, settings)
        report.add(case, results[position].values(), n_tokens, "tokens/s", seq_len=position)
    report.tables = [
        rate_table("decode, by position: tokens/s (min–max)", report.rows, rate),
        rate_table(f"state, by position: {'kB' if quick else 'MB'}", report.rows, _kilo if quick else _state),
    ]
    near, far = results[positions[0]], results[positions[-1]]
    for name in models:
        constant = not near[name].details.get("growth")
        speed = faster({"far": far[name], "near": near[name]}, "far", "near")
        report.ratios.append(
            Ratio(
                what=f"{name}: speed at {positions[-1]:,}, share of that at {positions[0]:,}",
                measured=speed,
                goal="95–105 %" if constant else "",
                percent=True,
            )
        )
    report.notes.append(
        f"{n_tokens} tokens after each position, float32, random weights and caches: time does not depend on "
        "the numbers. A hybrid's cache grows in its layers with attention alone."
    )
    return report


def _models(quick: bool, max_positions: int) -> dict[str, dict[str, Any]]:
    """Return the models, name -> fields of `contenders.longscan.fresh`."""
    sizes = {name: tiny(name) if quick else SHAPES[name] for name in NAMES}
    models = {SHAPES[name].title: one.model for name, one in sizes.items()}
    return {**models, LLAMA: sizes["130m"].llama | {"max_positions": max_positions}}


def _contender(name: str, model: dict[str, Any], position: int, n_tokens: int) -> Contender:
    """Return a model at a position as a contender."""
    arguments = {"model": model, "position": position, "n_tokens": n_tokens}
    cache = 0
    if name == LLAMA:
        cache = 8 * model["n_layers"] * model["d_model"] * position  # keys and values, a head for each query
    return Contender(
        name=name,
        job="longscan.bench.contenders.longscan:decode_at",
        arguments=arguments,
        needs_bytes=cache and cache + SPARE,
    )


def _state(row: dict[str, Any]) -> str:
    """Return the size of the state as a cell."""
    return f"{row['state_bytes'] / 1e6:,.1f}" if "state_bytes" in row else "–"


def _kilo(row: dict[str, Any]) -> str:
    """Return the size of a small model's state as a cell."""
    return f"{row['state_bytes'] / 1e3:,.1f}" if "state_bytes" in row else "–"
