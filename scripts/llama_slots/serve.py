"""Serve models over HTTP, as OpenAI's API does.

    python scripts/serve.py --model demo
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python your_program.py

Exit codes: 0 asked to end, and every request was answered; 1 could not start; 2 wrong options; 3 the engine failed;
4 asked to end, and requests were cut off (a second signal, or the time to drain was over).
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import api
from api.http.app import App
from api.http.limits import HttpLimits
from api.http.middleware import LOOPBACK, access_log
from api.http.uvicorn_server import Exit, HttpServer, listen, settle
from llama.config import EngineConfig
from llama.errors import EngineError

log = logging.getLogger("serve")

KEYS_VARIABLE = "LLAMA_API_KEYS"
PROGRAM = "python scripts/serve.py"


@dataclass(frozen=True)
class Options:
    """The command line. engine: fields of EngineConfig, which the thread that loads will check."""

    model: list[str]
    served_model_name: str | None
    alias: list[str]
    no_chat: bool
    compat: Literal["openai", "anyscale"]
    strict: bool
    special_tags: Literal["refuse", "text"]
    host: str
    port: int
    api_key: list[str]
    api_key_file: list[Path]
    slots: int
    slots_per_key: int | None
    allow_host: list[str]
    allow_origin: list[str]
    request_seconds: float
    drain_seconds: float
    log_level: str
    engine: dict[str, Any]


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Serve until asked to end; returns the exit code. program: as the command was called, for its help."""
    options = parse(argv, program)
    # stdout: one line of JSON for each request. stderr: everything that is said in words.
    level, words = options.log_level.upper(), "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, format=words, stream=sys.stderr)
    access_log.addHandler(logging.StreamHandler(sys.stdout))
    access_log.propagate = False
    try:
        keys = read_keys(options.api_key, options.api_key_file)
        server = App(
            slots=options.slots,
            slots_per_key=options.slots_per_key,
            keys=keys,
            hosts=allowed_hosts(options.host, options.allow_host, bool(keys)),
            origins=options.allow_origin,
            limits=HttpLimits(drain=options.drain_seconds, request=options.request_seconds),
        )
        socket = listen(options.host, options.port)
    except ValueError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"serve: cannot listen on {options.host}:{options.port}: {error.strerror}", file=sys.stderr)
        return Exit.CANNOT_START
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{socket.getsockname()[1]}"
    http = HttpServer(server)
    loading = Loading(options, server, http, lambda name: welcome(address, name, bool(keys)))
    loading.start()
    http.run([socket])
    if server.client is not None:
        asyncio.run(server.client.close())
    if loading.is_alive():
        os._exit(Exit.DONE)  # the thread is loading weights and cannot be asked to stop
    return Exit.CANNOT_START if loading.failed else http.exit_code


class Loading(threading.Thread):
    """Loads the models while the address already answers 503. ready: called with the first model's name."""

    def __init__(self, options: Options, server: App, http: HttpServer, ready: Callable[[str], None]) -> None:
        super().__init__(name="load", daemon=True)
        self.options, self.server, self.http, self.ready = options, server, http, ready
        self.failed = False

    def run(self) -> None:
        try:
            client = self._load()
            settle()
            self.server.client = client
            self.ready(client.served.find().name)
        except (EngineError, ValueError) as error:
            print(f"serve: {error}", file=sys.stderr)
        except BaseException as error:
            log.exception("loading failed: %r", error)
        else:
            return
        self.failed = True
        self.http.stop()

    def _load(self) -> api.AsyncClient:
        options, progress = self.options, sys.stderr.isatty()
        first, *others = options.model
        client = api.AsyncClient(
            first,
            strict=options.strict,
            compat=options.compat,
            special_tags=options.special_tags,
            chat=not options.no_chat,
            progress=progress,
            served_name=options.served_model_name,
            aliases=options.alias,
            **options.engine,
        )
        for model in others:
            client.load(model, progress=progress, **options.engine)
        return client


def welcome(address: str, model: str, keys: bool) -> None:
    """Say where the server is, and a command line that asks it."""
    header = ' -H "Authorization: Bearer $OPENAI_API_KEY"' if keys else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Say \'\\\'\'Test\'\\\'\'."}}]}}'
    print(f"Serving {model} on {address}/v1; a page to try it: {address}/", file=sys.stderr)
    print(
        f"curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'", file=sys.stderr
    )


