"""The engine's own errors. Every error carries its data as attributes, so that callers never parse messages.

EngineError
|-- ConfigError         an option or a model description that makes no sense        (field, value, limit)
|-- LoadError           a file that cannot be read or used                          (path, tensor)
|   |-- CheckpointError     weights missing, left over, doubled, of the wrong shape (problems)
|   `-- TokenizerError      tokenizer.model unreadable, empty or of another vocabulary
|-- InvalidRequest      one request is wrong; nothing was queued                    (field, value, limit)
|   |-- ContextLengthExceeded   the prompt does not fit the context                 (value, limit)
|   `-- ChatFormatError         roles, turn order or control tags in messages
|-- SlotsFull           no free seat for another request in flight                  (limit, retry_after)
|-- RequestFailed       this request failed while running; others go on             (reason)
|-- EngineDead          the engine thread has stopped; nothing will be served
`-- EngineClosed        close() was called
"""

from __future__ import annotations

from pathlib import Path


class EngineError(Exception):
    """Root of everything that `llama` raises on purpose."""


class ConfigError(EngineError):
    """An option or a model description that makes no sense. `limit` says what would have been accepted."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        self.field, self.value, self.limit = field, value, limit
        super().__init__(f"{field}={value!r}: {limit}")


class LoadError(EngineError):
    """A file that cannot be read or used; `tensor` is the tensor's name where one is at fault."""

    def __init__(self, path: Path | str, message: str, tensor: str | None = None) -> None:
        self.path, self.tensor = Path(path), tensor
        super().__init__(f"{path}: {f'tensor {tensor}: ' if tensor else ''}{message}")


class CheckpointError(LoadError):
    """The tensors of a checkpoint do not cover the model exactly once; `problems` lists every fault found."""

    def __init__(self, path: Path | str, problems: list[str]) -> None:
        self.problems = problems
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        super().__init__(path, f"{len(problems)} problem(s) in the checkpoint:\n  " + "\n  ".join(shown))


class TokenizerError(LoadError):
    """tokenizer.model is unreadable, empty, or of another vocabulary than the model."""


class InvalidRequest(EngineError):
    """One request is wrong. It was refused before anything was queued or allocated."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        self.field, self.value, self.limit = field, value, limit
        shown = repr(value)
        super().__init__(f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: {limit}")


class ContextLengthExceeded(InvalidRequest):
    """The prompt leaves no room in the context (or could never fit the KV cache). `value`, `limit_tokens` in tokens."""

    def __init__(self, value: int, limit_tokens: int, what: str = "the model's context") -> None:
        self.limit_tokens = limit_tokens
        super().__init__("prompt", value, f"the prompt has {value} tokens, {what} holds {limit_tokens}")


class ChatFormatError(InvalidRequest):
    """Messages that Llama-2's chat format cannot express; `field` names the message, e.g. 'messages[2].role'."""


class SlotsFull(EngineError):
    """Every slot is taken. `limit`: slots in all; `retry_after`: expected seconds until one is free."""

    def __init__(self, limit: int, retry_after: float = 1.0) -> None:
        self.limit, self.retry_after = limit, retry_after
        super().__init__(f"all {limit} slots are taken by requests in flight")


class RequestFailed(EngineError):
    """This request failed while running; others go on. `reason` is a short machine-readable word."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class EngineDead(EngineError):
    """The engine thread stopped on an error it could not confine to one request; nothing more will be served."""


class EngineClosed(EngineError):
    """The engine was closed."""
