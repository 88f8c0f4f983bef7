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
from dataclasses import fields
from pathlib import Path

import api
from api.http.app import App
from api.http.limits import HttpLimits
from api.http.middleware import LOOPBACK, access_log
from api.http.uvicorn_server import Exit, HttpServer, listen, settle
from llama.config import EngineConfig
from llama.errors import EngineError

log = logging.getLogger("serve")

KEYS_VARIABLE = "LLAMA_API_KEYS"


def main() -> int:
    args = parse()
    # One line of JSON a request goes to stdout, everything that is said in words to stderr.
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    access_log.addHandler(logging.StreamHandler(sys.stdout))
    access_log.propagate = False
    try:
        keys = read_keys(args)
        hosts = allowed_hosts(args, bool(keys))
        server = App(
            slots=args.slots,
            slots_per_key=args.slots_per_key,
            keys=keys,
            hosts=hosts,
            origins=args.allow_origin,
            limits=HttpLimits(drain=args.drain_seconds, request=args.request_seconds),
        )
        socket = listen(args.host, args.port)
    except ValueError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"serve: cannot listen on {args.host}:{args.port}: {error.strerror}", file=sys.stderr)
        return Exit.CANNOT_START
    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{socket.getsockname()[1]}"
    http = HttpServer(server)
    loading = Loading(args, server, http, lambda name: welcome(address, name, bool(keys)))
    loading.start()
    http.run([socket])
    if server.client is not None:
        asyncio.run(server.client.close())
    if loading.is_alive():
        os._exit(Exit.DONE)  # the thread is deep inside loading, and cannot be asked to stop
    return Exit.CANNOT_START if loading.failed else http.exit_code


class Loading(threading.Thread):
    """Loads the models while the address already answers 503."""

    def __init__(self, args: argparse.Namespace, server: App, http: HttpServer, ready: Callable[[str], None]) -> None:
        super().__init__(name="load", daemon=True)
        self.args, self.server, self.http, self.ready = args, server, http, ready
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
        args = self.args
        options = {field.name: getattr(args, field.name) for field in fields(EngineConfig)}
        first, *others = args.model
        client = api.AsyncClient(
            first,
            strict=args.strict,
            compat=args.compat,
            special_tags=args.special_tags,
            chat=not args.no_chat,
            progress=sys.stderr.isatty(),
            served_name=args.served_model_name,
            aliases=args.alias,
            **options,
        )
        for model in others:
            client.load(model, progress=sys.stderr.isatty(), **options)
        return client


def welcome(address: str, model: str, keys: bool) -> None:
    """Where we are, and a line that works."""
    header = ' -H "Authorization: Bearer $OPENAI_API_KEY"' if keys else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Say \'\\\'\'Test\'\\\'\'."}}]}}'
    print(f"Serving {model} on {address}/v1; a page to try it: {address}/", file=sys.stderr)
    print(
        f"curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'", file=sys.stderr
    )


def read_keys(args: argparse.Namespace) -> list[str]:
    """Keys from options, files (one a line) and the environment (separated by commas). Raises ValueError."""
    keys = list(args.api_key)
    for path in args.api_key_file:
        try:
            keys += path.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the keys in {path}") from error
    return keys + [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]


def allowed_hosts(args: argparse.Namespace, keys: bool) -> tuple[str, ...] | None:
    """Host headers to answer to; None: any. Raises ValueError for a public address without a key."""
    if args.host in LOOPBACK:
        return (*LOOPBACK, *args.allow_host)
    if not keys:
        raise ValueError(f"--host {args.host} is public: give at least one --api-key, or use 127.0.0.1")
    try:
        everywhere = ipaddress.ip_address(args.host).is_unspecified
    except ValueError:
        everywhere = False
    return None if everywhere and not args.allow_host else (*LOOPBACK, args.host, *args.allow_host)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name in ("prefix_cache", "batch_invariant", "cuda_graphs", "compile", "steps_ahead"):
        flag = "--" + name.replace("_", "-")
        engine.add_argument(flag, action=argparse.BooleanOptionalAction, default=getattr(default, name))
    return parser.parse_args()


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


if __name__ == "__main__":
    sys.exit(main())
