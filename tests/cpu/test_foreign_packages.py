"""Another distribution's `kernels`, `llama` or `api` in the place of ours is refused before it runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import api
import llama

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "llama", "api")
FAILS = (
    "import sys\n"
    "try:\n"
    "    import {module}\n"
    "except ImportError as error:\n"
    "    print(error)\n"
    "assert 'torch' not in sys.modules and 'foreign' not in sys.modules\n"
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder in which our three packages are installed."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (tmp_path / "llama_slots-0.1.0.dist-info").mkdir()
    (tmp_path / "llama_slots-0.1.0.dist-info" / "RECORD").write_text("".join(f"{p}/__init__.py,,\n" for p in PACKAGES))
    return tmp_path


def install_foreign(site: Path, package: str) -> None:
    """As pip does it: files are written over others of the same name, all the rest stays."""
    (site / package).mkdir(exist_ok=True)
    for name in ("__init__.py", "utils.py", "errors.py"):
        (site / package / name).write_text("import sys\nsys.modules['foreign'] = sys\n")
    info = site / f"their_{package}-2.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text(f"{package}/__init__.py,sha256=x,41\n{package}/utils.py,sha256=x,41\n")


def run(code: str, *folders: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folders[0], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "package, module",
    [("kernels", "llama"), ("kernels", "llama.errors"), ("kernels", "api"), ("llama", "api"), ("llama", "api.errors")],
)
def test_theirs_installed_over_ours(site: Path, package: str, module: str) -> None:
    install_foreign(site, package)
    said = run(FAILS.format(module=module), site)
    assert f"needs its own package '{package}', but {site / package / '__init__.py'} is another distribution's" in said
    assert f"pip uninstall their_{package}; pip install --force-reinstall --no-deps" in said


def test_their_api_over_ours_is_known_to_the_floors_beside_it(site: Path) -> None:
    install_foreign(site, "api")
    said = run(FAILS.format(module="llama._floor as floor; floor.check_floor('api')"), site)
    assert "'api'" in said and "pip uninstall their_api" in said


@pytest.mark.parametrize("package, module", [("kernels", "llama"), ("llama", "api")])
def test_theirs_taken_away_again(site: Path, package: str, module: str) -> None:
    """pip removes every file that it wrote for them, among them one that was ours before."""
    (site / package / "__init__.py").unlink()
    said = run(FAILS.format(module=module), site)
    assert f"'{package}', but {site / package} has no __init__.py" in said
    assert f"remove what is not llama-slots's from {site / package}; pip install --force-reinstall" in said


def test_theirs_found_first(site: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = tmp_path_factory.mktemp("first")
    install_foreign(first, "kernels")
    for module in ("llama", "api"):
        said = run(FAILS.format(module=module), first, site)
        assert f"{first / 'kernels' / '__init__.py'} is another distribution's" in said
        assert "pip uninstall their_kernels" in said


def test_ours_installed_over_theirs(tmp_path: Path) -> None:
    """Every file of ours is there; what is left of theirs is in nobody's way."""
    for package in PACKAGES:
        install_foreign(tmp_path, package)
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "demo"), dirs_exist_ok=True
        )
    said = run(
        "import sys, kernels, api, llama\nprint(api.__file__, api.Client, llama.Engine, 'foreign' in sys.modules)",
        tmp_path,
    )
    assert said.startswith(str(tmp_path)) and said.endswith("False\n")


def test_the_commands_refuse_their_api(site: Path) -> None:
    shutil.copytree(ROOT / "scripts" / "llama_slots", site / "llama_slots")
    assert run("import llama_slots.command as command\nprint(command.DISTRIBUTION)", site) == "llama-slots\n"
    install_foreign(site, "api")
    said = run(FAILS.format(module="llama_slots.command"), site)
    assert "needs its own package 'api'" in said and "pip uninstall their_api" in said


def test_version_and_types(site: Path) -> None:
    """Nothing needs to be installed for `__version__`; the build reads it from the same line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "llama.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", llama.__version__) and api.__version__ == llama.__version__
    assert run("import llama; print(llama.__version__)", site) == f"{llama.__version__}\n"
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]
