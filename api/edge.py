"""`Edge`: what every HTTP request passes on its way in and out, before and after any route.

In: limits of the head, Host and Origin, the key. Out: the headers that every answer has, errors in OpenAI's shape, one
log line. Denies by default: a path that is not in OPEN needs a key when there are keys, whether it exists or not.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import playground
from api.body import parse_object
from api.errors import (
    APIError,
    APIStatusError,
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
)
from api.visit import EdgeLimits, Visit

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
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PRINTABLE = re.compile(r"[\x20-\x7e]{1,128}")
AWAY = 5.0  # seconds after which to ask again, when nothing is served


class Keys:
    """API keys, of which only SHA-256 digests are kept. None at all: everybody may come in."""

    def __init__(self, keys: Iterable[str] = (), limit: int = EdgeLimits.keys) -> None:
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
        known = [hmac.compare_digest(digest, one) for one in self._digests]
        if scheme.lower() != b"bearer" or not any(known):
            what = "Incorrect API key provided." if key else "You didn't provide an API key."
            headers = {"WWW-Authenticate": "Bearer"}
            raise AuthenticationError(f"{what} Send it as 'Authorization: Bearer KEY'.", headers=headers)
        return digest.hex()[:8]


@dataclass(frozen=True)
class Gate:
    """Who may come in. hosts: names that the Host header may have; None: any. origins: of browser pages besides our
    own, for which CORS is switched on."""

    keys: Keys
    hosts: tuple[str, ...] | None = LOOPBACK
    origins: tuple[str, ...] = ()

    def check(self, scope: Scope, visit: Visit, headers: dict[bytes, bytes]) -> None:
        """Raises PermissionDeniedError, AuthenticationError; notes the key in the visit."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and _name(host) not in self.hosts:
            raise PermissionDeniedError("This service does not answer to this Host.", code="host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and not self._is_known(origin.decode("latin-1"), scope["scheme"], host):
            raise PermissionDeniedError("Pages of this Origin may not call.", code="origin_not_allowed")
        if self.keys and scope["path"] not in OPEN:
            visit.key = self.keys.find(headers.get(b"authorization"))

    def _is_known(self, origin: str, scheme: str, host: str) -> bool:
        return origin in self.origins or origin.lower() == f"{scheme}://{host}"


class Incoming:
    """The body of a request, read at most once. Wraps `receive`; `finished` says whether all of it was taken."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.finished = False

    async def __call__(self) -> Message:
        message = await self._receive()
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
        try:
            async with asyncio.timeout(seconds):
                await self.read(most)
        except (TimeoutError, APIStatusError, ClientGone):
            pass


class ClientGone(Exception):
    """The client hung up; nobody will read an answer."""


class Stalled(Exception):
    """The client has not read for too long."""


class Edge:
    """ASGI around `app`. slots: for the rate limit headers of a visit, (limit, free, seconds until one is free).

    finished: called with every visit when its answer is out.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        limits: EdgeLimits,
        slots: Callable[[Visit], tuple[int, int, float]],
        finished: Callable[[Visit], None],
    ) -> None:
        self.app, self.gate, self.limits = app, gate, limits
        self._slots, self._finished = slots, finished
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        visit = Visit(ENDPOINTS.get(path, "models" if path.startswith("/v1/models/") else "other"), path)
        incoming = Incoming(receive)
        headers = dict(scope["headers"])
        scope["visit"] = visit

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(visit, incoming, headers)]
            await send(message)

        self.active += 1
        try:
            await self._serve(scope, visit, incoming, headers, send_with_headers)
        except ClientGone:
            visit.outcome = "gone"
        except Stalled:
            visit.outcome = "stalled"
        except Exception:
            visit.outcome, visit.code = "failed", "internal_error"
            log.exception("request %s failed", visit.request_id)
        finally:
            self.active -= 1
            self._finished(visit)
            access_log.info("%s", json.dumps(visit.log_line()))

    async def _serve(
        self, scope: Scope, visit: Visit, incoming: Incoming, headers: dict[bytes, bytes], send: Send
    ) -> None:
        try:
            _check_head(scope, visit, headers, self.limits)
            if scope["method"] == "OPTIONS" and headers.get(b"origin", b"").decode("latin-1") in self.gate.origins:
                answer = Response(status_code=204, headers=dict(_preflight()))
            else:
                self.gate.check(scope, visit, headers)
                scope["app"] = self.app  # makes Starlette's router raise for unknown routes, and not answer
                await self.app(scope, incoming, send)
                return
        except APIStatusError as error:
            answer = error_answer(error, visit)
        except HTTPException as error:
            answer = error_answer(_no_route(error), visit)
        except (ClientGone, Stalled):
            raise
        except Exception:
            if visit.status:
                raise  # the answer has begun; the connection is closed
            log.exception("request %s failed", visit.request_id)
            answer = error_answer(internal_error(), visit)
        if not incoming.finished and b"expect" not in headers and answer.status_code != 408:
            await incoming.discard(8 * self.limits.body, seconds=2.0)
        await answer(scope, incoming, send)

    def _headers(
        self, visit: Visit, incoming: Incoming, request_headers: dict[bytes, bytes]
    ) -> Iterator[tuple[bytes, bytes]]:
        yield b"x-request-id", visit.request_id.encode()
        if visit.client_request_id is not None:
            yield b"x-client-request-id", visit.client_request_id.encode()
        if visit.path.startswith("/v1/"):
            limit, free, reset = self._slots(visit)
            yield b"x-ratelimit-limit-requests", str(limit).encode()
            yield b"x-ratelimit-remaining-requests", str(free).encode()
            yield b"x-ratelimit-reset-requests", f"{reset:.3g}s".encode()
        if visit.ignored:
            yield b"x-ignored-parameters", ",".join(visit.ignored).encode()
        if not incoming.finished and _has_body(request_headers):
            yield b"connection", b"close"
        if request_headers.get(b"origin", b"").decode("latin-1") in self.gate.origins:
            yield b"access-control-allow-origin", request_headers[b"origin"]
            yield b"vary", b"Origin"
            yield b"access-control-expose-headers", b"x-request-id, retry-after, retry-after-ms, x-ignored-parameters"
        yield b"x-content-type-options", b"nosniff"


