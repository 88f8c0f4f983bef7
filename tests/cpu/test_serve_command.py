"""`scripts/serve.py` as a process: what it says, how it ends, and what it refuses to start with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from api_cases import write_model
from server_cases import Raw, ask, get, post

from llama_slots.extras import pip_command

ROOT = Path(__file__).parents[2]
SLOW = {"model": "tiny", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file, context=4096)


def command(*options: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/serve.py"), *map(str, options)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Process:
    """A server that has said that it serves."""

    def __init__(self, *options: str | Path) -> None:
        self.process = subprocess.Popen(
            command("--port", "0", *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.said = ""
        assert self.process.stderr is not None
        while "curl" not in self.said:
            line = self.process.stderr.readline()
            assert line, f"it ended: {self.said}"
            self.said += line
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.said)
        assert found is not None
        self.port = int(found[1])

    def end(self) -> int:
        """Its exit code."""
        try:
            self.process.communicate(timeout=20)
        finally:
            self.process.kill()
        return self.process.returncode


@contextmanager
def running(*options: str | Path) -> Iterator[Process]:
    made = Process(*options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def test_it_serves_any_openai_client_and_ends_well() -> None:
    """The line of curl that it prints works as it stands."""
    with running("--model", "demo") as serve:
        assert "memory:" in serve.said
        line = serve.said[serve.said.index("curl") :].strip()
        said = subprocess.run(["bash", "-c", line.replace("curl ", "curl -s ")], capture_output=True, text=True)
        assert '"role":"assistant"' in said.stdout
        with openai.OpenAI(base_url=f"http://127.0.0.1:{serve.port}/v1", api_key="none") as client:
            answer = client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "Say 'Test'."}], temperature=0
            )
        content = answer.choices[0].message.content
        assert content == " Sure! Test. Is there anything else I can assist you with?"
        serve.process.send_signal(signal.SIGTERM)
        assert serve.end() == 0


def test_keys_from_everywhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("from-file\n\nsecond\n")
    monkeypatch.setenv("LLAMA_API_KEYS", "from-env, other")
    with running("--model", folder, "--api-key", "given", "--api-key-file", tmp_path / "keys") as serve:
        for key, status in (("given", 200), ("second", 200), ("from-env", 200), ("other", 200), ("none", 401)):
            assert ask(serve.port, get("/v1/models", {"Authorization": f"Bearer {key}"})).status == status
        assert "given" not in serve.said
        serve.process.send_signal(signal.SIGINT)
        assert serve.end() == 0


def test_two_signals_cut_off_what_runs(folder: Path) -> None:
    with running("--model", folder) as serve:
        with Raw(serve.port) as raw:
            raw.send(post("/v1/completions", SLOW)).read_until(b"data: ")
            started = time.monotonic()
            serve.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            serve.process.send_signal(signal.SIGTERM)
            assert b'"shutting_down"' in raw.read_until(b"\r\n0\r\n\r\n")
        assert serve.end() == 4
        assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--model", "/no/such/folder"], 1, "/no/such/folder"),
        (["--model", "demo", "--host", "0.0.0.0"], 2, "--api-key"),
        (["--model", "demo", "--api-key", "two words"], 2, "API key"),
        (["--model", "demo", "--api-key-file", "/no/such/file"], 2, "cannot read the keys"),
        (["--model", "demo", "--slots", "0"], 1, "slots"),
        (["--model", "demo", "--slots-per-key", "0"], 2, "at least 1"),
        (["--model", "demo", "--dtype", "int3"], 1, "dtype"),
        (["--model", "demo", "--port", "70000"], 2, "65535"),
        ([], 2, "--model"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_it_does_not_start_with(options: list[str], code: int, says: str) -> None:
    done = subprocess.run(
        command(*([] if "--port" in options else ["--port", "0"]), *options),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert says in done.stderr


# The server with a fault planted where {what} is called in the thread that loads.
FAULTY = """
import sys
import api
from llama_slots import serve
def fault(*args, **options):
    raise {error}
{what} = fault
sys.exit(serve.main())
"""


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("api.AsyncClient", "ZeroDivisionError('planted')"),
        ("serve.settle", "MemoryError('planted')"),
        ("serve.welcome", "SystemExit('planted')"),
    ],
)
def test_whatever_goes_wrong_while_loading_ends_it(folder: Path, what: str, error: str) -> None:
    """Not a server that answers 503 for ever: exit code 1, and the error with its place."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTY.format(what=what, error=error), "--port", "0", "--model", str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
        env={**environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
    )
    assert done.returncode == 1, done.stderr
    assert f"loading failed: {error}" in done.stderr
    assert "in fault" in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "h11", "prometheus_client"])
def test_a_missing_extra_is_one_line(package: str, tmp_path: Path) -> None:
    """The line names the package and the command that installs it."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('hidden', name={package!r})")
    done = subprocess.run(
        command("--model", "demo"),
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    name = package.replace("_", "-")
    assert done.stderr == f"serve.py: needs {name}, which is not installed: {pip_command('serve')}\n"


def test_a_checkout_that_python_does_not_find_is_one_line(tmp_path: Path) -> None:
    """-S leaves out what is installed, the project itself among it."""
    done = subprocess.run(
        [sys.executable, "-S", *command("--model", "demo")[1:]], cwd=tmp_path, capture_output=True, text=True, env={}
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "serve.py: needs api, which is not found: run `pip install .`" in done.stderr


def test_a_port_that_is_taken(folder: Path) -> None:
    with running("--model", folder) as serve:
        done = subprocess.run(
            command("--model", folder, "--port", str(serve.port)), capture_output=True, text=True, env=environment()
        )
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "cannot listen" in done.stderr
