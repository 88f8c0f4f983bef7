"""Checks of a request's values: each makes one kind of value certain, before anything is allocated.

A check takes the argument's name, its value (never null) and what it is checked against; it gives the value in the form
we work with, or raises BadRequestError naming the argument.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from api.errors import BadRequestError, bad_type, bad_value, unsupported
from llama.config import Limits
from llama.errors import InvalidRequest
from llama.tokenizer import check_text

Endpoint = Literal["chat", "completions"]
MAX_INTEGER = 1 << 31
DECIMAL = re.compile(r"0|[1-9][0-9]{0,9}")


@dataclass(frozen=True)
class Context:
    """What a value is checked against. limits: the ceilings; vocab_size: token ids lie below it."""

    endpoint: Endpoint
    limits: Limits
    vocab_size: int


Check = Callable[[str, Any, Context], Any]


def boolean(name: str, value: Any, context: Context) -> bool:
    if type(value) is not bool:
        raise bad_type(name, value, "a boolean")
    return value


def string(name: str, value: Any, context: Context) -> str:
    if not isinstance(value, str):
        raise bad_type(name, value, "a string")
    return value


def integer(low: int, high: int | str) -> Check:
    """A whole number; high: a number, or the name of the field of `Limits` that holds it."""

    def check(name: str, value: Any, context: Context) -> int:
        # `type`, not isinstance: True is no integer, nor is 1.0.
        if type(value) is not int:
            raise bad_type(name, value, "an integer")
        ceiling = getattr(context.limits, high) if isinstance(high, str) else high
        if not low <= value <= ceiling:
            raise bad_value(name, value, f"must be from {low} to {ceiling}")
        return value

    return check


def number(low: float, high: float, above: bool = False) -> Check:
    """A finite number from low (above: excluded) to high."""

    def check(name: str, value: Any, context: Context) -> float:
        if type(value) not in (int, float):
            raise bad_type(name, value, "a number")
        if not low <= value <= high or (above and value == low) or math.isnan(value):
            raise bad_value(
                name, value, f"must be {'above' if above else 'from'} {low} {'up ' if above else ''}to {high}"
            )
        return float(value)

    return check


def max_tokens(name: str, value: Any, context: Context) -> int:
    return integer(1 if context.endpoint == "chat" else 0, MAX_INTEGER)(name, value, context)


def logprobs(name: str, value: Any, context: Context) -> Any:
    if context.endpoint == "chat":
        return boolean(name, value, context)
    return integer(0, "completion_logprobs")(name, value, context)


def stop_strings(name: str, value: Any, context: Context) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise bad_type(name, value, "a string or a list of strings")
    limits = context.limits
    if len(texts) > limits.stop:
        raise bad_value(name, len(texts), f"at most {limits.stop} stop strings")
    for text in texts:
        if not isinstance(text, str):
            raise bad_type(name, text, "a string or a list of strings")
        if not 1 <= len(text) <= limits.stop_chars:
            raise bad_value(name, text, f"a stop string has 1 to {limits.stop_chars} characters")
        _check_unicode(name, text)
    return list(texts)


def token_ids(name: str, value: Any, context: Context) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise bad_type(name, value, "a list of token ids")
    if len(value) > context.limits.stop_token_ids:
        raise bad_value(name, len(value), f"at most {context.limits.stop_token_ids} ids")
    return [token_id(name, one, context) for one in value]


def biases(name: str, value: Any, context: Context) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise bad_type(name, value, "an object of token id to bias")
    if len(value) > context.limits.logit_bias:
        raise bad_value(name, len(value), f"at most {context.limits.logit_bias} entries")
    read: dict[int, float] = {}
    for key, bias in value.items():
        if isinstance(key, str):
            if not DECIMAL.fullmatch(key):
                raise bad_value(name, key, "keys are token ids in decimal")
            key = int(key)
        if token_id(name, key, context) in read:
            raise bad_value(name, key, "this token id is given twice")
        read[key] = number(-100, 100)(name, bias, context)
    return read


def prompts(name: str, value: Any, context: Context) -> list[str | list[int]]:
    """One prompt or several; text or ids, not both."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise bad_type(name, value, "a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise bad_value(name, value, "at least one prompt is needed")
    if isinstance(value[0], str):
        if len(value) > context.limits.sequences:
            raise bad_value(name, len(value), f"at most {context.limits.sequences} prompts")
        return [string(name, text, context) for text in value]
    if isinstance(value[0], (list, tuple)):
        if len(value) > context.limits.sequences:
            raise bad_value(name, len(value), f"at most {context.limits.sequences} prompts")
        return [_id_prompt(name, ids, context) for ids in value]
    return [_id_prompt(name, value, context)]


