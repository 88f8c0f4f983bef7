"""`RequestLog`: what is known about one HTTP request, from its first byte to its log line."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from api.answer import Answer
from api.errors import APIError
from llama.stream import RequestStats

Outcome = Literal["ok", "invalid", "refused", "failed", "unavailable", "gone", "stalled"]


@dataclass
class RequestLog:
    """One HTTP request. endpoint: a word of a fixed set. key: 8 hex digits of the key's digest, "" without one.

    request_id: ours; the random part of the answer's `id`. client_request_id: what the client called it.
    """

    endpoint: str
    path: str
    request_id: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    client_request_id: str | None = None
    key: str = ""
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    outcome: Outcome = "ok"
    code: str | None = None
    model: str | None = None
    stream: bool | None = None
    ignored: list[str] = field(default_factory=list)
    stats: RequestStats | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def began(self, answer: Answer[Any, Any]) -> None:
        """The request is in the engine."""
        self.stats = answer.stats
        self.request_id = answer.heading.request_id
        self.ignored = answer.arguments.ignored

    def failed(self, error: APIError) -> None:
        """What the request failed with."""
        status = error.status_code or 500
        self.code = error.code
        self.outcome = "invalid" if status < 500 else "unavailable" if status == 503 else "failed"
        if status == 429:
            self.outcome = "refused"

    def count(self, answer: Answer[Any, Any]) -> None:
        """Take the tokens that were delivered until now."""
        usage = answer.usage
        self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens

    def line(self) -> dict[str, Any]:
        """For the log: never a text, never a key, never a name that a client chose."""
        line: dict[str, Any] = {"id": self.request_id, "endpoint": self.endpoint, "status": self.status}
        line |= {"outcome": self.outcome, "code": self.code, "key": self.key or None, "model": self.model}
        line |= {"stream": self.stream, "prompt_tokens": self.prompt_tokens}
        line |= {"completion_tokens": self.completion_tokens, "ms": _ms(self.seconds)}
        if self.stats is not None:
            since = self.stats.submitted
            line["queue_ms"] = _ms(self.stats.first_scheduled and self.stats.first_scheduled - since)
            line["first_token_ms"] = _ms(self.stats.first_token and self.stats.first_token - since)
        return {name: value for name, value in line.items() if value is not None}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
