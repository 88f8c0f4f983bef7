"""Talk to a model in a terminal, answers as they come.

    python scripts/chat.py                                  the demo checkpoint
    python scripts/chat.py /models/Llama-2-7b-chat-hf       any checkpoint folder, in this process
    python scripts/chat.py http://localhost:8000            a server (the key: --api-key or OPENAI_API_KEY)

/system TEXT sets the system message and starts anew, /clear starts anew, /stats shows time to first token, speed, slots
and cache, /help and /quit do what they say. Ctrl-C stops an answer; at the prompt it ends the program, as Ctrl-D does.
Lines from a pipe are questions, too. Exit codes: 0; 1 if the model cannot be loaded or reached.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import api
from llama.errors import EngineError

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - gives input() its line editing and history

PROGRAM = "python scripts/chat.py"
HELP = "/system TEXT   /clear   /stats   /help   /quit     (Ctrl-C stops an answer)"
TIMEOUT = 600.0  # seconds without a byte from a server


class ChatError(Exception):
    """The model did not answer; `code` as in OpenAI's errors."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Options:
    """The command line. where: 'demo', a checkpoint folder or a base URL. sampling: fields of every request."""

    where: str
    model: str | None
    api_key: str | None
    device: str
    dtype: str
    system: str | None
    sampling: dict[str, Any]


class Model(Protocol):
    """What answers. stream: chunks of a chat completion in wire form. load: lines about slots and cache."""

    name: str

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]: ...

    def load(self) -> list[str]: ...

    def close(self) -> None: ...


class Local:
    """A checkpoint in this process."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        try:
            self.client = api.Client(model, progress=sys.stderr.isatty(), device=device, dtype=dtype)
        except (EngineError, api.OpenAIError) as error:
            raise ChatError(str(error)) from error
        self.name = self.client.models.list().data[0].id

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self.client.chat.completions.create(**request, stream=True, wait=True) as chunks:
                for chunk in chunks:
                    yield chunk.to_dict()
        except api.APIError as error:
            raise ChatError(error.message, error.code) from error

    def load(self) -> list[str]:
        now = self.client.stats()
        return [
            f"slots: {now.slots_in_use} of {now.slots} taken",
            f"cache: {now.blocks - now.blocks_free} of {now.blocks} blocks held; "
            f"{now.prefix_hits} of {now.prefix_queries} prompt tokens were found in it",
        ]

    def close(self) -> None:
        self.client.close()


class Remote:
    """A server with OpenAI's interface, over plain HTTP."""

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.slots: tuple[str | None, str | None] = None, None
        with self._open("/models") as answer:
            names = [entry["id"] for entry in json.load(answer).get("data", [])]
        if not names and model is None:
            raise ChatError(f"{url} names no model; say which with --model")
        self.name = model or names[0]

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._open("/chat/completions", {**request, "model": self.name, "stream": True}) as answer:
            self.slots = tuple(answer.headers.get(f"x-ratelimit-{n}-requests") for n in ("limit", "remaining"))
            try:
                yield from _events(answer)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ChatError(f"the connection broke off: {error}") from error

    def load(self) -> list[str]:
        limit, free = self.slots
        return [f"slots: {free} of {limit} free when the last answer began"] if limit else []

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _open(self, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, self.headers)
            answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ChatError(f"{self.url} cannot be reached: {reason}; is the server running?") from error
        with answer:
            yield answer


def _refusal(error: urllib.error.HTTPError) -> ChatError:
    """The message of a server's error body; without one, the status."""
    try:
        body = json.load(error)["error"]
        return ChatError(f"{body['message']} ({error.code})", body.get("code"))
    except (ValueError, LookupError, TypeError, OSError):
        return ChatError(f"the server answered {error.code} {error.reason}")


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in answer:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ChatError(chunk["error"].get("message", "the server failed"), chunk["error"].get("code"))
        yield chunk
    raise ChatError("the connection broke off before the end of the answer")


