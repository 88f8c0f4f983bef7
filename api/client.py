"""`Client` and `AsyncClient`: OpenAI's interface to models in this process, batched together whoever calls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar, overload

import llama
from api import schema
from api.answer import Chunk, Compat, Whole
from api.checks import Endpoint as EndpointName
from api.chunk_stream import AsyncChunkStream, ChunkStream
from api.errors import bad_type
from api.models import Models, Settings
from api.request import Request
from llama.config import EngineConfig, Limits

On = Literal[True]
Off = Literal[False] | None
Flag = bool | None
Wait = float | bool | None
Seconds = float | None
Body = Mapping[str, Any] | None


@dataclass(frozen=True)
class BaseEndpoint(Generic[Whole, Chunk]):
    """chat.completions or completions. `api.arguments` says what a request's fields may be.

    wait: for a slot, seconds or True; default: the client's. timeout: seconds for the whole request, then
    APITimeoutError. extra_body: more fields. extra_headers, extra_query: ignored, and told. Raises `api.errors`.
    """

    served: Models
    endpoint: EndpointName

    def _request(self, fields: dict[str, Any], extra: Body, wait: Wait, timeout: Seconds) -> Request[Whole, Chunk]:
        if extra is not None and not isinstance(extra, Mapping):
            raise bad_type("extra_body", extra, "an object")
        return Request(self.served, self.endpoint, {**fields, **(extra or {})}, wait, timeout)

    @overload
    async def _create_async(self, *, stream: On, **options_and_fields: Any) -> AsyncChunkStream[Chunk]: ...

    @overload
    async def _create_async(self, *, stream: Off = None, **options_and_fields: Any) -> Whole: ...

    async def _create_async(
        self, *, stream: Flag = None, wait: Wait = None, timeout: Seconds = None, extra_body: Body = None, **fields: Any
    ) -> Whole | AsyncChunkStream[Chunk]:
        """The answer; or, with stream=True, its chunks as they come, to be read with `async for`."""
        request = self._request({"stream": stream, **fields}, extra_body, wait, timeout)
        running = await request.start_async()
        return AsyncChunkStream(running) if request.arguments.stream else await running.whole_async()


class Endpoint(BaseEndpoint[Whole, Chunk]):
    """`create` for threads, `acreate` for event loops."""

    @overload
    def create(self, *, stream: On, **options_and_fields: Any) -> ChunkStream[Chunk]: ...

    @overload
    def create(self, *, stream: Off = None, **options_and_fields: Any) -> Whole: ...

    def create(
        self, *, stream: Flag = None, wait: Wait = None, timeout: Seconds = None, extra_body: Body = None, **fields: Any
    ) -> Whole | ChunkStream[Chunk]:
        """The answer; or, with stream=True, its chunks as they come."""
        request = self._request({"stream": stream, **fields}, extra_body, wait, timeout)
        running = request.start()
        return ChunkStream(running) if request.arguments.stream else running.whole()

    acreate = BaseEndpoint._create_async


class AsyncEndpoint(BaseEndpoint[Whole, Chunk]):
    """`create` for event loops."""

    create = BaseEndpoint._create_async


ChatEndpoint = Endpoint[schema.ChatCompletion, schema.ChatCompletionChunk]
AsyncChatEndpoint = AsyncEndpoint[schema.ChatCompletion, schema.ChatCompletionChunk]
AnyEndpoint = TypeVar("AnyEndpoint", ChatEndpoint, AsyncChatEndpoint)


@dataclass(frozen=True)
class Chat(Generic[AnyEndpoint]):
    """`chat`."""

    completions: AnyEndpoint


@dataclass(frozen=True)
class ModelNames:
    """`models`: what this client serves."""

    served: Models

    def list(self) -> schema.ModelList:
        return schema.ModelList(object="list", data=[model.describe() for model in self.served.all()])

    def retrieve(self, model: str) -> schema.Model:
        """Raises NotFoundError."""
        return self.served.find(model).describe()


@dataclass(frozen=True)
class AsyncModelNames:
    """`models`, for event loops."""

    names: ModelNames

    async def list(self) -> schema.ModelList:
        return self.names.list()

    async def retrieve(self, model: str) -> schema.Model:
        return self.names.retrieve(model)


class BaseClient:
    """Loads `model` (a checkpoint folder, or "demo") and serves it in this process to any threads and event loops.

    served_name: the model's name in answers; default: the folder's. aliases: further names; the folder as given is
    always one. slots: requests in flight; a further one gets RateLimitError, or waits as `wait` says (seconds, or True:
    as long as it takes). strict: refuse what would be ignored. compat="anyscale": the shape of answers of 2023.
    special_tags: "text" lets "[INST]" and the like in messages through as text. chat=False: a base model, whose chat
    requests are refused. limits: ceilings for one request. progress: show a bar while loading. engine_options: fields
    of `llama.EngineConfig`; an unknown one is a TypeError. served: the client's models, with their engines.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        served_name: str | None = None,
        aliases: Sequence[str] = (),
        slots: int = 30,
        wait: Wait = None,
        strict: bool = False,
        compat: Compat = "openai",
        special_tags: Literal["refuse", "text"] = "refuse",
        chat: bool = True,
        limits: Limits | None = None,
        progress: bool = False,
        **engine_options: Any,
    ) -> None:
        if compat not in ("openai", "anyscale"):
            raise ValueError(f"compat={compat!r}: must be 'openai' or 'anyscale'")
        if special_tags not in ("refuse", "text"):
            raise ValueError(f"special_tags={special_tags!r}: must be 'refuse' or 'text'")
        self.served = Models(Settings(wait, strict, compat, special_tags, chat, limits or Limits()))
        self.load(model, served_name=served_name, aliases=aliases, slots=slots, progress=progress, **engine_options)

    def load(
        self,
        model: str | Path,
        *,
        served_name: str | None = None,
        aliases: Sequence[str] = (),
        slots: int = 30,
        progress: bool = False,
        **engine_options: Any,
    ) -> schema.Model:
        """Serve one more model, under its own name, with an engine and slots of its own."""
        known = sorted(field.name for field in fields(EngineConfig))
        for name in engine_options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; options of the engine are {', '.join(known)}")
        config = EngineConfig(slots=slots, **engine_options)
        return self.served.load(model, served_name, aliases, config, progress).describe()

    def health(self, model: str | None = None) -> schema.Health:
        """Whether the model is being served. Takes no slot."""
        return self.served.find(model).health()

    def stats(self, model: str | None = None) -> llama.EngineStats:
        """Numbers of the model's engine: slots, sequences, blocks, tokens. Takes no slot."""
        return self.served.find(model).engine.stats()


