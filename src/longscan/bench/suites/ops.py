"""`longscan bench ops`: scans, ssd, convolution and kernels beside loops, mambapy, torch and the ceiling."""

from __future__ import annotations

import math
from typing import Any

from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, spread, table
from longscan.bench.suites.work import SSD_CHUNK, probe, ssd_operations

__all__ = ["run"]

SHAPES = ((1, 2048, 1536, 16), (8, 512, 512, 16))  # (batch, seq_len, d_inner, d_state)
QUICK = ((1, 128, 64, 16),)
SSD_SHAPES = ((1, 2048, 24, 64, 128), (8, 512, 8, 64, 64))  # (batch, seq_len, n_heads, d_head, d_state)
SSD_QUICK = ((1, 128, 2, 16, 16),)
D_CONV = 4
# of the state spaces: (batch, seq_len, channels, n), and (1, length, channels, n) of their kernels
RUN, KERNEL = (8, 1024, 256, 32), (1, 4096, 256, 32)
QUICK_RUN, QUICK_KERNEL = (1, 64, 16, 4), (1, 64, 16, 4)
SPACES = {  # our job -> its name, and the peers' jobs
    "diagonal": (
        "diagonal_ssm",
        {"torch loop, step by step": "diagonal_loop", "torch, as a convolution": "diagonal_fft"},
    ),
    "vandermonde": ("vandermonde", {"torch, the whole matrix": "vandermonde_torch"}),
    "cauchy": ("cauchy", {"torch, the whole matrix": "cauchy_torch"}),
}
OURS, LOOPS, MAMBAPY, TORCH, CEILING, FALLBACK, GEMM = (
    "longscan",
    ("torch loop, step by step", "torch loop, exp at once"),
    "mambapy pscan",
    "torch conv1d + silu",
    "ceiling: exp + 3 fma",
    "longscan without kernels",
    "ceiling: float32 GEMM",
)
SSD_PEERS: dict[str, tuple[str, tuple[str, ...]]] = {  # -> its job and the packages it needs
    "torch loop over time": ("ssd_loop", ()),
    "transformers, chunks in torch": ("ssd_transformers", ("transformers",)),
    MAMBAPY: ("ssd_mambapy", ("mambapy",)),
}
PSCAN_COPIES = 12  # of all states at all times, with gradients


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of the ops, forward alone and with the backward pass.

    Args:
        settings: of the benchmark.
        quick: small sizes, to see that it works.
    """
    report = Report(suite="ops")
    for shape in QUICK if quick else SHAPES:
        forward = _scan(report, shape, False, settings)
        both = _scan(report, shape, True, settings)
        _scan_ratios(report, shape, forward, both)
    for heads in SSD_QUICK if quick else SSD_SHAPES:
        _ssd(report, heads, settings)
    for shape in QUICK if quick else SHAPES:
        for backward in (False, True):
            _conv(report, shape[:3], backward, settings)
    for job in SPACES:
        sizes = (QUICK_RUN, QUICK_KERNEL) if quick else (RUN, KERNEL)
        for backward in (False, True):
            _space(report, job, sizes[job != "diagonal"], backward, settings)
    report.notes.append(
        "u, dt (after softplus), A, B, C and D are given; of the state spaces u, dt A and C. Extra memory "
        "counts outputs and gradients, over the size of u, of x or, for a kernel, over its own. The ceiling "
        "is the fastest turn of a probe that does the same arithmetic in registers; for ssd that of torch's "
        f"matrix products, for tiles of {SSD_CHUNK} rows, where pairs count of a row and an earlier one only."
    )
    return report


def _scan(
    report: Report, shape: tuple[int, ...], backward: bool, settings: Settings
) -> dict[str, Measurement]:
    """Compare scans and add a table."""
    here: dict[str, Any] = {"sizes": shape, "backward": backward}
    states = math.prod(shape)
    contenders = [
        Contender(name=OURS, job="longscan.bench.contenders.longscan:scan", arguments=here),
        Contender(
            name=CEILING, job="longscan.bench.contenders.ceilings:exp_fma", arguments={"n_states": states}
        ),
        *(
            Contender(
                name=name,
                job="longscan.bench.contenders.peers:scan_loop",
                arguments=here | {"at_once": at_once},
                peer=True,
                patience=10.0,
            )
            for name, at_once in zip(LOOPS, (False, True), strict=True)
        ),
        Contender(
            name=MAMBAPY,
            job="longscan.bench.contenders.peers:scan_mambapy",
            arguments=here,
            packages=("mambapy",),
            peer=True,
            patience=10.0,
        ),
    ]
    if backward:  # of a forward pass only
        contenders = [c for c in contenders if c.name != CEILING]
    case = f"selective_scan {'forward + backward' if backward else 'forward'} {shape}"
    results = settings.compare(case, contenders, settings, memory=True)
    _add(report, case, results, states, shape, backward)
    return results


def _ssd(report: Report, shape: tuple[int, ...], settings: Settings) -> None:
    """Compare state space duality, forward and with the backward pass; add tables and ratios."""
    times = []
    for backward, word in ((False, "forward"), (True, "forward + backward")):
        here: dict[str, Any] = {"sizes": shape, "backward": backward}
        work = ssd_operations(shape, backward)
        contenders = [
            Contender(name=OURS, job="longscan.bench.contenders.longscan:ssd", arguments=here),
            Contender(name=GEMM, job="longscan.bench.contenders.ceilings:matmul", arguments=probe(work)),
            Contender(name=FALLBACK, job="longscan.bench.contenders.longscan:ssd_fallback", arguments=here),
            *(
                Contender(
                    name=name,
                    job=f"longscan.bench.contenders.peers:{job}",
                    arguments=here,
                    packages=packages,
                    peer=True,
                    patience=10.0,
                    needs_bytes=PSCAN_COPIES * 4 * math.prod(shape) if job == "ssd_mambapy" else 0,
                )
                for name, (job, packages) in SSD_PEERS.items()
            ),
        ]
        case = f"ssd {word} {shape}"
        results = settings.compare(case, contenders, settings, memory=True)
        _add(report, case, results, work, shape, backward, "operations/s")
        times.append(results[OURS].median)
        share = Ratio(
            what=f"{case}: share of the GEMM ceiling",
            measured=_of_ceiling(results, OURS),
            goal="" if backward else "≥ 60 %",
            percent=True,
        )
        fallback = Ratio(
            what=f"{case}: faster than without kernels", measured=faster(results, OURS, FALLBACK)
        )
        best = Ratio(
            what=f"{case}: faster than the best peer",
            measured=faster(results, OURS, *SSD_PEERS),
            goal="≥ 5 ×",
        )
        report.ratios += [share, fallback, best]
    what = f"ssd {shape} forward + backward: slower than forward"
    report.ratios.append(Ratio(what=what, measured=times[1] / times[0], goal="≤ 4 ×"))


def _conv(report: Report, shape: tuple[int, ...], backward: bool, settings: Settings) -> None:
    """Compare convolutions and add a table."""
    here: dict[str, Any] = {"sizes": shape, "d_conv": D_CONV, "backward": backward}
    contenders = [
        Contender(name=OURS, job="longscan.bench.contenders.longscan:conv", arguments=here),
        Contender(
            name=TORCH,
            job="longscan.bench.contenders.peers:conv_torch",
            arguments=here,
            peer=True,
            patience=10.0,
        ),
    ]
    case = f"causal_conv1d {'forward + backward' if backward else 'forward'} {shape} d_conv={D_CONV}"
    results = settings.compare(case, contenders, settings, memory=True)
    _add(report, case, results, math.prod(shape), shape, backward)
    report.ratios.append(Ratio(what=f"{case}: faster than {TORCH}", measured=faster(results, OURS, TORCH)))


def _space(report: Report, job: str, shape: tuple[int, ...], backward: bool, settings: Settings) -> None:
    """Compare an op of the state spaces and add a table."""
    name, others = SPACES[job]
    here: dict[str, Any] = {"sizes": shape, "backward": backward}
    contenders = [Contender(name=OURS, job=f"longscan.bench.contenders.longscan:{job}", arguments=here)]
    contenders += [
        Contender(
            name=other,
            job=f"longscan.bench.contenders.peers:{theirs}",
            arguments=here,
            peer=True,
            patience=10.0,
        )
        for other, theirs in others.items()
    ]
    case = f"{name} {'forward + backward' if backward else 'forward'} {shape}"
    results = settings.compare(case, contenders, settings, memory=True)
    _add(report, case, results, math.prod(shape), shape, backward)
    goal = "≥ 5 ×" if job == "vandermonde" else ""
    ratio = faster(results, OURS, *others)
    report.ratios.append(Ratio(what=f"{case}: faster than the best of torch", measured=ratio, goal=goal))


def _add(
    report: Report,
    case: str,
    results: dict[str, Measurement],
    work: int,
    shape: tuple[int, ...],
    backward: bool,
    unit: str = "updates/s",
) -> None:
    """Add the rows and the table of a comparison."""
    u_bytes = 4 * math.prod(shape[: 4 if len(shape) > 4 else 3])
    first = len(report.rows)
    report.add(case, results.values(), work, unit, shape=list(shape), backward=backward, u_bytes=u_bytes)
    body = []
    for row in report.rows[first:]:
        name, extra = row["contender"], row["extra_bytes"]
        share = _of_ceiling(results, name)
        body.append(
            [
                name,
                spread(row, lambda seconds: 1e3 * seconds, ",.2f"),
                f"{row['rate'] / 1e9:.2f}" if row["rate"] else "–",
                "–" if math.isnan(share) else f"{100 * share:.0f} %",
                ""
                if name in (OURS, CEILING, GEMM) or not row["rate"]
                else f"{faster(results, OURS, name):.1f} ×",
                "–" if extra is None or name in (CEILING, GEMM) else f"{extra / u_bytes:.2f}",
            ]
        )
    columns = ["", "ms (min–max)", f"G {unit}", "of ceiling", "longscan is faster", "extra memory / u"]
    report.tables.append(table(f"{case} float32", columns, body))


def _scan_ratios(
    report: Report,
    shape: tuple[int, ...],
    forward: dict[str, Measurement],
    both: dict[str, Measurement],
) -> None:
    """Add the ratios with their goals."""
    u_bytes = 4 * math.prod(shape[:3])
    ours = both[OURS]
    memory = ours.extra_bytes / u_bytes if ours.extra_bytes is not None else math.nan
    ratios = (
        ("forward: share of the exp + fma ceiling", _of_ceiling(forward, OURS), "≥ 60 %", True),
        ("forward: faster than the best torch loop", faster(forward, OURS, *LOOPS), "≥ 10 ×", False),
        ("forward: faster than mambapy", faster(forward, OURS, MAMBAPY), "≥ 40 ×", False),
        ("forward + backward: slower than forward", ours.median / forward[OURS].median, "≤ 4 ×", False),
        ("forward + backward: faster than the best torch loop", faster(both, OURS, *LOOPS), "≥ 15 ×", False),
        ("forward + backward: faster than mambapy", faster(both, OURS, MAMBAPY), "≥ 30 ×", False),
        ("forward + backward: extra memory over size of u", memory, "≤ 4 ×", False),
    )
    for what, measured, goal, percent in ratios:
        report.ratios.append(
            Ratio(what=f"scan {shape} {what}", measured=measured, goal=goal, percent=percent)
        )


def _of_ceiling(results: dict[str, Measurement], name: str) -> float:
    """Return a contender's median rate over that of the fastest turn of the probe; NaN without the probe."""
    ceiling = next((results[known] for known in (CEILING, GEMM) if known in results), None)
    if ceiling is None or not ceiling.seconds or not results[name].seconds:
        return math.nan
    return min(ceiling.seconds) / results[name].median
