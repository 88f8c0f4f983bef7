"""`Request`: one call on its way, from its fields to its answer, for threads and for event loops.

Every wait comes in two forms, for threads and for event loops; everything else is shared. Every way out gives the slot
back and stops the engine's work.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic

from api.answer import Answer, Chunk, Whole, merge
from api.arguments import AS_GIVEN, SAMPLING, TABLE, UNKNOWN, Action, Arguments
from api.checks import Context, Endpoint, asks_nothing, missing
from api.errors import APITimeoutError, BadRequestError, NotFoundError, bad_type, bad_value, from_engine
from api.models import Models
from llama.config import Limits
from llama.errors import EngineError, InvalidRequest, SlotsFull
from llama.request import SamplingParams
from llama.slots import Seat
from llama.stream import Delta, Stream

# Longer texts are tokenized in a worker thread when the caller is an event loop.
LONG_TEXT = 16_384
MAX_SECONDS = 1e6  # threads cannot wait much longer
SAFE_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")


class Request(Generic[Whole, Chunk]):
    """A checked request; nothing is taken or queued yet. Raises APIError for wrong fields.

    wait, timeout: as `api.client` has them. salt: prompts share cached blocks only with prompts of the same salt.
    """

    def __init__(
        self, models: Models, endpoint: Endpoint, fields: Mapping[str, Any], wait: Any, timeout: Any, salt: str = ""
    ) -> None:
        self.model = models.find(fields.get("model"))
        settings = models.settings
        if endpoint == "chat" and not settings.chat:
            raise NotFoundError(f"'{self.model.name}' is not a chat model.", param="model", code="not_a_chat_model")
        self.arguments = read(
            endpoint, fields, vocab_size=self.model.vocab_size, limits=settings.limits, strict=settings.strict
        )
        self.salt = salt
        self.wait = _seconds("wait", settings.wait if wait is None else wait)
        self.deadline = Deadline(None if timeout is None else _seconds("timeout", timeout))

    def start(self) -> Running[Whole, Chunk]:
        """Take a slot, waiting as long as may be, and submit."""
        with self._slot_errors():
            seat = self.model.engine.slots.acquire(self._wait())
        return self._begin(seat)

    async def start_async(self) -> Running[Whole, Chunk]:
        """The same without blocking the event loop."""
        with self._slot_errors():
            seat = await self.model.engine.slots.acquire_async(self._wait())
        if self._n_characters() <= LONG_TEXT:
            return self._begin(seat)
        return await asyncio.to_thread(self._begin, seat)

    def _begin(self, seat: Seat) -> Running[Whole, Chunk]:
        try:
            stream, answer = self.model.begin(self.arguments, seat, self.salt)
        except EngineError as error:
            raise from_engine(error, "messages" if self.arguments.endpoint == "chat" else "prompt") from error
        return Running(stream, answer, self.deadline)

    def _wait(self) -> float | bool:
        left = self.deadline.left()
        if left is None or not self.wait:
            return self.wait
        return left if self.wait is True else min(left, self.wait)

    @contextmanager
    def _slot_errors(self) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            timed_out = isinstance(error, SlotsFull) and self.wait and self.deadline.passed
            raise (self.deadline.error() if timed_out else from_engine(error)) from error

    def _n_characters(self) -> int:
        texts = [prompt for prompt in self.arguments.prompts if isinstance(prompt, str)]
        return sum(map(len, texts)) + sum(len(str(message["content"])) for message in self.arguments.messages)


class Deadline:
    """When the caller's `timeout` passes; None: never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end - 0.001  # waits end a little early

    def left(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def error(self) -> APITimeoutError:
        return APITimeoutError(f"The request took longer than its timeout of {self.seconds} seconds.")


class Running(Generic[Whole, Chunk]):
    """A submitted request. An error, a passed deadline or an interrupted read ends it at once."""

    def __init__(self, stream: Stream, answer: Answer[Whole, Chunk], deadline: Deadline) -> None:
        self.stream, self.deadline = stream, deadline
        self.answer: Answer[Whole, Chunk] = answer

    def whole(self) -> Whole:
        """Wait for everything and fold it into one answer."""
        return self._fold(iter(self.get, None))

    async def whole_async(self) -> Whole:
        deltas = []
        while (delta := await self.get_async()) is not None:
            deltas.append(delta)
        return self._fold(deltas)

    def get(self) -> Delta | None:
        """The next delta, waiting for it; None at the end."""
        try:
            return self.stream.get(self._left())
        except BaseException as error:
            self._ended_by(error)
            raise

    async def get_async(self) -> Delta | None:
        try:
            return await self.stream.get_async(self._left())
        except BaseException as error:
            self._ended_by(error)
            raise

    def chunks(self, delta: Delta) -> list[Chunk]:
        """The chunks of a delta and of all that have gathered behind it."""
        return [chunk for merged in self._with_gathered(delta) for chunk in self.answer.chunks(merged)]

    def wire(self, delta: Delta) -> list[str]:
        """The same as JSON."""
        return [chunk for merged in self._with_gathered(delta) for chunk in self.answer.wire(merged)]

    def _with_gathered(self, delta: Delta) -> list[Delta]:
        others: list[Delta] = self.stream.gathered()
        return merge([delta, *others]) if others else [delta]

    def _fold(self, deltas: Iterable[Delta]) -> Whole:
        return self.answer.whole(chunk for delta in merge(deltas) for chunk in self.answer.chunks(delta))

    def _left(self) -> float | None:
        """Seconds until the deadline. Raises TimeoutError when it has passed, even if there is something to read."""
        if self.deadline.passed:
            raise TimeoutError
        return self.deadline.left()

    def _ended_by(self, error: BaseException) -> None:
        """Abort what still runs. Raises this interface's error for the engine's, and for a deadline."""
        self.stream.close()
        if isinstance(error, EngineError):
            raise from_engine(error) from error
        if isinstance(error, TimeoutError):
            raise self.deadline.error() from error


def read(
    endpoint: Endpoint, fields: Mapping[str, Any], *, vocab_size: int, limits: Limits, strict: bool = False
) -> Arguments:
    """The request that `fields` make. Raises BadRequestError, naming the field, before anything is allocated."""
    context = Context(endpoint, limits, vocab_size)
    if len(fields) > limits.fields:
        raise BadRequestError(f"A request has at most {limits.fields} fields, not {len(fields)}.")
    given: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in fields.items():
        if value is None:
            continue
        row = TABLE[endpoint].get(name, UNKNOWN)
        checked = row.kind.check(name, value, context) if row.kind else value
        if row.action is Action.HONOURED:
            given[name] = checked
        elif row.action is Action.IGNORED and not asks_nothing(value) and value not in row.silent:
            ignored.append(str(name))
    ignored += _ignored_inside(given)
    if ignored and (strict or given.get("strict")):
        raise _unknown(ignored[0])
    told = sorted({name for name in ignored if SAFE_NAME.fullmatch(name)})[: limits.reported_names]
    return _collect(endpoint, given, limits, told)


def _ignored_inside(given: Mapping[str, Any]) -> list[str]:
    """Names of what is ignored inside messages and stream_options."""
    known = {"role", "content", "tool_calls", "function_call", "tool_call_id"}
    pairs = [(k, v) for message in given.get("messages", []) for k, v in message.items() if k not in known]
    pairs += [(k, v) for k, v in given.get("stream_options", {}).items() if k != "include_usage"]
    return list(dict.fromkeys(str(name) for name, value in pairs if not asks_nothing(value)))


def _unknown(name: str) -> BadRequestError:
    safe = name if SAFE_NAME.fullmatch(name) else None
    shown = f"'{safe}'" if safe else "A field with an unusual name"
    message = f"{shown} would be ignored, and the request (or this service) is strict."
    return BadRequestError(message, param=safe, code="unknown_parameter")


def _collect(endpoint: Endpoint, given: dict[str, Any], limits: Limits, ignored: list[str]) -> Arguments:
    """The rules between fields, and what follows from several of them."""
    required = "messages" if endpoint == "chat" else "prompt"
    if required not in given:
        raise missing(required)
    n, stream = given.get("n", 1), given.get("stream", False)
    best_of = given.get("best_of", n)
    if best_of < n:
        raise bad_value("best_of", best_of, f"must be at least n={n}")
    if stream and best_of > n:
        raise BadRequestError("'best_of' above n cannot be streamed.", param="best_of")
    count = len(given.get("prompt", [None])) * best_of
    if count > limits.sequences:
        param = "best_of" if best_of > n else "n"
        raise bad_value(param, best_of, f"prompts x {param} may be at most {limits.sequences}, not {count}")
    if "stream_options" in given and not stream:
        raise BadRequestError("'stream_options' needs stream=true.", param="stream_options")
    logprobs = _logprobs(endpoint, given)
    return Arguments(
        endpoint=endpoint,
        params=_sampling(endpoint, given, logprobs, ranked=best_of > n),
        prompts=given.get("prompt", []),
        n=n,
        best_of=best_of,
        logprobs=logprobs,
        include_usage=bool(given.get("stream_options", {}).get("include_usage")),
        ignored=ignored,
        **{name: given[name] for name in AS_GIVEN if name in given},
    )


def _logprobs(endpoint: Endpoint, given: Mapping[str, Any]) -> int | None:
    """How many alternatives per token; None: no logprobs at all."""
    if endpoint == "completions":
        return given.get("logprobs")
    top = given.get("top_logprobs", 0)
    if given.get("logprobs"):
        return top
    if top:
        raise BadRequestError("'top_logprobs' needs logprobs=true.", param="top_logprobs")
    return None


def _max_tokens(endpoint: Endpoint, given: Mapping[str, Any]) -> int | None:
    both = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(both) == 2 and both[0] != both[1]:
        message = "'max_tokens' and 'max_completion_tokens' mean the same here, and differ."
        raise BadRequestError(message, param="max_completion_tokens")
    if not both:
        return 16 if endpoint == "completions" else None
    if both[0] == 0 and not given.get("echo"):
        raise bad_value("max_tokens", 0, "must be at least 1, or echo=true")
    return both[0]


def _sampling(endpoint: Endpoint, given: Mapping[str, Any], logprobs: int | None, ranked: bool) -> SamplingParams:
    """ranked: the sequences are compared by their logprobs, whether or not these are told."""
    params = {name: given[name] for name in SAMPLING if name in given}
    params["max_tokens"] = _max_tokens(endpoint, given)
    params["top_k"] = given.get("top_k") or -1
    params["logprobs"] = 0 if ranked and logprobs is None else logprobs
    params["prompt_logprobs"] = logprobs if given.get("echo") else None
    try:
        return SamplingParams(**params)
    except InvalidRequest as error:
        raise bad_value(error.field, error.value, error.limit) from error


def _seconds(name: str, value: Any) -> Any:
    """A wait or a timeout: seconds, and for `wait` also True, False or None."""
    if name == "wait" and (value is None or isinstance(value, bool)):
        return bool(value)
    if type(value) not in (int, float):
        raise bad_type(name, value, "a number of seconds")
    if not 0 <= value < MAX_SECONDS:
        raise bad_value(name, value, f"must be from 0 to {MAX_SECONDS} seconds")
    return float(value)