def read_keys(given: list[str], files: list[Path]) -> list[str]:
    """Keys given as options, in files (one a line) and in the environment (with commas). Raises ValueError."""
    keys = list(given)
    for path in files:
        try:
            keys += path.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the keys in {path}") from error
    return keys + [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]


def allowed_hosts(host: str, further: list[str], keys: bool) -> tuple[str, ...] | None:
    """Host headers to answer to; None: any. Raises ValueError for a public address without a key."""
    if host in LOOPBACK:
        return (*LOOPBACK, *further)
    if not keys:
        raise ValueError(f"--host {host} is public: give at least one --api-key, or use 127.0.0.1")
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    return None if everywhere and not further else (*LOOPBACK, host, *further)


def parse(argv: list[str] | None, program: str) -> Options:
    """The options of a command line. Ends the program with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        Path(program).name,
        description=str(__doc__).replace(PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = EngineConfig()

    models = parser.add_argument_group("models")
    models.add_argument("--model", action="append", required=True, help="a checkpoint folder, or demo; repeatable")
    models.add_argument("--served-model-name", help="what answers call the first model; default: its folder's name")
    models.add_argument("--alias", action="append", default=[], help="a further name of the first model; repeatable")
    models.add_argument("--no-chat", action="store_true", help="a base model: chat requests are refused")
    models.add_argument("--compat", choices=["openai", "anyscale"], default="openai", help="the shape of answers")
    models.add_argument("--strict", action="store_true", help="refuse parameters that would be ignored")
    models.add_argument("--special-tags", choices=["refuse", "text"], default="refuse", help="[INST] in messages")

    service = parser.add_argument_group("service")
    service.add_argument("--host", default="127.0.0.1", help="a public one needs a key")
    service.add_argument("--port", type=port, default=8000, help="0: any free one")
    service.add_argument("--api-key", action="append", default=[], help=f"repeatable; or commas in ${KEYS_VARIABLE}")
    service.add_argument("--api-key-file", action="append", default=[], type=Path, help="a key a line; repeatable")
    service.add_argument("--slots", type=int, default=default.slots, help="requests in flight, for each model")
    service.add_argument("--slots-per-key", type=positive, help="default: as many as --slots")
    service.add_argument("--allow-host", action="append", default=[], help="a further Host header; repeatable")
    service.add_argument(
        "--allow-origin", action="append", default=[], help="a page's origin that may call; repeatable"
    )
    service.add_argument("--request-seconds", type=float, default=HttpLimits.request, help="for a whole request")
    service.add_argument("--drain-seconds", type=float, default=HttpLimits.drain, help="for running ones at the end")
    service.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")

    engine = parser.add_argument_group("engine", "fields of EngineConfig, under the same names")
    engine.add_argument("--device", default=default.device, help="auto, cpu, cuda or cuda:N")
    engine.add_argument("--dtype", default=default.dtype, help="auto, float32, bfloat16 or float16")
    engine.add_argument("--block-size", type=int, default=default.block_size, help="token positions in a block")
    engine.add_argument("--max-batch-tokens", type=int, default=default.max_batch_tokens, help="in one step")
    engine.add_argument("--max-batch-seqs", type=int, default=default.max_batch_seqs, help="in one step")
    engine.add_argument("--kv-memory", type=size, default=default.kv_memory, help="bytes of cache: 500M, 8G")
    engine.add_argument("--max-seq-len", type=int, default=default.max_seq_len, help="a shorter context")
    engine.add_argument("--threads", type=positive, default=default.threads, help="CPU threads of one operation")
    for name in ("prefix_cache", "batch_invariant", "cuda_graphs", "compile", "async_scheduling"):
        flag = "--" + name.replace("_", "-")
        engine.add_argument(flag, action=argparse.BooleanOptionalAction, default=getattr(default, name))
    given = vars(parser.parse_args(argv))
    # Both the server and the engine are told the number of slots.
    engine_fields = {field.name: given[field.name] for field in fields(EngineConfig)}
    others = {field.name: given[field.name] for field in fields(Options) if field.name != "engine"}
    return Options(**others, engine=engine_fields)


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def size(text: str) -> int:
    """Bytes: a whole number, or one with K, M or G behind it."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    unit = units.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)