def message_list(name: str, value: Any, context: Context) -> list[Mapping[str, Any]]:
    """Objects, or answers' own message objects; role, order and content are checked with the chat format."""
    if not isinstance(value, (list, tuple)):
        raise bad_type(name, value, "a list of messages")
    if not 1 <= len(value) <= context.limits.messages:
        raise bad_value(name, len(value), f"must have 1 to {context.limits.messages} messages")
    read: list[Mapping[str, Any]] = []
    for i, message in enumerate(value):
        if isinstance(message, BaseModel):
            message = message.model_dump(exclude_none=True)
        if not isinstance(message, Mapping):
            raise bad_type(f"{name}[{i}]", message, "an object with role and content")
        for key in ("role", "content"):
            if message.get(key) is None:
                raise missing(f"{name}[{i}].{key}")
        if not isinstance(message["role"], str):
            raise bad_type(f"{name}[{i}].role", message["role"], "a string")
        for key in ("tool_calls", "function_call", "tool_call_id"):
            if not asks_nothing(message.get(key)):
                raise unsupported(f"{name}[{i}].{key}", "Tool calls are not supported by this model.")
        content = message["content"]
        if not isinstance(content, (str, list, tuple)):
            raise bad_type(f"{name}[{i}].content", content, "a string or a list of text parts")
        for j, part in enumerate([] if isinstance(content, str) else content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind != "text":
                raise unsupported(f"{name}[{i}].content[{j}].type", "Only text parts are supported by this model.")
        read.append(message)
    return read


def stream_options(name: str, value: Any, context: Context) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise bad_type(name, value, "an object")
    options = dict(value)
    if options.get("include_usage") is not None:
        boolean(f"{name}.include_usage", options["include_usage"], context)
    return options


def response_format(name: str, value: Any, context: Context) -> None:
    if not isinstance(value, Mapping):
        raise bad_type(name, value, "an object")
    if value.get("type") in ("json_object", "json_schema"):
        raise unsupported(name, "JSON output needs the extra 'guided', which is not installed.")
    if value.get("type") != "text":
        raise bad_value(f"{name}.type", value.get("type"), "must be 'text'")


def nothing(name: str, value: Any, context: Context) -> None:
    """For what we cannot do: only a value that asks for nothing passes."""
    if not asks_nothing(value):
        raise unsupported(name, f"'{name}' is not supported by this model.")


def text_only(name: str, value: Any, context: Context) -> None:
    if value != ["text"] and not asks_nothing(value):
        raise unsupported(name, "Only the modality 'text' is supported by this model.")


def free_choice(name: str, value: Any, context: Context) -> None:
    if value not in ("none", "auto"):
        raise unsupported(name, "Tools cannot be required: this model makes no tool calls.")


def _check_unicode(name: str, text: str) -> None:
    try:
        check_text(text, name)
    except InvalidRequest as error:
        raise bad_value(name, error.value, error.limit) from error


def token_id(name: str, value: Any, context: Context) -> int:
    """A whole number that is a token id of the model."""
    if type(value) is not int:
        raise bad_type(name, value, "token ids")
    if not 0 <= value < context.vocab_size:
        raise bad_value(name, value, f"token ids go from 0 to {context.vocab_size - 1}")
    return value


def _id_prompt(name: str, value: Any, context: Context) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise bad_type(name, value, "a list of token ids, like the ones before it")
    if not value:
        raise bad_value(name, value, "a prompt of ids needs at least one")
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) < context.vocab_size:
        return list(value)  # long prompts are checked in event loops, so at the speed of C
    return [token_id(name, one, context) for one in value]


def missing(name: str) -> BadRequestError:
    """400 for a field that must be there."""
    return BadRequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def asks_nothing(value: Any) -> bool:
    """Whether a value is the same as leaving the field out: null, false, or empty."""
    return value is None or value is False or (isinstance(value, (str, Sequence, Mapping)) and not len(value))
