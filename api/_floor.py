"""Imported first: refuses another distribution's `llama`. The check comes from our own folder, whatever `llama` is."""

from pathlib import Path
from runpy import run_path

run_path(str(Path(__file__).parents[1] / "llama" / "_floor.py"))["check_floor"]("llama")
