"""The command of an installed project, `llama-slots`: its names, its help, and what of it is installed."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

from llama_slots import command, extras

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    try:
        code = command.main(list(argv))
    except SystemExit as end:
        code = int(end.code or 0)
    output = capsys.readouterr()
    return code, output.out + output.err


def test_the_program_tells_its_commands_and_its_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = printed(capsys, "--help")
    assert code == 0 and all(f"llama-slots {name}" in text for name in command.MODULES)
    monkeypatch.setattr(command, "installed_version", lambda: "1.2.3")
    assert printed(capsys, "--version") == (0, "llama-slots 1.2.3\n")


@pytest.mark.parametrize("argv", [(), ("sevre",), ("--model", "demo")])
def test_a_wrong_command_is_refused_with_the_right_ones(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    code, text = printed(capsys, *argv)
    assert code == 2 and "usage: llama-slots" in text


@pytest.mark.parametrize("name", command.MODULES)
def test_help_speaks_of_the_program_that_was_called(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, installed = printed(capsys, name, "--help")
    assert code == 0 and f"usage: llama-slots {name}" in installed
    assert f"    llama-slots {name}" in installed and "python scripts/" not in installed
    with pytest.raises(SystemExit):
        command.run(name, ["--help"], f"python scripts/{name}.py")
    checkout = capsys.readouterr().out
    assert f"usage: {name}.py" in checkout and f"    python scripts/{name}.py" in checkout


def test_errors_speak_of_the_program_that_was_called(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert printed(capsys, "weights", "inspect", missing)[1].startswith("llama-slots weights inspect: ")
    assert printed(capsys, "chat", missing)[1].startswith("llama-slots chat: ")
    command.run("chat", [missing], "python scripts/chat.py")
    assert capsys.readouterr().err.startswith("chat.py: ")


@pytest.mark.parametrize(("installed", "what"), [("0.1.0", "llama-slots"), (None, ".")])
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, what: str
) -> None:
    monkeypatch.setattr(extras, "installed_version", lambda: installed)
    assert extras.needs("gguf.constants") == f"needs gguf, which is not installed: pip install '{what}[gguf]'"
    assert extras.needs("prometheus_client").startswith("needs prometheus-client, which is not installed: pip ")
    assert extras.needs("torch") == "needs torch, which is not installed: run `pip install .` in the checkout"
    assert extras.needs("llama.engine").startswith("needs llama, which is not found: run `pip install .`")


def test_every_extra_that_is_named_brings_its_packages() -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    for extra, packages in extras.EXTRAS.items():
        for package in packages:
            assert any(requirement.startswith(package) for requirement in optional[extra]), (extra, package)


def test_what_is_installed_is_whole() -> None:
    """Every package of the command is listed, and the entry point leads to it."""
    setuptools = PROJECT["tool"]["setuptools"]
    folder = ROOT / setuptools["package-dir"]["llama_slots"]
    packages = {
        ".".join(("llama_slots", *path.parent.relative_to(folder).parts)) for path in folder.rglob("__init__.py")
    }
    assert packages == {name for name in setuptools["packages"] if name.startswith("llama_slots")}
    module, function = PROJECT["project"]["scripts"]["llama-slots"].split(":")
    assert getattr(importlib.import_module(module), function) is command.main
