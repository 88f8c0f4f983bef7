"""`Middleware`: what every HTTP request passes on its way in and out, before and after any route.

In: limits of the head, Host and Origin, the key. Out: headers, errors in OpenAI's shape, one log line. Where there are
keys, a path that is not in OPEN needs one, whether it exists or not.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from api.errors import APIStatusError
from api.http import playground
from api.http.json_body import parse_object
from api.http.limits import HttpLimits
from api.http.request_log import RequestLog

access_log = logging.getLogger("api.access")
log = logging.getLogger("api.server")

# Paths that need no key: nothing they show is worth one.
OPEN = dict.fromkeys(playground.FILES, "playground") | {"/health": "health", "/ready": "ready"}
ENDPOINTS = OPEN | {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/models": "models",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/tokenizer_info": "tokenizer_info",
    "/openapi.json": "openapi",
    "/metrics": "metrics",
}
PREFLIGHT = (
    ("access-control-allow-methods", "GET, POST, OPTIONS"),
    ("access-control-allow-headers", "authorization, content-type, x-request-id, x-client-request-id"),
    ("access-control-max-age", "600"),
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PRINTABLE = re.compile(r"[\x20-\x7e]{1,128}")
AWAY = 5.0  # seconds after which to ask again, when nothing is served

Headers = dict[bytes, bytes]


class Keys:
    """API keys, of which only SHA-256 digests are kept. None at all: everybody may come in."""

    def __init__(self, keys: Iterable[str] = (), limit: int = HttpLimits.keys) -> None:
        texts = list(dict.fromkeys(keys))
        if len(texts) > limit:
            raise ValueError(f"{len(texts)} API keys: at most {limit}")
        for text in texts:
            if not re.fullmatch(r"[\x21-\x7e]{1,512}", text):
                raise ValueError("an API key must be 1 to 512 printable ASCII characters without spaces")
        self._digests = [hashlib.sha256(text.encode()).digest() for text in texts]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, authorization: bytes | None) -> str:
        """8 hex digits that stand for the key of an Authorization header. Raises AuthenticationError."""
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every digest is compared, each in constant time.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            what = "Incorrect API key provided." if key else "You didn't provide an API key."
            message = f"{what} Send it as 'Authorization: Bearer KEY'."
            raise errors.AuthenticationError(message, headers={"WWW-Authenticate": "Bearer"})
        return digest.hex()[:8]


@dataclass(frozen=True)
class Gate:
    """Who may come in. hosts: names for the Host header; None: any. origins: of other pages, which get CORS."""

    keys: Keys
    hosts: tuple[str, ...] | None = LOOPBACK
    origins: tuple[str, ...] = ()

    def check(self, scope: Scope, headers: Headers) -> str:
        """The key, as `Keys.find` gives it, or "". Raises PermissionDeniedError, AuthenticationError."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and _hostname(host) not in self.hosts:
            raise errors.PermissionDeniedError("This service does not answer to this Host.", code="host_not_allowed")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if b"origin" in headers and origin.lower() != f"{scope['scheme']}://{host}" and origin not in self.origins:
            raise errors.PermissionDeniedError("Pages of this Origin may not call.", code="origin_not_allowed")
        if self.keys and scope["path"] not in OPEN:
            return self.keys.find(headers.get(b"authorization"))
        return ""

    def is_foreign_page(self, headers: Headers) -> bool:
        """Whether the request comes from a page of one of `origins`."""
        return headers.get(b"origin", b"").decode("latin-1") in self.origins


@dataclass
class Incoming:
    """The body of a request, read at most once. Wraps `receive`; `finished` says whether all of it was taken."""

    receive: Receive
    finished: bool = False

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self.finished = True
        return message

    async def read(self, most: int) -> bytes:
        """The whole body. Raises 413; ClientGone."""
        parts: list[bytes] = []
        size = 0
        while not self.finished:
            message = await self()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large(most)
        return b"".join(parts)

    async def discard(self, most: int, seconds: float) -> None:
        """Take what is still on its way, within bounds, so that a client that only writes gets to read the answer."""
        with suppress(TimeoutError, APIStatusError, ClientGone):
            async with asyncio.timeout(seconds):
                await self.read(most)


class ClientGone(Exception):
    """The client hung up; nobody will read an answer."""


class Stalled(Exception):
    """The client has not read for too long."""


