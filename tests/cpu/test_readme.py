"""The README's commands and code are what they claim to be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_exactly_the_test_command() -> None:
    command = re.search(r"pip install -q -e .*scripts/check", README)
    assert command is not None
    assert command.group() in (ROOT / ".ci/run").read_text()


def test_the_parameter_table_is_what_the_code_says() -> None:
    table = re.search(r"<!-- parameters: begin -->\n(.*?)\n<!-- parameters: end -->", README, re.DOTALL)
    assert table is not None
    done = subprocess.run([sys.executable, "-m", "scripts.parameter_table"], cwd=ROOT, capture_output=True, text=True)
    assert table.group(1).strip() == done.stdout.strip()


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_python_blocks_run(number: int) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_first_example_gives_the_origin_pages_answer() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/embed.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        timeout=120,
    )
    assert "Sure! Test. Is there anything else I can assist you with?" in done.stdout
