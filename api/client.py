"""`Client` and `AsyncClient`: OpenAI's interface to models in this process, batched together whoever calls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, Self, overload

import llama
from api.answer import Chunk, Compat, Whole
from api.call import AsyncChunkStream, Call, ChunkStream
from api.checks import Endpoint as EndpointName
from api.errors import bad_type
from api.schema import ChatCompletion, ChatCompletionChunk, Completion, Health, Model, ModelList, Text, Tokens
from api.served import Models, Settings
from llama.config import EngineConfig, Limits


class Caller(Generic[Whole, Chunk]):
    """One endpoint: chat.completions or completions. Its requests are what `api.arguments` says.

    Never part of the request itself: wait (for a slot: seconds, or True; default: what the client says), timeout
    (seconds for the whole request, then APITimeoutError), extra_body (more fields of the request), extra_headers and
    extra_query (reported as ignored). Raises `api.errors`.
    """

    def __init__(self, models: Models, endpoint: EndpointName) -> None:
        self._models, self._endpoint = models, endpoint

    def _call(
        self, fields: dict[str, Any], extra_body: Mapping[str, Any] | None, wait: Any, timeout: Any
    ) -> Call[Whole, Chunk]:
        if extra_body is not None and not isinstance(extra_body, Mapping):
            raise bad_type("extra_body", extra_body, "an object")
        return Call(self._models, self._endpoint, {**fields, **(extra_body or {})}, wait, timeout)

    @overload
    async def _create_async(
        self,
        *,
        stream: Literal[True],
        wait: float | bool | None = None,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> AsyncChunkStream[Chunk]: ...

    @overload
    async def _create_async(
        self,
        *,
        stream: Literal[False] | None = None,
        wait: float | bool | None = None,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Whole: ...

    async def _create_async(
        self,
        *,
        stream: bool | None = None,
        wait: float | bool | None = None,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Whole | AsyncChunkStream[Chunk]:
        """The answer; or, with stream=True, its chunks as they come, to be read with `async for`."""
        call = self._call({"stream": stream, **fields}, extra_body, wait, timeout)
        running = await call.start_async()
        return AsyncChunkStream(running) if call.arguments.stream else await running.whole_async()


class Endpoint(Caller[Whole, Chunk]):
    """`create` for threads, `acreate` for event loops."""

    @overload
    def create(
        self,
        *,
        stream: Literal[True],
        wait: float | bool | None = None,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> ChunkStream[Chunk]: ...

    @overload
    def create(
        self,
        *,
        stream: Literal[False] | None = None,
        wait: float | bool | None = None,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Whole: ...

    def create(
        self,
        *,
        stream: bool | None = None,
        wait: float | bool | None = None,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Whole | ChunkStream[Chunk]:
        """The answer; or, with stream=True, its chunks as they come."""
        call = self._call({"stream": stream, **fields}, extra_body, wait, timeout)
        running = call.start()
        return ChunkStream(running) if call.arguments.stream else running.whole()

    acreate = Caller._create_async


class AsyncEndpoint(Caller[Whole, Chunk]):
    """`create` for event loops."""

    create = Caller._create_async


class Chat:
    """`chat.completions`."""

    def __init__(self, models: Models) -> None:
        self.completions: Endpoint[ChatCompletion, ChatCompletionChunk] = Endpoint(models, "chat")


class AsyncChat:
    """`chat.completions`, for event loops."""

    def __init__(self, models: Models) -> None:
        self.completions: AsyncEndpoint[ChatCompletion, ChatCompletionChunk] = AsyncEndpoint(models, "chat")


class ModelNames:
    """`models`: what this client serves."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def list(self) -> ModelList:
        return ModelList(object="list", data=[served.describe() for served in self._models.all()])

    def retrieve(self, model: str) -> Model:
        """Raises NotFoundError."""
        return self._models.find(model).describe()


class AsyncModelNames:
    """`models`, for event loops."""

    def __init__(self, models: Models) -> None:
        self._names = ModelNames(models)

    async def list(self) -> ModelList:
        return self._names.list()

    async def retrieve(self, model: str) -> Model:
        return self._names.retrieve(model)


class BaseClient:
    """Loads `model` (a checkpoint folder, or "demo") and serves it in this process until it is closed.

    served_name: what answers call the model; default: the folder's name. aliases: further names; the folder as given is
    always one. slots: requests in flight; a further one gets RateLimitError, or waits for a slot as `wait` says
    (seconds, True: as long as it takes). strict: refuse what would be ignored. compat="anyscale": the shape of answers
    of 2023. special_tags: what becomes of "[INST]" and the like in messages; "text" lets them through as text.
    chat=False: a base model, whose chat requests are refused. limits: ceilings for one request. progress: show a bar
    while loading. engine_options: fields of `llama.EngineConfig`; an unknown one is a TypeError.
    Any number of threads, tasks and event loops may call one client.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        served_name: str | None = None,
        aliases: Sequence[str] = (),
        slots: int = 30,
        wait: float | bool | None = None,
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
        self._models = Models(Settings(wait, strict, compat, special_tags, chat, limits or Limits()))
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
    ) -> Model:
        """Serve one more model, under its own name, with an engine and slots of its own."""
        known = {field.name for field in dataclass_fields(EngineConfig)}
        for name in engine_options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; options of the engine are {', '.join(sorted(known))}")
        config = EngineConfig(slots=slots, **engine_options)
        return self._models.load(model, served_name, aliases, config, progress).describe()

    def health(self, model: str | None = None) -> Health:
        """Whether the model is being served. Takes no slot."""
        return self._models.find(model).health()

    def stats(self, model: str | None = None) -> llama.EngineStats:
        """Numbers of the model's engine: slots, sequences, blocks, tokens. Takes no slot."""
        return self._models.find(model).engine.stats()


class Client(BaseClient):
    __doc__ = BaseClient.__doc__

    @cached_property
    def chat(self) -> Chat:
        return Chat(self._models)

    @cached_property
    def completions(self) -> Endpoint[Completion, Completion]:
        return Endpoint(self._models, "completions")

    @cached_property
    def models(self) -> ModelNames:
        return ModelNames(self._models)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Any] | None = None,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        return_token_strs: bool = False,
        model: str | None = None,
    ) -> Tokens:
        """The ids that a request with this prompt, or these messages, would have. Takes no slot."""
        served = self._models.find(model)
        return served.tokenize(prompt, messages, add_special_tokens, parse_special, return_token_strs)

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> Text:
        """The text of token ids. Takes no slot."""
        return self._models.find(model).detokenize(tokens)

    def close(self) -> None:
        """End what runs, with an error for its callers, and give all memory back. Again is no harm."""
        self._models.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(BaseClient):
    """`Client` for event loops: the same options and the same tree, awaited. Making one blocks until it is loaded."""

    @cached_property
    def chat(self) -> AsyncChat:
        return AsyncChat(self._models)

    @cached_property
    def completions(self) -> AsyncEndpoint[Completion, Completion]:
        return AsyncEndpoint(self._models, "completions")

    @cached_property
    def models(self) -> AsyncModelNames:
        return AsyncModelNames(self._models)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Any] | None = None,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        return_token_strs: bool = False,
        model: str | None = None,
    ) -> Tokens:
        """The same."""
        tokenize = self._models.find(model).tokenize
        return await asyncio.to_thread(tokenize, prompt, messages, add_special_tokens, parse_special, return_token_strs)

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> Text:
        return await asyncio.to_thread(self._models.find(model).detokenize, tokens)

    async def close(self) -> None:
        await asyncio.to_thread(self._models.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
