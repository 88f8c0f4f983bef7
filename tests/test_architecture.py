"""The direction of imports, and what the core may not use. Prints the longest files and functions as well."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Bottom up: a module imports only from modules above it in this list.
LLAMA = [
    "llama._floor",
    "llama.errors",
    "llama.config",
    "llama.request",
    "llama.sequence",
    "llama.blocks",
    "llama.scheduler",
    "llama.tokenizer",
    "llama.chat",
    "llama.detokenizer",
    "llama.cache",
    "llama.batch",
    "llama.model",
    "llama.weight_names",
    "llama.tensor_file",
    "llama.meta_format",
    "llama.checkpoint",
    "llama.sampler",
    "llama.graphs",
    "llama.decode_graphs",
    "llama.prompt_graphs",
    "llama.compiled",
    "llama.compiled_row",
    "llama.compiled_batch",
    "llama.runner",
    "llama.setup",
    "llama.slots",
    "llama.stream",
    "llama.loop",
    "llama.engine",
]
API = [
    "api._floor",
    "api.errors",
    "api.error",
    "api.schema",
    "api.checks",
    "api.arguments",
    "api.echo",
    "api.logprobs",
    "api.answer",
    "api.fingerprint",
    "api.served",
    "api.call",
    "api.client",
    "api.legacy",
    "api.body",
    "api.visit",
    "api.quota",
    "api.metrics",
    "api.openapi",
    "api.playground",
    "api.edge",
    "api.generate",
    "api.server",
    "api.sockets",
]
FLOORS = ["kernels", "llama", "api", "scripts"]
CORE = LLAMA[: LLAMA.index("llama.detokenizer") + 1]
CORE_MAY_NOT = {"torch", "threading", "time", "asyncio", "queue", "kernels"}


def sources() -> list[Path]:
    return sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Every module that the code names in an import, submodules in full."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            for alias in node.names:
                deeper = ROOT / Path(*module.split("."), f"{alias.name}.py")
                found.append((f"{module}.{alias.name}" if deeper.is_file() else module, node.lineno))
    return found


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_only_go_down(path: Path) -> None:
    name, tree = module_name(path), ast.parse(path.read_text())
    own_floor = FLOORS.index(name.split(".")[0])
    for target, line in imports(tree):
        floor = target.split(".")[0]
        if floor not in FLOORS:
            continue
        assert FLOORS.index(floor) <= own_floor, f"{path}:{line}: {name} imports {target}, a floor above"
        for order in (LLAMA, API):
            if name in order and target in order:
                assert order.index(target) < order.index(name), (
                    f"{path}:{line}: {name} imports {target}, which is higher"
                )


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_no_import_is_hidden(path: Path) -> None:
    """No import inside a function, and no TYPE_CHECKING block, but where names are fetched when first used."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [n.lineno for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{path}:{inner[0]}: import inside {node.name}"
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            assert path.name == "__init__.py", f"{path}:{node.lineno}: TYPE_CHECKING"


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_plain(name: str) -> None:
    path = ROOT / Path(*name.split(".")).with_suffix(".py")
    for target, line in imports(ast.parse(path.read_text())):
        assert target.split(".")[0] not in CORE_MAY_NOT, f"{path}:{line}: the core imports {target}"


def test_every_module_has_its_place() -> None:
    found = {module_name(path) for path in sources() if path.name != "__init__.py"}
    listed = {*LLAMA, *API}
    strays = {name for name in found if name.split(".")[0] in ("llama", "api")} - listed
    assert not strays, f"list these in {Path(__file__).name}: {sorted(strays)}"


def test_no_pickle_and_no_templates() -> None:
    for path in sources():
        for target, line in imports(ast.parse(path.read_text())):
            assert target.split(".")[0] not in ("pickle", "jinja2", "zmq"), f"{path}:{line}: {target}"


def test_sizes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    functions, files = [], []
    for path in sources():
        text = path.read_text()
        files.append((text.count("\n"), module_name(path)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                functions.append((length, f"{module_name(path)}.{node.name}"))
    with capsys.disabled():
        print(f"\n{sum(n for n, _ in files)} lines in {len(files)} files", file=sys.stderr)
        for kind, sizes in (("files", files), ("functions", functions)):
            longest = ", ".join(f"{name} {n}" for n, name in sorted(sizes, reverse=True)[:5])
            print(f"longest {kind}: {longest}", file=sys.stderr)
