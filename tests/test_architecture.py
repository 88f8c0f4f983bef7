"""The direction of imports, and what the core may not use. Prints the longest files and functions as well."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Bottom up: a module imports only from modules above it in this list.
KERNELS = [
    "kernels.launch",
    "kernels.transfer",
    "kernels.attention_plan",
    "kernels.linear_weight",
    "kernels.reference",
    "kernels.tiles",
    "kernels.attention",
    "kernels.matmul",
    "kernels.rms_norm",
    "kernels.rope_cache",
    "kernels.sample",
    "kernels.swiglu",
    "kernels.triton_ops",
    "kernels.cpu.huge_pages",
    "kernels.cpu.block_attention",
    "kernels.cpu.attention_plan",
    "kernels.cpu.packed_linear",
    "kernels.cpu.ops",
]
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
    "llama.sampler",
    "llama.batch",
    "llama.model",
    "llama.weight_names",
    "llama.tensor_file",
    "llama.meta_format",
    "llama.checkpoint",
    "llama.graphs",
    "llama.runner",
    "llama.cpu.compile",
    "llama.cpu.one_row",
    "llama.cpu.many_rows",
    "llama.cpu.executor",
    "llama.setup",
    "llama.slots",
    "llama.stream",
    "llama.delivery",
    "llama.loop",
    "llama.engine",
]
API = [
    "api._floor",
    "api.errors",
    "api.schema",
    "api.checks",
    "api.arguments",
    "api.prompt",
    "api.logprobs",
    "api.answer",
    "api.fingerprint",
    "api.models",
    "api.request",
    "api.chunk_stream",
    "api.client",
    "api.legacy.error",
    "api.legacy",
    # Only the server's, and above everything else: no other module of api imports one of these.
    "api.http.json_body",
    "api.http.limits",
    "api.http.request_log",
    "api.http.retry_after",
    "api.http.metrics",
    "api.http.openapi",
    "api.http.playground",
    "api.http.middleware",
    "api.http.completions",
    "api.http.app",
    "api.http.uvicorn_server",
]
# The packages in scripts/, whose modules are imported without that folder's name.
SCRIPTS = [
    "llama_slots.extras",
    "llama_slots.roofline",
    "llama_slots.weights.gguf_file",
    "llama_slots.weights.source",
    "llama_slots.weights.target",
    "llama_slots.weights.forms",
    "llama_slots.weights.write",
    "llama_slots.weights.verify",
    "llama_slots.weights.plan",
    "llama_slots.weights.load",
    "llama_slots.weights.command",
    "llama_slots.chat",
    "llama_slots.serve",
    "llama_slots.command",
    "benchmarks.figures",
    "benchmarks.roofline_plot",
    "benchmarks.machine",
    "benchmarks.model",
    "benchmarks.sides",
    "benchmarks.remote",
    "benchmarks.llama_cpp",
    "benchmarks.peers",
    "benchmarks.continuous",
    "benchmarks.card_peers",
    "benchmarks.fake_runner",
    "benchmarks.http_load",
    "benchmarks.gpu_timer",
    "benchmarks.inspect_sass",
    "benchmarks.tune_tiles",
    "benchmarks.ceilings",
    "benchmarks.compare",
    "benchmarks.idle",
    "benchmarks.invariance",
    "benchmarks.kernels",
    "benchmarks.latency",
    "benchmarks.offline",
    "benchmarks.overhead",
    "benchmarks.prefix",
    "benchmarks.serve",
    "benchmarks.slots",
    "benchmarks.throughput",
    "benchmarks.all",
    "demo.text",
]
FOLDERS = ["kernels", "llama", "api", "scripts"]
FLOORS = ["kernels", "llama", "api", "llama_slots", "benchmarks", "demo", "scripts"]
CORE = LLAMA[: LLAMA.index("llama.detokenizer") + 1]
CORE_MAY_NOT = {"torch", "threading", "time", "asyncio", "queue", "kernels"}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    packaged = parts[0] == "scripts" and len(parts) > 2
    return ".".join(parts[packaged:]).removesuffix(".__init__")


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
                deeper = Path(*module.split("."), f"{alias.name}.py")
                is_module = any((root / deeper).is_file() for root in (ROOT, ROOT / "scripts"))
                found.append((f"{module}.{alias.name}" if is_module else module, node.lineno))
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
        for order in (KERNELS, LLAMA, API, SCRIPTS):
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


def test_only_the_package_itself_picks_an_implementation() -> None:
    """Who reads the textbook or the CUDA path meets no CPU tuning, and the CPU path no Triton."""
    for name in KERNELS:
        for target, line in imports(ast.parse((ROOT / Path(*name.split("."))).with_suffix(".py").read_text())):
            assert target != "kernels.triton_ops", f"{name}:{line}: only kernels/__init__.py picks an implementation"
            inside = name.startswith("kernels.cpu.") or not target.startswith("kernels.cpu")
            assert inside, f"{name}:{line}: only kernels/__init__.py imports {target}"


def test_every_module_has_its_place() -> None:
    found = {module_name(path) for path in sources() if path.name != "__init__.py"}
    listed = {*KERNELS, *LLAMA, *API, *SCRIPTS}
    strays = {name for name in found if name.split(".")[0] != "scripts"} - listed
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