@dataclass
class Middleware:
    """ASGI around `app`. A route finds its request's `RequestLog` in scope["log"].

    slots: for the rate limit headers of a request, (limit, free, seconds until one is free). finished: called with the
    log of every request when its answer is out. active: requests that have not been answered to the end.
    """

    app: ASGIApp
    gate: Gate
    limits: HttpLimits
    slots: Callable[[RequestLog], tuple[int, int, float]]
    finished: Callable[[RequestLog], None]
    active: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        request_log = RequestLog(ENDPOINTS.get(path, "models" if path.startswith("/v1/models/") else "other"), path)
        incoming = Incoming(receive)
        headers = dict(scope["headers"])
        scope["log"] = request_log

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                request_log.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(request_log, incoming, headers)]
            await send(message)

        self.active += 1
        try:
            await self._serve(scope, request_log, incoming, headers, send_with_headers)
        except ClientGone:
            request_log.outcome = "gone"
        except Stalled:
            request_log.outcome = "stalled"
        except Exception:
            request_log.outcome, request_log.code = "failed", "internal_error"
            log.exception("request %s failed", request_log.request_id)
        finally:
            self.active -= 1
            self.finished(request_log)
            access_log.info("%s", json.dumps(request_log.line()))

    async def _serve(
        self, scope: Scope, request_log: RequestLog, incoming: Incoming, headers: Headers, send: Send
    ) -> None:
        try:
            _check_head(scope, request_log, headers, self.limits)
            if scope["method"] == "OPTIONS" and self.gate.is_foreign_page(headers):
                answer = Response(status_code=204, headers=dict(PREFLIGHT))
            else:
                request_log.key = self.gate.check(scope, headers)
                scope["app"] = self.app  # makes Starlette's router raise for unknown routes
                await self.app(scope, incoming, send)
                return
        except APIStatusError as error:
            answer = error_answer(error, request_log)
        except HTTPException as error:
            answer = error_answer(_no_route(error), request_log)
        except (ClientGone, Stalled):
            raise
        except Exception:
            if request_log.status:
                raise  # the answer has begun; the connection is closed
            log.exception("request %s failed", request_log.request_id)
            answer = error_answer(errors.InternalServerError("An internal error occurred."), request_log)
        if not incoming.finished and b"expect" not in headers and answer.status_code != 408:
            await incoming.discard(8 * self.limits.body, seconds=2.0)
        await answer(scope, incoming, send)

    def _headers(
        self, request_log: RequestLog, incoming: Incoming, request_headers: Headers
    ) -> Iterator[tuple[bytes, bytes]]:
        yield b"x-request-id", request_log.request_id.encode()
        if request_log.client_request_id is not None:
            yield b"x-client-request-id", request_log.client_request_id.encode()
        if request_log.path.startswith("/v1/"):
            limit, free, reset = self.slots(request_log)
            yield b"x-ratelimit-limit-requests", str(limit).encode()
            yield b"x-ratelimit-remaining-requests", str(free).encode()
            yield b"x-ratelimit-reset-requests", f"{reset:.3g}s".encode()
        if request_log.ignored:
            yield b"x-ignored-parameters", ",".join(request_log.ignored).encode()
        has_body = b"transfer-encoding" in request_headers or request_headers.get(b"content-length", b"0") != b"0"
        if not incoming.finished and has_body:
            yield b"connection", b"close"
        if self.gate.is_foreign_page(request_headers):
            yield b"access-control-allow-origin", request_headers[b"origin"]
            yield b"vary", b"Origin"
            yield b"access-control-expose-headers", b"x-request-id, retry-after, retry-after-ms, x-ignored-parameters"
        yield b"x-content-type-options", b"nosniff"


def error_answer(error: errors.APIError, request_log: RequestLog) -> Response:
    """An error as it stands on the wire; what became of the request is noted."""
    request_log.failed(error)
    status = error.status_code or 500
    headers = dict(error.headers)
    if isinstance(error, errors.RateLimitError) or status == 503:
        ms = max(1, round(1000 * (error.retry_after if isinstance(error, errors.RateLimitError) else AWAY)))
        headers |= {"Retry-After": str(-(-ms // 1000)), "retry-after-ms": str(ms)}
    elif status >= 500:
        headers["x-should-retry"] = "false"  # the same request would fail again
    return Response(json.dumps(error.to_dict()), status, headers, "application/json")


def too_large(most: int) -> APIStatusError:
    return APIStatusError(f"The body is larger than {most} bytes.", code="request_too_large", status_code=413)


async def read_object(scope: Scope, receive: Receive, limits: HttpLimits) -> dict[str, Any]:
    """The JSON object that a request brings. Raises 400, 408, 413, 415; ClientGone."""
    incoming = receive if isinstance(receive, Incoming) else Incoming(receive)
    headers = dict(scope["headers"])
    kind, _, parameters = headers.get(b"content-type", b"").decode("latin-1").lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]*)", parameters)
    plain = headers.get(b"content-encoding", b"identity").lower() == b"identity"
    if kind.strip() != "application/json" or not plain or (charset and charset[1] not in ("utf-8", "utf8")):
        message = "The body must be JSON in UTF-8, sent as 'Content-Type: application/json', without compression."
        raise APIStatusError(message, code="unsupported_media_type", status_code=415)
    if int(headers.get(b"content-length", b"0")) > limits.body:  # h11 has checked that these are digits
        raise too_large(limits.body)
    try:
        async with asyncio.timeout(max(limits.send - scope["log"].seconds, 0.0)):
            body = await incoming.read(limits.body)
    except TimeoutError as error:
        message = f"The request was not complete after {limits.send:g} seconds."
        raise APIStatusError(message, code="request_timeout", status_code=408) from error
    return parse_object(body, limits.depth)


def _check_head(scope: Scope, request_log: RequestLog, headers: Headers, limits: HttpLimits) -> None:
    lines = scope["headers"]
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) + 4 for k, v in lines)
    if len(lines) > limits.headers or size > limits.head:
        message = f"The request has more than {limits.headers} headers, or more than {limits.head} bytes of them."
        raise APIStatusError(message, code="headers_too_large", status_code=431)
    for name in (b"x-request-id", b"x-client-request-id"):
        shown = headers.get(name, b"").decode("latin-1")
        if request_log.client_request_id is None and PRINTABLE.fullmatch(shown):
            request_log.client_request_id = shown


def _no_route(error: HTTPException) -> APIStatusError:
    """Starlette's error, 404 or 405, as one of ours."""
    if error.status_code == 405:
        headers, message = dict(error.headers or {}), "This method is not allowed here."
        return APIStatusError(message, code="method_not_allowed", status_code=405, headers=headers)
    return errors.NotFoundError("There is nothing at this URL.", code="unknown_url")


def _hostname(host: str) -> str:
    """The name of a Host header, without its port; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
