"""`Server`: OpenAI's routes over HTTP, as an ASGI application around one `AsyncClient`.

A request here and a call of the client take the same way: fields, `Call`, `Running`, `Answer`; so their JSON is equal.
A request holds a slot from the moment its fields are known to be right until its answer is written or its client gone.
Knows no sockets and no signals (`api.sockets`), and starts no server (`scripts/serve.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from api import playground
from api.checks import missing
from api.client import AsyncClient
from api.edge import AWAY, LOOPBACK, Edge, Gate, Keys, read_object
from api.errors import NotFoundError, RateLimitError, ServiceUnavailableError, bad_type, translated
from api.generate import Generate
from api.metrics import VERSION, Metrics
from api.openapi import document
from api.quota import Line, SlotsByKey
from api.schema import Object
from api.served import Served
from api.visit import EdgeLimits, Visit
from llama.slots import Seat


class Server:
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
        limits: EdgeLimits | None = None,
    ) -> None:
        self.client = client
        self.draining = False
        self.limits = limits or EdgeLimits()
        self.metrics = Metrics()
        self._slots = slots
        self._by_key = SlotsByKey(slots_per_key or slots)
        self._line = Line()
        gate = Gate(Keys(keys, self.limits.keys), None if hosts is None else tuple(hosts), tuple(origins))
        self.app = Edge(self._routes(), gate, self.limits, self._slots_of, self.metrics.finished)

    @property
    def active(self) -> int:
        """Requests that have not been answered to the end."""
        return self.app.active

    @property
    def failed(self) -> bool:
        """Whether an engine stopped without being asked to."""
        return self.client is not None and any(not one.engine.serving for one in self.client._models.all())

    def serving(self) -> AsyncClient:
        """The client. Raises ServiceUnavailableError while nothing is served."""
        if self.draining:
            raise ServiceUnavailableError("The service is shutting down.", code="shutting_down")
        if self.client is None:
            raise ServiceUnavailableError("The model is loading.", code="model_loading")
        return self.client

    @contextmanager
    def seat(self, visit: Visit, served: Served) -> Iterator[None]:
        """One of the key's slots, while the answer is made and written. Raises RateLimitError."""
        slots = self._by_key.get(visit.key)
        seat: Seat | None = None
        try:
            with translated():
                seat = slots.acquire()
            if not served.engine.slots.in_use:
                self._line.forget()
            yield
        except RateLimitError as error:
            error.retry_after = self._line.wait(served.engine.expected_wait)
            self.metrics.refused("key" if seat is None else "slots")
            raise
        finally:
            if seat is not None:
                seat.release()

    def _slots_of(self, visit: Visit) -> tuple[int, int, float]:
        """For the headers of a visit: slots, free ones, seconds until one is free."""
        mine = self._by_key.get(visit.key)
        if self.client is None:
            return min(mine.limit, self._slots), 0, AWAY
        engine = self.client._models.find(visit.model).engine
        free = max(min(mine.limit - mine.in_use, engine.slots.limit - engine.slots.in_use), 0)
        return min(mine.limit, engine.slots.limit), free, 0.0 if free else engine.expected_wait()

    def _routes(self) -> Router:
        parts = (self.serving, self.seat, self.metrics.gap, self.limits)
        routes = [
            Route("/v1/chat/completions", Generate("chat", *parts), methods=["POST"]),
            Route("/v1/completions", Generate("completions", *parts), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
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

    async def _models(self, request: Request) -> Response:
        return _json(await self.serving().models.list())

    async def _model(self, request: Request) -> Response:
        models, name = self.serving().models, request.path_params["name"]
        try:
            return _json(await models.retrieve(name))
        except NotFoundError:  # "--" stands for a slash, as on the page that this project comes from
            return _json(await models.retrieve(name.replace("--", "/")))

    async def _tokenize(self, request: Request) -> Response:
        client, fields = await self._read(request)
        for name in ("add_special_tokens", "parse_special", "return_token_strs"):
            if not isinstance(fields.get(name, True), bool):
                raise bad_type(name, fields[name], "a boolean")
        return _json(
            await client.tokenize(
                fields.get("prompt"),
                messages=fields.get("messages"),
                add_special_tokens=fields.get("add_special_tokens", True),
                parse_special=fields.get("parse_special", True),
                return_token_strs=fields.get("return_token_strs", False),
                model=fields.get("model"),
            )
        )

    async def _detokenize(self, request: Request) -> Response:
        client, fields = await self._read(request)
        if "tokens" not in fields:
            raise missing("tokens")
        return _json(await client.detokenize(fields["tokens"], model=fields.get("model")))

    async def _read(self, request: Request) -> tuple[AsyncClient, dict[str, Any]]:
        """The client, and the fields of a request; null is the same as absent."""
        client = self.serving()
        scope = request.scope
        fields = await read_object(scope, request.receive, scope["visit"], self.limits)
        return client, {name: value for name, value in fields.items() if value is not None}

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self.serving()._models.find().tokenizer
        names = ("unk_token", "bos_token", "eos_token")
        return _plain({name: tokenizer.token_string(i) for i, name in enumerate(names)})

    async def _openapi(self, request: Request) -> Response:
        models = self.serving()._models
        served, names = models.find(), [one.name for one in models.all()]
        return _plain(document(names, served.settings.limits, served.engine.model_config.vocab_size, VERSION))

    async def _health(self, request: Request) -> Response:
        if self.client is None:
            return _plain({"status": "loading"})
        models = {one.name: one.health() for one in self.client._models.all()}
        good = all(health.status == "ok" for health in models.values())
        shown = {name: health.to_dict() for name, health in models.items()}
        return _plain({"status": "ok" if good else "failed", "models": shown}, 200 if good else 503)

    async def _ready(self, request: Request) -> Response:
        client = self.serving()
        if any(one.health().status != "ok" for one in client._models.all()):
            raise ServiceUnavailableError("The engine does not answer.")
        return _plain({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        served = [] if self.client is None else self.client._models.all()
        return Response(self.metrics.render(served), media_type=Metrics.media_type)


def _json(made: Object) -> Response:
    return Response(made.to_json(), media_type="application/json")


def _plain(made: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(made), status, media_type="application/json")
