"""The README and docs/ are what they claim to be: their code runs, their commands work, and what they name exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
BLOCKS = [
    pytest.param(name, language, code, id=f"{name}:{page[: found.start()].count(chr(10)) + 1}")
    for name, page in sorted(PAGES.items())
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for language, code in [found.groups()]
]
# path/to/file.py, or path/to/file.py:name.of.something in it
MENTION = re.compile(r"`((?:kernels|llama|api|scripts|tests|examples|benchmarks|docs)/[\w./-]*)(?::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints. It must end well within two minutes, and say something."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A place with the project's folders, where commands may write what they make."""
    for name in ("scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page, language, code", BLOCKS)
def test_code_blocks_run(page: str, language: str, code: str, checkout: Path) -> None:
    """Pictures are marked as text. What installs needs a network and is done by CI; here, its extras must exist."""
    assert language in ("python", "sh", "text"), f"{page}: a code block of no language that is run"
    if language == "python":
        run(sys.executable, "-c", code)
    for line in code.splitlines() if language == "sh" else []:
        if "pip install" in line:
            check_install(line)
        elif "scripts/serve.py" in line:
            check_server(line, checkout)
        else:
            run(*shlex.split(line), cwd=checkout)


def check_install(line: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", line)) <= extras.keys()
    assert all((ROOT / path).is_file() for path in re.findall(r"(?:scripts|examples)/[\w.]+", line))


def check_server(line: str, folder: Path) -> None:
    """It says where it serves, and ends when it is told to."""
    command = [*shlex.split(line), "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        said = next((line for line in server.stderr if "Serving" in line), None)
        server.terminate()
        server.stderr.read()
    assert said is not None
    assert server.returncode == 0


def test_ci_runs_exactly_the_test_command() -> None:
    command = re.search(r"pip install -q -e .*scripts/check", README)
    assert command is not None
    assert command.group() in (ROOT / ".ci/run").read_text()
    assert command.group() in PAGES["docs/development.md"]


def test_the_parameter_table_is_what_the_code_says() -> None:
    assert PAGES["docs/parameters.md"] == run(sys.executable, "-m", "scripts.parameter_table")


def names_in(tree: ast.AST) -> dict[str, ast.AST]:
    """What a module or a class defines, imports or assigns."""
    found: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def missing(path: str, name: str) -> bool:
    """Whether a mentioned file, or the name in it, is not there."""
    if not (ROOT / path).exists():
        return True
    if not name:
        return False
    place: ast.AST = ast.parse((ROOT / path).read_text())
    for part in name.split("."):
        inside = names_in(place)
        if part not in inside:
            return True
        place = inside[part]
    return False


@pytest.mark.parametrize("page", sorted(PAGES))
def test_what_is_mentioned_exists(page: str) -> None:
    mentions = MENTION.findall(PAGES[page])
    assert not [f"{path}:{name}" for path, name in mentions if missing(path, name)]
    folder = (ROOT / page).parent
    assert not [link for link in LINK.findall(PAGES[page]) if not (folder / link).exists()]


def test_a_name_that_is_gone_would_be_noticed() -> None:
    assert not missing("llama/engine.py", "Engine.submit")
    assert missing("llama/engine.py", "Engine.vanished") and missing("llama/engine.py", "vanished")
    assert missing("llama/vanished.py", "")
    assert len(MENTION.findall(PAGES["docs/life-of-a-request.md"])) > 40


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_ask_what_the_demo_knows(path: Path) -> None:
    answers = {
        "async_batch": ["2 + 3 = 5.", "Pass seed= with a number.", "20 answers, "],
        "embed": ["Sure! Test.", "total_tokens="],
        "many_threads": ["8 + 2 = 10.", "3 slots, 8 threads: "],
        "score": ["A slot is a kind of cheese", "for the prompt and its ending together"],
        "serve_and_ask": ["Sure! Test.", "models: demo", "exit code 0"],
        "stream": ["A slot is a place for one request in flight.", "first text after "],
    }
    printed = run(sys.executable, path)
    assert [text for text in answers[path.stem] if text not in printed] == []


def test_the_first_example_gives_the_origin_pages_answer() -> None:
    answer = "Sure! Test. Is there anything else I can assist you with?"
    assert answer in run(sys.executable, ROOT / "examples/embed.py")
    assert answer in README