class Client(BaseClient):
    __doc__ = BaseClient.__doc__

    @cached_property
    def chat(self) -> Chat[ChatEndpoint]:
        return Chat(Endpoint(self.served, "chat"))

    @cached_property
    def completions(self) -> Endpoint[schema.Completion, schema.Completion]:
        return Endpoint(self.served, "completions")

    @cached_property
    def models(self) -> ModelNames:
        return ModelNames(self.served)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Any] | None = None,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        return_token_strs: bool = False,
        model: str | None = None,
    ) -> schema.Tokens:
        """The ids that a request with this prompt, or these messages, would have. Takes no slot."""
        tokenize = self.served.find(model).tokenize
        return tokenize(prompt, messages, add_special_tokens, parse_special, return_token_strs)

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> schema.Text:
        """The text of token ids. Takes no slot."""
        return self.served.find(model).detokenize(tokens)

    def close(self) -> None:
        """End what runs, with an error for its callers, and give all memory back. Again is no harm."""
        self.served.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(BaseClient):
    """`Client` for event loops: the same options and the same tree, awaited. Making one blocks until it is loaded."""

    @cached_property
    def chat(self) -> Chat[AsyncChatEndpoint]:
        return Chat(AsyncEndpoint(self.served, "chat"))

    @cached_property
    def completions(self) -> AsyncEndpoint[schema.Completion, schema.Completion]:
        return AsyncEndpoint(self.served, "completions")

    @cached_property
    def models(self) -> AsyncModelNames:
        return AsyncModelNames(ModelNames(self.served))

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Any] | None = None,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        return_token_strs: bool = False,
        model: str | None = None,
    ) -> schema.Tokens:
        """The same."""
        tokenize = self.served.find(model).tokenize
        return await asyncio.to_thread(tokenize, prompt, messages, add_special_tokens, parse_special, return_token_strs)

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> schema.Text:
        return await asyncio.to_thread(self.served.find(model).detokenize, tokens)

    async def close(self) -> None:
        await asyncio.to_thread(self.served.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