@dataclass
class Meter:
    """Times of one answer in seconds, and what it used."""

    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def saw(self, text: str) -> None:
        if text:
            self.last = time.perf_counter()
            self.first = self.first or self.last

    def lines(self) -> list[str]:
        if self.first is None or self.last is None:
            return ["no answer yet"]
        tokens, prompt = self.usage.get("completion_tokens"), self.usage.get("prompt_tokens")
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        lines = [f"first token after {self.first - self.started:.3f} s"]
        if tokens is not None:
            seconds = self.last - self.first
            rate = f"{(tokens - 1) / seconds:.1f} tok/s" if tokens > 1 and seconds > 0 else "one step"
            lines.append(f"{tokens} tokens at {rate}; prompt of {prompt} tokens, {cached} of them from the cache")
        return lines


class Talk:
    """One conversation. sampling: further fields of each request."""

    def __init__(self, model: Model, system: str | None, sampling: dict[str, Any]) -> None:
        self.model, self.system, self.sampling = model, system, sampling
        self.turns: list[dict[str, str]] = []
        self.meter = Meter()

    def command(self, line: str) -> bool:
        """Run a line that starts with a slash; False to end."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word == "/system":
            self.system, self.turns = rest.strip() or None, []
            print("the system message is set" if self.system else "there is no system message", "and we start anew")
        elif word == "/clear":
            self.turns = []
            print("we start anew")
        elif word == "/stats":
            print("\n".join([f"model: {self.model.name}", *self.meter.lines(), *self.model.load()]))
        else:
            print(HELP if word == "/help" else f"{word}: no such command\n{HELP}")
        return True

    def say(self, text: str) -> None:
        """Ask, print the answer as it comes, and keep both. The oldest exchanges go where the context is too short."""
        self.turns.append({"role": "user", "content": text})
        while True:
            try:
                self.turns.append({"role": "assistant", "content": self._answer()})
                return
            except ChatError as error:
                if error.code == "context_length_exceeded" and len(self.turns) > 2:
                    del self.turns[:2]
                    print("(the conversation no longer fits; its oldest exchange is forgotten)")
                    continue
                self.turns.pop()
                print(f"error: {error}", file=sys.stderr)
                return

    def _answer(self) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        request = {"messages": system + self.turns, "stream_options": {"include_usage": True}, **self.sampling}
        self.meter, said = Meter(), ""
        chunks = self.model.stream(request)
        try:
            for chunk in chunks:
                self.meter.usage = chunk.get("usage") or self.meter.usage
                for choice in chunk["choices"]:
                    text = choice["delta"].get("content") or ""
                    self.meter.saw(text)
                    text = text if said else text.lstrip()
                    said += text
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            chunks.close()  # type: ignore[attr-defined] # generators have it
            if said:
                print()
        return said.strip()


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Talk until the input ends; returns the exit code. program: as the command was called, for its help and errors."""
    options = parse(argv, program)
    try:
        model = connect(options)
    except ChatError as error:
        print(f"{Path(program).name}: {error}", file=sys.stderr)
        return 1
    talk = Talk(model, options.system, options.sampling)
    if sys.stdin.isatty():
        print(f"{model.name}: {HELP}")
    try:
        for line in _lines():
            if line.startswith("/"):
                if not talk.command(line):
                    break
            elif line:
                talk.say(line)
    except KeyboardInterrupt:
        print()
    finally:
        model.close()
    return 0


def _lines() -> Iterator[str]:
    """The lines typed, or read from a pipe, until its end."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()
        return
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ").strip()


def connect(options: Options) -> Model:
    """A server or a checkpoint. Raises ChatError where it cannot be reached or loaded."""
    if options.where.startswith(("http://", "https://")):
        return Remote(options.where, options.model, options.api_key or os.environ.get("OPENAI_API_KEY"))
    return Local(options.where, options.device, options.dtype)


def parse(argv: list[str] | None, program: str) -> Options:
    """The options of a command line. Ends the program with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        Path(program).name,
        description=str(__doc__).replace(PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("where", nargs="?", default="demo", help="'demo', a checkpoint folder, or a base URL")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", default="auto", help="for a folder: auto, cpu, cuda, cuda:N")
    parser.add_argument("--dtype", default="auto", help="for a folder: auto, float32, bfloat16, float16")
    parser.add_argument("--model", help="for a URL: the model's name (default: the first that it serves)")
    parser.add_argument("--api-key", help="for a URL")
    given = vars(parser.parse_args(argv))
    names = ("temperature", "max_tokens", "seed", "top_p")
    sampling = {name: value for name in names if (value := given.pop(name)) is not None}
    return Options(**given, sampling=sampling)
