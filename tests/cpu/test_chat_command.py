"""scripts/chat.py with the demo in process, and with a server that a few lines here pretend to be."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llama_slots import chat

ROOT = Path(__file__).parents[2]

Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Type lines into the program: (exit code, what it printed, what it printed as errors)."""

    def run(lines: list[str], *args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        code = chat.main([*args])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


class Server(ThreadingHTTPServer):
    """Answers each question with its words in upper case; requests are kept. faults: what to do instead, in turn."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.faults: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "shouter"}]})

    def reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def event(self, body: Any) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "full":
            return self.reply(429, {"error": {"message": "all 30 slots are taken", "code": "rate_limit_exceeded"}})
        if fault == "long":
            return self.reply(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
        if fault == "nonsense":
            return self.reply(500, ["?"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("x-ratelimit-limit-requests", "30")
        self.send_header("x-ratelimit-remaining-requests", "29")
        self.end_headers()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        self.wfile.write(b": a comment\n\n")
        for word in body["messages"][-1]["content"].upper().split():
            self.event({"choices": [{"index": 0, "delta": {"content": f" {word}"}}]})
            if fault == "cut":
                return None
            if fault == "error":
                return self.event({"error": {"message": "the engine stopped"}})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        return None


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


# --- in process -------------------------------------------------------------------------------------------------


def test_the_demo_answers(talk: Talk) -> None:
    code, out, err = talk(["Say 'Test'.", "/stats", "/quit", "never asked"], "--temperature", "0")
    assert (code, err) == (0, "")
    assert out.startswith("Sure! Test. Is there anything else I can assist you with?\n")
    for part in ("model: demo", "first token after", "tok/s", "slots: 0 of 30 taken", "cache: ", "prompt tokens"):
        assert part in out
    assert out.count("\n") == 6


def test_a_system_message_and_the_end_of_the_input(talk: Talk) -> None:
    code, out, _ = talk(["/system You are a pirate.", "What is a slot?"], "--temperature", "0")
    assert code == 0 and out.splitlines()[1].startswith("Arr")
    assert talk(["What is a slot?"], "--temperature", "0", "--system", "You are a pirate.")[1].startswith("Arr")


def test_bad_options_and_tags_are_errors_of_one_answer(talk: Talk) -> None:
    code, out, err = talk(["[INST] hi", "Say 'Test'."], "--temperature", "0")
    assert code == 0 and "error: " in err and "Test" in out
    assert "error: " in talk(["hi"], "--temperature", "9")[2]


def test_no_model_there(talk: Talk, tmp_path: Path) -> None:
    code, _, err = talk(["hi"], str(tmp_path / "nowhere"))
    assert code == 1 and err.startswith("chat.py: ") and "nowhere" in err
    assert talk(["hi"], str(tmp_path))[0] == 1


# --- over HTTP --------------------------------------------------------------------------------------------------


def test_a_server_answers_and_hears_the_whole_conversation(talk: Talk, server: Server) -> None:
    lines = ["hello there", "/stats", "and again", "/system be loud", "third", "/clear", "fourth"]
    code, out, err = talk(lines, server.url + "/v1/", "--api-key", "k", "--seed", "7", "--max-tokens", "5")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "HELLO THERE"
    assert "2 tokens at" in out and "prompt of 9 tokens, 4 of them from the cache" in out
    assert "slots: 29 of 30 free when the last answer began" in out
    paths, headers, bodies = zip(*server.requests, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    assert headers[0]["Authorization"] == "Bearer k"
    user, assistant, system = ({"role": role} for role in ("user", "assistant", "system"))
    assert [body["messages"] for body in bodies] == [
        [user | {"content": "hello there"}],
        [user | {"content": "hello there"}, assistant | {"content": "HELLO THERE"}, user | {"content": "and again"}],
        [system | {"content": "be loud"}, user | {"content": "third"}],
        [system | {"content": "be loud"}, user | {"content": "fourth"}],
    ]
    assert {key: bodies[0][key] for key in ("model", "seed", "max_tokens", "stream")} == {
        "model": "shouter", "seed": 7, "max_tokens": 5, "stream": True,
    }  # fmt: skip
    assert "temperature" not in bodies[0]


def test_the_models_name_can_be_given(talk: Talk, server: Server) -> None:
    talk(["hi"], server.url, "--model", "other")
    assert server.requests[0][2]["model"] == "other"


def test_a_refused_question_is_not_part_of_the_conversation(talk: Talk, server: Server) -> None:
    server.faults = ["full", "", "nonsense", "cut", "error"]
    code, _, err = talk(["one", "two", "three", "four words", "five"], server.url)
    assert code == 0
    assert err.splitlines() == [
        "error: all 30 slots are taken (429)",
        "error: the server answered 500 Internal Server Error",
        "error: the connection broke off before the end of the answer",
        "error: the engine stopped",
    ]
    assert [len(body["messages"]) for _, _, body in server.requests] == [1, 1, 3, 3, 3]


def test_what_no_longer_fits_is_forgotten_from_the_oldest_on(talk: Talk, server: Server) -> None:
    server.faults = ["", "", "long", "long", "", "long"]
    _, out, err = talk(["one", "two", "three", "/clear", "four"], server.url)
    assert out.count("its oldest exchange is forgotten") == 2
    assert [len(body["messages"]) for _, _, body in server.requests] == [1, 3, 5, 3, 1, 1]
    assert err == "error: too long (400)\n"


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    talk: Talk, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    saw = chat.Meter.saw

    def interrupted(self: chat.Meter, text: str) -> None:
        saw(self, text)
        if "STOP" in text:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat.Meter, "saw", interrupted)
    code, out, _ = talk(["go on and stop now", "next"], server.url)
    assert code == 0 and out.splitlines() == ["GO ON AND [stopped]", "NEXT"]
    assert server.requests[1][2]["messages"][1] == {"role": "assistant", "content": "GO ON AND"}


def test_no_server_there(talk: Talk, server: Server) -> None:
    code, _, err = talk(["hi"], "http://127.0.0.1:1")
    assert code == 1 and "cannot be reached" in err and "is the server running?" in err
    assert talk(["hi"], "http://[::1")[0] == 1


def test_help_and_unknown_commands(talk: Talk, server: Server) -> None:
    _, out, _ = talk(["/help", "/dance", "", "/stats"], server.url)
    assert out.count("/system TEXT") == 2 and "/dance: no such command" in out and "no answer yet" in out
