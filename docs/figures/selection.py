"""Draw docs/figures/selection.png, the Mamba block, and selection_mask.png, a decay mask.

python docs/figures/selection.py [DIRECTORY]     (needs the extra: plot)
"""

import itertools
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from longscan.plotting.style import SEQUENTIAL

INK, PAPER, FAINT = "#1F2933", "#FFFFFF", "#7B8794"
LEARNED, SELECTS = "#009E73", "#D55E00"

# what has parameters: the first letters of its name in a checkpoint; centre, width, height
PARAMETERS = {
    "in_proj": (1.9, 1.5, 1.3, 3.0),
    "conv1d": (4.4, 2.4, 1.3, 0.8),
    "x_proj": (7.9, 1.0, 1.2, 1.5),
    "dt_proj": (10.0, 1.45, 1.2, 0.7),
    "A_log": (13.2, 3.65, 0.9, 0.55),
    "D": (14.9, 3.65, 0.9, 0.55),
    "out_proj": (19.0, 1.5, 1.3, 3.0),
}
COMPUTED = {
    "SiLU": (6.15, 2.4, 0.9, 0.6),
    "softplus": (11.5, 1.45, 1.05, 0.6),
    "scan": (14.05, 1.5, 2.9, 2.75),
    "gate": (17.0, 2.4, 0.6, 0.6),
    "SiLU ": (17.0, -0.55, 0.9, 0.6),
}
LABELS = {
    "scan": "selective scan\n\nh = exp(dt A) h + dt B x\ny = C h + D x\n\nh: 1536 × 16",
    "gate": "×",
    "SiLU ": "SiLU",
    "A_log": "A_log",
}


def box(ax: Axes, name: str) -> None:
    """Draw what has parameters as a coloured box, what is only computed as a white one."""
    learned = name in PARAMETERS
    x, y, width, height = (PARAMETERS if learned else COMPUTED)[name]
    selects = name in ("x_proj", "dt_proj")
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=(SELECTS if selects else LEARNED) if learned else PAPER,
            edgecolor=(SELECTS if selects else LEARNED) if learned else INK,
            lw=1.6,
            zorder=2,
        )
    )
    ink, weight = (PAPER, "bold") if learned else (INK, "normal")
    ax.text(
        x, y, LABELS.get(name, name), ha="center", va="center", color=ink, weight=weight, size=10.5, zorder=3
    )


def arrow(
    ax: Axes, *points: tuple[float, float], label: str = "", at: tuple[float, float] | None = None
) -> None:
    """Draw a line through points with a head at its end, and a label, above its first piece or elsewhere."""
    for start, end in itertools.pairwise(points[:-1]):
        ax.plot(*zip(start, end, strict=True), color=FAINT, lw=1.4, zorder=1, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": FAINT, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style, zorder=1)
    if label:
        (x0, y0), (x1, _) = points[:2]
        x, y = at or ((x0 + x1) / 2, y0 + 0.08)
        ax.text(x, y, label, ha="center", va="bottom", size=9.5, color=INK)


def draw_block() -> Figure:
    """Return the figure of the block."""
    figure = Figure(figsize=(16.4, 4.3), facecolor=PAPER)
    ax = figure.add_axes((0.005, 0.01, 0.99, 0.98))
    for name in (*PARAMETERS, *COMPUTED):
        box(ax, name)
    arrow(ax, (0.15, 1.5), (1.25, 1.5), label="token\n768")
    arrow(ax, (2.55, 2.4), (3.75, 2.4), label="x\n1536")
    arrow(ax, (5.05, 2.4), (5.7, 2.4))
    arrow(ax, (6.6, 2.4), (12.6, 2.4), label="x  1536", at=(9.9, 2.48))
    arrow(ax, (6.95, 2.4), (6.95, 1.0), (7.3, 1.0))
    arrow(ax, (8.5, 1.45), (9.4, 1.45), label="dt  48")
    arrow(ax, (10.6, 1.45), (10.98, 1.45))
    arrow(ax, (12.02, 1.45), (12.6, 1.45), label="1536")
    arrow(ax, (8.5, 0.6), (12.6, 0.6), label="B, C  16 each")
    arrow(ax, (13.2, 3.37), (13.2, 2.88))
    arrow(ax, (14.9, 3.37), (14.9, 2.88))
    arrow(ax, (15.5, 2.4), (16.7, 2.4), label="y\n1536")
    arrow(ax, (2.55, 0.3), (3.2, 0.3), (3.2, -0.55), (16.55, -0.55), label="z  1536", at=(9.9, -0.47))
    arrow(ax, (17.0, -0.25), (17.0, 2.1))
    arrow(ax, (17.3, 2.4), (18.35, 2.4))
    arrow(ax, (19.65, 1.5), (20.75, 1.5), label="out\n768")
    legend = ((LEARNED, "parameters"), (SELECTS, "parameters that make it selective"))
    for index, (colour, text) in enumerate(legend):
        ax.plot(0.35 + 2.6 * index, 3.65, marker="s", ms=9, color=colour)
        ax.text(0.55 + 2.6 * index, 3.65, text, va="center", size=10.5, color=INK)
    ax.set_xlim(0, 20.9)
    ax.set_ylim(-1.05, 4.05)
    ax.axis("off")
    return figure


def decay(dt: Tensor) -> Tensor:
    """Return exp(-(dt_{s+1} + ... + dt_t)) at [t, s], for s up to t, else nan; dt (seq_len,)."""
    total = dt.cumsum(0)
    above = torch.ones(len(dt), len(dt)).triu(1).bool()
    return (total - total[:, None]).exp().masked_fill(above, torch.nan)


def draw_mask() -> Figure:
    """Return the figure of the mask, for a fixed and for a selective dt."""
    n = 24
    fixed = torch.full((n,), 0.15)
    selective = torch.full((n,), 0.01)
    selective[[2, 6, 18]] = 0.6
    selective[12] = 5.0
    held = decay(selective) * selective
    panels = (
        (fixed, decay(fixed), "mask of a fixed dt"),
        (selective, decay(selective), "mask of a selective dt"),
        (selective, held / held.nansum(1, keepdim=True), "what the state holds"),
    )
    figure = Figure(figsize=(13.6, 5.2), facecolor=PAPER, layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, height_ratios=(1, 4.6))
    for index, (dt, mask, title) in enumerate(panels):
        bars, ax = axes[:, index]
        bars.bar(
            range(n), dt.clamp(max=1), color=[SELECTS if step > 0.3 else FAINT for step in dt], width=0.8
        )
        bars.set_title(title, size=12, weight="bold", color=INK)
        bars.set_ylim(0, 1.45)
        bars.spines[["top", "right"]].set_visible(False)
        for s in (dt > 1).nonzero().flatten().tolist():
            bars.text(s, 1.02, f"{dt[s]:.0f}", ha="center", size=9, color=INK)
        image = ax.imshow(mask, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="none")
        ax.set_xlabel("token s")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("dt")
    axes[1, 0].set_ylabel("time t")
    figure.colorbar(image, ax=axes[1], shrink=0.95, pad=0.01)
    return figure


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    draw_block().savefig(out / "selection.png", dpi=130, facecolor=PAPER)
    draw_mask().savefig(out / "selection_mask.png", dpi=100, facecolor=PAPER)