def error_answer(error: APIError, visit: Visit) -> Response:
    """An error as it stands on the wire; what became of the visit is noted."""
    visit.note(error)
    status = error.status_code or 500
    headers = dict(error.headers)
    if isinstance(error, RateLimitError):
        headers |= retry_headers(error.retry_after)
    elif status == 503:
        headers |= retry_headers(AWAY)
    elif status >= 500:
        headers["x-should-retry"] = "false"  # the same request would fail again
    return Response(json.dumps(error.to_dict()), status, headers, "application/json")


def _no_route(error: HTTPException) -> APIStatusError:
    if error.status_code == 405:
        return APIStatusError(
            "This method is not allowed here.",
            code="method_not_allowed",
            status_code=405,
            headers=dict(error.headers or {}),
        )
    return NotFoundError("There is nothing at this URL.", code="unknown_url")


def retry_headers(seconds: float) -> dict[str, str]:
    ms = max(1, round(seconds * 1000))
    return {"Retry-After": str(-(-ms // 1000)), "retry-after-ms": str(ms)}


def internal_error() -> APIStatusError:
    return APIStatusError("An internal error occurred.", type="server_error", code="internal_error", status_code=500)


def too_large(most: int) -> APIStatusError:
    return APIStatusError(f"The body is larger than {most} bytes.", code="request_too_large", status_code=413)


async def read_object(scope: Scope, receive: Receive, visit: Visit, limits: EdgeLimits) -> dict[str, Any]:
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
        async with asyncio.timeout(max(limits.send - visit.seconds, 0.0)):
            body = await incoming.read(limits.body)
    except TimeoutError as error:
        message = f"The request was not complete after {limits.send:g} seconds."
        raise APIStatusError(message, code="request_timeout", status_code=408) from error
    return parse_object(body, limits.depth)


def _check_head(scope: Scope, visit: Visit, headers: dict[bytes, bytes], limits: EdgeLimits) -> None:
    lines = scope["headers"]
    size = (
        len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) + 4 for name, value in lines)
    )
    if len(lines) > limits.headers or size > limits.head:
        message = f"The request has more than {limits.headers} headers, or more than {limits.head} bytes of them."
        raise APIStatusError(message, code="headers_too_large", status_code=431)
    for name in (b"x-request-id", b"x-client-request-id"):
        shown = headers.get(name, b"").decode("latin-1")
        if visit.client_request_id is None and PRINTABLE.fullmatch(shown):
            visit.client_request_id = shown


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _name(host: str) -> str:
    """The name of a Host header, without its port; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _preflight() -> Iterator[tuple[str, str]]:
    yield "access-control-allow-methods", "GET, POST, OPTIONS"
    yield "access-control-allow-headers", "authorization, content-type, x-request-id, x-client-request-id"
    yield "access-control-max-age", "600"
