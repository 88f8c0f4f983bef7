"""Repeated measurements, taken in turns, and their ratios, which are refused where noise would make them up."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OURS = "ours"
MIN_ROUNDS = 3  # a spread over fewer says nothing


@dataclass(frozen=True)
class Figure:
    """Repeated measurements of one thing, in the order in which they were taken."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        return (max(self.values) - min(self.values)) / self.median

    @property
    def steadiness(self) -> str:
        """The spread in words, or that there is none to tell."""
        n = len(self.values)
        return f"spread {self.spread:.0%}" if n >= MIN_ROUNDS else f"{n} round{'s' * (n > 1)}, spread unknown"

    def noise(self, max_spread: float) -> str | None:
        """Why this is no figure to report, or None."""
        if self.spread <= max_spread:
            return None
        return f"too noisy: the spread of {self.spread:.0%} is above {max_spread:.0%}"

    def over(self, other: Figure) -> Figure:
        """The ratio in each round; what slowed both sides of a round cancels."""
        return Figure([a / b for a, b in zip(self.values, other.values, strict=True)])


@dataclass(frozen=True)
class Repeats:
    """rounds: measurements of each side. max_spread: the largest (max - min) / median that is no noise."""

    rounds: int
    max_spread: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> Repeats:
        return cls(args.rounds, args.max_spread)


def add_round_arguments(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each side (default: {rounds})")
    parser.add_argument(
        "--max-spread",
        type=float,
        default=0.3,
        help="refuse what has a (max - min) / median over the rounds above this, figures and ratios (default: 0.3)",
    )


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Figure]:
    """Measure the sides in turn, after a warm-up of each: a machine that drifts slows all of them.

    Every second round goes backwards, A B B A ..., so that no side always follows the same other.
    """
    for run in sides.values():
        run()
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            values[name].append(sides[name]())
    return {name: Figure(rates) for name, rates in values.items()}


def best_peers(figures: Mapping[str, Figure]) -> list[str]:
    """The fastest side of each peer. A side is named after its peer and its way: "transformers sdpa"."""
    best: dict[str, str] = {}
    for name, figure in figures.items():
        peer = name.split()[0]
        if name != OURS and (peer not in best or figure.median > figures[best[peer]].median):
            best[peer] = name
    return list(best.values())


def why_not(figures: Mapping[str, Figure], name: str, max_spread: float) -> str | None:
    """Why ours / name is no ratio to report, or None."""
    ratio = figures[OURS].over(figures[name])
    if len(ratio.values) < MIN_ROUNDS:
        return f"{len(ratio.values)} rounds, at least {MIN_ROUNDS} are needed to tell the noise"
    if ratio.spread > max_spread:
        return f"too noisy to compare: the ratio's spread of {ratio.spread:.0%} is above {max_spread:.0%}"
    return None


def beside(
    title: str,
    figures: Mapping[str, Figure],
    unit: str,
    max_spread: float,
    refused: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Print each side's median and the ratio of ours to each peer's best way; the same as plain data.

    figures: rates, more is better; "ours" is one of them. refused: peers that could not be measured, and why; they
    get no ratio. A side that varied too much gets no median. Its ratio stands if both sides varied alike.
    """
    reasons = dict(refused or {})
    ratios: dict[str, Any] = {}
    for name in best_peers(figures):
        reason = why_not(figures, name, max_spread)
        if reason is None:
            ratio = figures[OURS].over(figures[name])
            ratios[name] = {"ratio": round(ratio.median, 3), "spread": round(ratio.spread, 3)}
        else:
            reasons[name] = reason
    print(title)
    for name, figure in figures.items():
        against = (
            f"  ours is {ratios[name]['ratio']:.2f}x (spread {ratios[name]['spread']:.0%})" if name in ratios else ""
        )
        rate = figure.noise(max_spread) or f"{figure.median:>10.1f} {unit} ({figure.steadiness})"
        print(f"  {name:20} {rate}{against}")
    for name, reason in reasons.items():
        print(f"  {name:20} no ratio: {reason}")
    best = {name.split()[0]: name for name in best_peers(figures) if " " in name}
    for peer, name in best.items():
        print(f"  {peer:20} its best way was {name.removeprefix(peer).strip()}")
    return {
        "unit": unit,
        "best": best,
        "medians": {name: round(figure.median, 2) for name, figure in figures.items() if not figure.noise(max_spread)},
        "spreads": {name: round(figure.spread, 3) for name, figure in figures.items()},
        "ratios": ratios,
        "refused": reasons,
    }
