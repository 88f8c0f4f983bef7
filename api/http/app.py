"""`App`: OpenAI's routes over HTTP, as an ASGI application around one `AsyncClient`.

A request here and a call of the client take the same way (fields, `Request`, `Running`, `Answer`), so their JSON is
equal. Sockets and signals are in `api.http.uvicorn_server`; `scripts/serve.py` starts a server.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

import llama
from api.checks import missing
from api.client import AsyncClient
from api.errors import NotFoundError, RateLimitError, ServiceUnavailableError, bad_type, translated
from api.http import playground
from api.http.completions import Completions
from api.http.limits import HttpLimits
from api.http.metrics import Metrics
from api.http.middleware import AWAY, LOOPBACK, Gate, Keys, Middleware, read_object
from api.http.openapi import PATHS, document
from api.http.request_log import RequestLog
from api.http.retry_after import RetryAfter
from api.models import ServedModel
from api.schema import Object
from llama.slots import Seat, Slots


class App:
    """client: None while the models are loading; set it when they are. slots: of the models, and of each key.

    keys, hosts and origins: who may come in, see `Gate`.
    """

    def __init__(
        self,
        client: AsyncClient | None = None,
        *,
        slots: int = 30,
        slots_per_key: int | None = None,
        keys: Iterable[str] = (),
        hosts: Sequence[str] | None = LOOPBACK,
        origins: Sequence[str] = (),
        limits: HttpLimits | None = None,
    ) -> None:
        self.client = client
        self.draining = False
        self.limits = limits or HttpLimits()
        self.metrics = Metrics()
        self._slots, self._slots_per_key = slots, slots_per_key or slots
        self._by_key: dict[str, Slots] = {}
        self._retry_after = RetryAfter()
        gate = Gate(Keys(keys, self.limits.keys), None if hosts is None else tuple(hosts), tuple(origins))
        self._middleware = Middleware(self._routes(), gate, self.limits, self._slots_of, self.metrics.finished)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._middleware(scope, receive, send)

    @property
    def active(self) -> int:
        """How many requests have not been answered to the end."""
        return self._middleware.active

    @property
    def failed(self) -> bool:
        """Whether an engine stopped without being asked to."""
        return any(not model.engine.serving for model in self._models())

    def serving(self) -> AsyncClient:
        """The client. Raises ServiceUnavailableError while nothing is served."""
        if self.draining:
            raise ServiceUnavailableError("The service is shutting down.", code="shutting_down")
        if self.client is None:
            raise ServiceUnavailableError("The model is loading.", code="model_loading")
        return self.client

    @contextmanager
    def seat(self, log: RequestLog, model: ServedModel) -> Iterator[None]:
        """One of the key's slots, while the answer is made and written. Raises RateLimitError."""
        seat: Seat | None = None
        try:
            with translated():
                seat = self._slots_of_key(log.key).acquire()
            if not model.engine.slots.in_use:
                self._retry_after.forget()
            yield
        except RateLimitError as error:
            error.retry_after = self._retry_after.seconds(model.engine.expected_wait)
            self.metrics.refused("key" if seat is None else "slots")
            raise
        finally:
            if seat is not None:
                seat.release()

    def _models(self) -> list[ServedModel]:
        return [] if self.client is None else self.client.served.all()

    def _slots_of_key(self, key: str) -> Slots:
        """Keys are known ones, so their number is bounded."""
        return self._by_key.setdefault(key, Slots(self._slots_per_key))

    def _slots_of(self, log: RequestLog) -> tuple[int, int, float]:
        """For the headers of an answer: slots, free ones, seconds until one is free."""
        of_key = self._slots_of_key(log.key)
        if self.client is None:
            return min(of_key.limit, self._slots), 0, AWAY
        engine = self.client.served.find(log.model).engine
        free = max(min(of_key.limit - of_key.in_use, engine.slots.limit - engine.slots.in_use), 0)
        return min(of_key.limit, engine.slots.limit), free, 0.0 if free else engine.expected_wait()

    def _routes(self) -> Router:
        parts = (self.serving, self.seat, self.metrics.gap, self.limits)
        routes = [
            *(Route(path, Completions(endpoint, *parts), methods=["POST"]) for endpoint, path in PATHS.items()),
            Route("/v1/models", self._list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            *playground.routes(),
        ]
        return Router(routes, redirect_slashes=False)

    async def _list_models(self, request: Request) -> Response:
        return _json(await self.serving().models.list())

    async def _model(self, request: Request) -> Response:
        models, name = self.serving().models, request.path_params["name"]
        try:
            return _json(await models.retrieve(name))
        except NotFoundError:  # "--" stands for a slash, as on the page that this project comes from
            return _json(await models.retrieve(name.replace("--", "/")))

    async def _tokenize(self, request: Request) -> Response:
        client, fields = await self._read(request)
        flags = {"add_special_tokens": True, "parse_special": True, "return_token_strs": False}
        for name, default in flags.items():
            flags[name] = fields.get(name, default)
            if not isinstance(flags[name], bool):
                raise bad_type(name, fields[name], "a boolean")
        prompt, messages, model = (fields.get(name) for name in ("prompt", "messages", "model"))
        return _json(await client.tokenize(prompt, messages=messages, model=model, **flags))

    async def _detokenize(self, request: Request) -> Response:
        client, fields = await self._read(request)
        if "tokens" not in fields:
            raise missing("tokens")
        return _json(await client.detokenize(fields["tokens"], model=fields.get("model")))

    async def _read(self, request: Request) -> tuple[AsyncClient, dict[str, Any]]:
        """The client, and the fields of a request; null is the same as absent."""
        client = self.serving()
        fields = await read_object(request.scope, request.receive, self.limits)
        return client, {name: value for name, value in fields.items() if value is not None}

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self.serving().served.find().tokenizer
        names = ("unk_token", "bos_token", "eos_token")
        return _json({name: tokenizer.token_string(i) for i, name in enumerate(names)})

    async def _openapi(self, request: Request) -> Response:
        first, *others = self.serving().served.all()
        names = [model.name for model in (first, *others)]
        return _json(document(names, first.settings.limits, first.vocab_size, llama.__version__))

    async def _health(self, request: Request) -> Response:
        if self.client is None:
            return _json({"status": "loading"})
        models = {model.name: model.health().to_dict() for model in self._models()}
        good = all(health["status"] == "ok" for health in models.values())
        return _json({"status": "ok" if good else "failed", "models": models}, 200 if good else 503)

    async def _ready(self, request: Request) -> Response:
        self.serving()
        if any(model.health().status != "ok" for model in self._models()):
            raise ServiceUnavailableError("The engine does not answer.")
        return _json({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(self._models()), media_type=Metrics.media_type)


def _json(body: Object | dict[str, Any], status: int = 200) -> Response:
    text = json.dumps(body) if isinstance(body, dict) else body.to_json()
    return Response(text, status, media_type="application/json")
