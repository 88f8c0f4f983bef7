"""A roofline as a picture: what the machine can do at most, and where each measured figure lies below it.

Across: multiplications and additions per byte that the work must move. Up: multiplications and additions per second.
Memory bounds the left of the roof, arithmetic the right. The sides of a comparison do the same work and stand above
each other; our share of the roof is beside the name of the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import OURS, Figure, best_peers
from llama_slots.extras import needs
from llama_slots.roofline import Card, Work

try:
    from matplotlib.figure import Figure as Drawing
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, NullFormatter
except ImportError:
    Drawing = None  # type: ignore[assignment,misc]

MARKERS = "osD^vPX*<>"
COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a")  # of peers
OUR_COLOUR = "#1f4e9c"


@dataclass(frozen=True)
class Point:
    """side: who did the work `what`. intensity: operations per byte. rate: operations per second."""

    side: str
    what: str
    intensity: float
    rate: float


def add_plot_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="draw a roofline there (.png; extra `bench`)")


def plot_file(text: str) -> Path:
    """Where to draw, for argparse. What would fail after the measurement is refused before it."""
    if Drawing is None:
        raise argparse.ArgumentTypeError(needs("matplotlib"))
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def points(what: str, figures: Mapping[str, Figure], work: Work, tokens: float, max_spread: float) -> list[Point]:
    """Ours and each peer's best way; figures: tokens/s, `tokens` of which take `work`. Noisy ones are left out."""
    names = [name for name in (OURS, *best_peers(figures)) if not figures[name].noise(max_spread)]
    intensity = work.flops / work.nbytes
    return [Point(name.split()[0], what, intensity, figures[name].median * work.flops / tokens) for name in names]


def roof(card: Card, intensity: float) -> float:
    """Operations per second that the machine reaches at most."""
    return min(card.bf16, card.bandwidth * intensity)


def draw(path: Path, title: str, machine: str, card: Card, points: Sequence[Point]) -> None:
    """Write the picture. card: ceilings measured in the run that the points come from."""
    ridge = card.bf16 / card.bandwidth
    across = [point.intensity for point in points] + [ridge]
    left, right = min(across) / 3, max(across) * 6
    low = min([point.rate / 2 for point in points] + [roof(card, left) / 2, card.bf16 / 40])
    drawing = Drawing(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = drawing.add_subplot()
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, card.bf16 * 3))
    axes.set(xlabel="operations per byte that must be moved", ylabel="operations per second")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="0.9")
    axes.plot([left, ridge, right], [roof(card, left), card.bf16, card.bf16], color="0.2", linewidth=1.5, zorder=2)
    ceilings = f"{card.bandwidth / 1e9:,.0f} GB/s read, {card.bf16 / 1e12:,.3g} T operations/s multiplied"
    axes.set_title(f"{title}\n{machine}; the roof: {ceilings}, {card.source}", fontsize=9, loc="left")
    _draw_points(axes, card, points)
    drawing.savefig(path)


def _draw_points(axes: Any, card: Card, points: Sequence[Point]) -> None:
    """Colours tell the sides apart, markers the work."""
    peers = [side for side in dict.fromkeys(point.side for point in points) if side != OURS]
    colours = {OURS: OUR_COLOUR} | {side: COLOURS[i % len(COLOURS)] for i, side in enumerate(peers)}
    markers = {what: MARKERS[i % len(MARKERS)] for i, what in enumerate(dict.fromkeys(point.what for point in points))}
    for point in points:
        ours, colour = point.side == OURS, colours[point.side]
        inside, size = (colour, 9) if ours else ("white", 7)
        marker = markers[point.what]
        at = ([point.intensity], [point.rate])
        axes.plot(*at, marker, color=colour, markersize=size, markerfacecolor=inside, zorder=4 if ours else 3)
    shares = {
        point.what: f", ours {point.rate / roof(card, point.intensity):.0%}" for point in points if point.side == OURS
    }
    handles = [Line2D([], [], color=colour, linewidth=5, label=side) for side, colour in colours.items()]
    for what, marker in markers.items():
        label = what + shares.get(what, "")
        handles.append(Line2D([], [], color="0.4", marker=marker, linestyle="", label=label))
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
