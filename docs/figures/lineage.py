"""Draw docs/figures/lineage.png, the line of models, from the registry.

python docs/figures/lineage.py [OUT.png]     (needs the extra: plot)
"""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from longscan.models import MODELS as LINE

INK, PAPER, FAINT = "#1F2933", "#FFFFFF", "#9AA5B1"
RECURRENT, ATTENTION, STATE_SPACE, CONVOLUTION = "#CC79A7", "#0072B2", "#009E73", "#E69F00"

KINDS = {
    "recurrent": RECURRENT,
    "attention": ATTENTION,
    "state space": STATE_SPACE,
    "convolution": CONVOLUTION,
}

# name: label, what its memory is, column, row, colour
MODELS = {
    "lstm": ("LSTM", "a gated cell", 0, 1.5, RECURRENT),
    "seq2seq": ("Seq2Seq", "one vector per layer", 1, 0, RECURRENT),
    "bahdanau": ("Bahdanau", "a soft alignment", 2, 0, ATTENTION),
    "luong": ("Luong", "scored by a product", 3, 0, ATTENTION),
    "transformer": ("Transformer", "every pair of tokens", 4, 0, ATTENTION),
    "bert": ("BERT", "context on both sides", 5, -1, ATTENTION),
    "vit": ("ViT", "every pair of patches", 6, -1, ATTENTION),
    "llama": ("Llama", "rotary positions", 7, 0, ATTENTION),
    "linear_attention": ("Linear attn.", "a sum of k vᵀ", 5, 1, ATTENTION),
    "gau": ("GAU", "attention with a gate", 6, 1, ATTENTION),
    "hippo": ("HiPPO", "best polynomial fit", 1, 3, STATE_SPACE),
    "lssl": ("LSSL", "learned, linear", 2, 3, STATE_SPACE),
    "s4": ("S4", "in O(N + L)", 3, 3, STATE_SPACE),
    "s4d": ("S4D", "a diagonal A", 4, 3, STATE_SPACE),
    "h3": ("H3", "compares tokens", 6, 2, STATE_SPACE),
    "mamba": ("Mamba", "a state that selects", 7, 1.5, STATE_SPACE),
    "vim": ("Vim", "from both ends", 8, 2, STATE_SPACE),
    "videomamba": ("VideoMamba", "all frames at once", 9, 2, STATE_SPACE),
    "vmamba": ("VMamba", "scanned four ways", 8, 1, STATE_SPACE),
    "mamba2": ("Mamba-2", "a decay per head", 8, 0, STATE_SPACE),
    "mamba3": ("Mamba-3", "a state that turns", 9, 0, STATE_SPACE),
    "hybrid": ("Hybrids", "a few layers attend", 9, -1, STATE_SPACE),
    "zamba2": ("Zamba2", "one shared attention", 10, -1, STATE_SPACE),
    "hyena": ("Hyena", "a long implicit filter", 7, 3, CONVOLUTION),
    "resnet": ("ResNet", "a sum over layers", 2, 1.5, CONVOLUTION),
    "cnn": ("CNN", "a dilated window", 3, 1.5, CONVOLUTION),
}
X, Y, WIDTH, HEIGHT = 2.3, 1.12, 1.98, 0.8


def centre(name: str) -> tuple[float, float]:
    """The middle of a model's box."""
    _, _, column, row, _ = MODELS[name]
    return column * X, -row * Y


def arrow(ax: Axes, parent: str, child: str) -> None:
    """Draw from a parent to a child, from edge to edge."""
    (x0, y0), (x1, y1) = centre(parent), centre(child)
    start = (x0 + WIDTH / 2, y0)
    ax.annotate(
        "",
        xy=(x1 - WIDTH / 2, y1),
        xytext=start,
        arrowprops={"arrowstyle": "-|>", "color": FAINT, "lw": 1.3, "shrinkA": 1, "shrinkB": 1},
        zorder=1,
    )


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(18.2, 4.5), facecolor=PAPER)
    ax = figure.add_axes((0.005, 0.02, 0.99, 0.96))
    for entry in LINE.values():
        label, memory, _, _, colour = MODELS[entry.name]
        x, y = centre(entry.name)
        star = entry.name == "mamba"
        ax.add_patch(
            FancyBboxPatch(
                (x - WIDTH / 2, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=colour if star else PAPER,
                edgecolor=colour,
                lw=2,
                zorder=2,
            )
        )
        ink = PAPER if star else INK
        style = {"ha": "center", "va": "center", "color": ink, "zorder": 3}
        ax.text(x, y + 0.14, f"{label} {entry.year}", size=9.5, weight="bold", **style)
        ax.text(x, y - 0.18, memory, size=8.7, **style)
        for parent in entry.parents:
            if MODELS[parent][2] < MODELS[entry.name][2]:
                arrow(ax, parent, entry.name)
    for index, (kind, colour) in enumerate(KINDS.items()):
        y = Y * 1.12 - 0.27 * index
        ax.plot(-0.75, y, marker="s", ms=8, color=colour)
        ax.text(-0.58, y, kind, va="center", size=9.5, color=INK)
    title = "What does a sequence model remember of the past?"
    ax.text(1.3, Y * 1.12, title, size=14, weight="bold", color=INK, va="center")
    ax.set_xlim(-1.05, 10 * X + 1.05)
    ax.set_ylim(-3.5 * Y, 1.55 * Y)
    ax.axis("off")
    return figure


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("lineage.png")
    draw().savefig(out, dpi=130, facecolor=PAPER)
