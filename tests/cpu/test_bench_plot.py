"""The roofline as a picture: which points it has, and that what is missing is said before anything is measured."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import roofline_plot
from benchmarks.figures import Figure
from benchmarks.roofline_plot import Point
from llama_slots.extras import pip_command
from llama_slots.roofline import Card, Work

SCRIPTS = Path(__file__).parents[2] / "scripts"

CARD = Card(0, 100.0, 1000.0, None, "measured")


def test_points_are_ours_and_the_best_way_of_each_peer_at_the_works_intensity() -> None:
    figures = {"ours": Figure([6.0]), "peer slow": Figure([1.0]), "peer fast": Figure([3.0])}
    found = roofline_plot.points("decode", figures, Work(flops=20.0, nbytes=4.0), 2, 0.3)
    assert found == [Point("ours", "decode", 5.0, 60.0), Point("peer", "decode", 5.0, 30.0)]


def test_what_varied_too_much_has_no_point() -> None:
    figures = {"ours": Figure([1.0, 2.0, 3.0]), "peer": Figure([3.0, 3.0, 3.0])}
    assert [p.side for p in roofline_plot.points("x", figures, Work(1.0, 1.0), 1, 0.3)] == ["peer"]


def test_the_roof() -> None:
    assert (roofline_plot.roof(CARD, 4.0), roofline_plot.roof(CARD, 40.0)) == (400.0, 1000.0)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = roofline_plot.plot_file(str(tmp_path / "roof.png"))
    roofline_plot.draw(
        path, "model", "machine", CARD, [Point("ours", "decode", 1.0, 80.0), Point("peer", "x", 50, 600)]
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    roofline_plot.draw(path, "nothing was steady", "machine", CARD, [])


@pytest.mark.parametrize("name, reason", [("roof.svg", "does not end in .png"), ("no/roof.png", "there is no folder")])
def test_a_place_for_no_picture(name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline_plot, "Drawing", object)
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        roofline_plot.plot_file(str(tmp_path / name))


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["latency", "throughput", "compare"])
def test_without_matplotlib_nothing_is_measured(subject: str, tmp_path: Path) -> None:
    """The command ends at once, with the package's name; without --plot it would not have needed it."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    path = f"{tmp_path}:{SCRIPTS.parent}"
    command = [sys.executable, str(SCRIPTS / "bench.py"), subject, "--plot", str(tmp_path / "roof.png")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and done.stdout == ""
    assert f"needs matplotlib, which is not installed: {pip_command('bench')}" in done.stderr
