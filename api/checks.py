"""Kinds of arguments: each says what a value may be, once as a check and once as JSON Schema.

check(name, value, context): the value in the form that the engine takes. Raises BadRequestError, naming the argument.
schema(context): of the values that pass; /openapi.json and docs/parameters.md take their numbers from it.
The value is never null: a null argument is an absent one. Nothing is allocated before all values are checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from api.errors import BadRequestError, bad_type, bad_value, unsupported
from llama.config import Limits
from llama.errors import InvalidRequest
from llama.tokenizer import check_text

Endpoint = Literal["chat", "completions"]
Schema = dict[str, Any]
MAX_INTEGER = 1 << 31
LIST = (list, tuple)
DECIMAL = re.compile(r"0|[1-9][0-9]{0,9}")


@dataclass(frozen=True)
class Context:
    """What a value is checked against. vocab_size: token ids lie below it."""

    endpoint: Endpoint
    limits: Limits
    vocab_size: int


class Kind(Protocol):
    def check(self, name: str, value: Any, context: Context) -> Any: ...

    def schema(self, context: Context) -> Schema: ...


@dataclass(frozen=True)
class Plain:
    """Any value of one type, as Python and as JSON Schema call it."""

    python: type
    json: str

    def check(self, name: str, value: Any, context: Context) -> Any:
        _expect(self.python, name, value, f"a {self.json}")
        return value

    def schema(self, context: Context) -> Schema:
        return {"type": self.json}


BOOLEAN, STRING = Plain(bool, "boolean"), Plain(str, "string")


@dataclass(frozen=True)
class Integer:
    """A whole number from low to high. high: a number, or the name of the field of `Limits` that holds it."""

    low: int
    high: int | str

    def check(self, name: str, value: Any, context: Context) -> int:
        # `type`, not isinstance: True is no integer, nor is 1.0.
        if type(value) is not int:
            raise bad_type(name, value, "an integer")
        high = self._ceiling(context.limits)
        if not self.low <= value <= high:
            raise bad_value(name, value, f"must be from {self.low} to {high}")
        return value

    def schema(self, context: Context) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self._ceiling(context.limits)}

    def _ceiling(self, limits: Limits) -> int:
        return getattr(limits, self.high) if isinstance(self.high, str) else self.high


@dataclass(frozen=True)
class Number:
    """A finite number from low to high. above: low itself is excluded."""

    low: float
    high: float
    above: bool = False

    def check(self, name: str, value: Any, context: Context) -> float:
        if type(value) not in (int, float):
            raise bad_type(name, value, "a number")
        if not self.low <= value <= self.high or (self.above and value == self.low) or math.isnan(value):
            limit = f"above {self.low} up to {self.high}" if self.above else f"from {self.low} to {self.high}"
            raise bad_value(name, value, f"must be {limit}")
        return float(value)

    def schema(self, context: Context) -> Schema:
        return {"type": "number", "exclusiveMinimum" if self.above else "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class ByEndpoint:
    """One kind for chat, another for completions."""

    chat: Kind
    completions: Kind

    def check(self, name: str, value: Any, context: Context) -> Any:
        return self._of(context.endpoint).check(name, value, context)

    def schema(self, context: Context) -> Schema:
        return self._of(context.endpoint).schema(context)

    def _of(self, endpoint: Endpoint) -> Kind:
        return self.chat if endpoint == "chat" else self.completions


@dataclass(frozen=True)
class Only:
    """One of a few values; any other is refused with a message. or_nothing: values that ask for nothing pass, too."""

    values: tuple[Any, ...]
    refusal: str
    or_nothing: bool = True

    def check(self, name: str, value: Any, context: Context) -> Any:
        if value not in self.values and not (self.or_nothing and asks_nothing(value)):
            raise unsupported(name, self.refusal)
        return value

    def schema(self, context: Context) -> Schema:
        return {"enum": list(self.values)}


class StopStrings:
    """One string or a list of them."""

    def check(self, name: str, value: Any, context: Context) -> list[str]:
        texts, limits = [value] if isinstance(value, str) else value, context.limits
        _expect(LIST, name, texts, "a string or a list of strings")
        _check_count(name, texts, limits.stop, "stop strings")
        for text in texts:
            _expect(str, name, text, "a string or a list of strings")
            if not 1 <= len(text) <= limits.stop_chars:
                raise bad_value(name, text, f"a stop string has 1 to {limits.stop_chars} characters")
            try:
                check_text(text, name)
            except InvalidRequest as error:
                raise bad_value(name, error.value, error.limit) from error
        return list(texts)

    def schema(self, context: Context) -> Schema:
        text = {"type": "string", "minLength": 1, "maxLength": context.limits.stop_chars}
        return {"anyOf": [text, _array(text, 0, context.limits.stop)]}


class TokenIds:
    """A list of token ids."""

    def check(self, name: str, value: Any, context: Context) -> list[int]:
        _expect(LIST, name, value, "a list of token ids")
        _check_count(name, value, context.limits.stop_token_ids, "ids")
        return [token_id(name, item, context) for item in value]

    def schema(self, context: Context) -> Schema:
        return _array(_token_schema(context), 0, context.limits.stop_token_ids)


class Biases:
    """An object of token id, in decimal, to the number that is added to the token's logit."""

    bias = Number(-100, 100)

    def check(self, name: str, value: Any, context: Context) -> dict[int, float]:
        _expect(Mapping, name, value, "an object of token id to bias")
        _check_count(name, value, context.limits.logit_bias, "entries")
        biases: dict[int, float] = {}
        for key, bias in value.items():
            if isinstance(key, str):
                if not DECIMAL.fullmatch(key):
                    raise bad_value(name, key, "keys are token ids in decimal")
                key = int(key)
            if token_id(name, key, context) in biases:
                raise bad_value(name, key, "this token id is given twice")
            biases[key] = self.bias.check(name, bias, context)
        return biases

    def schema(self, context: Context) -> Schema:
        return {
            "type": "object",
            "patternProperties": {f"^({DECIMAL.pattern})$": self.bias.schema(context)},
            "additionalProperties": False,
            "maxProperties": context.limits.logit_bias,
        }


class Prompts:
    """One prompt or several; texts or ids, not both."""

    def check(self, name: str, value: Any, context: Context) -> list[str | list[int]]:
        if isinstance(value, str):
            return [value]
        _expect(LIST, name, value, "a string, a list of strings, a list of token ids or a list of such lists")
        if not value:
            raise bad_value(name, value, "at least one prompt is needed")
        if not isinstance(value[0], (str, list, tuple)):
            return [_id_prompt(name, value, context)]
        _check_count(name, value, context.limits.sequences, "prompts")
        if isinstance(value[0], str):
            return [STRING.check(name, text, context) for text in value]
        return [_id_prompt(name, ids, context) for ids in value]

    def schema(self, context: Context) -> Schema:
        most = context.limits.sequences
        text = STRING.schema(context)
        ids: Schema = {"type": "array", "items": _token_schema(context), "minItems": 1}
        return {"anyOf": [text, _array(text, 1, most), ids, _array(ids, 1, most)]}


class Messages:
    """Objects with role and content, or an answer's message. `llama.chat` checks order, roles and tags in the text."""

    def check(self, name: str, value: Any, context: Context) -> list[Mapping[str, Any]]:
        _expect(LIST, name, value, "a list of messages")
        if not 1 <= len(value) <= context.limits.messages:
            raise bad_value(name, len(value), f"must have 1 to {context.limits.messages} messages")
        return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]

    def schema(self, context: Context) -> Schema:
        text = STRING.schema(context)
        role = {"type": "string", "enum": ["system", "developer", "user", "assistant"]}
        part = object_schema(type={"const": "text"}, text=text)
        content = {"anyOf": [text, {"type": "array", "items": part, "minItems": 1}]}
        return _array(object_schema(role=role, content=content), 1, context.limits.messages)


class StreamOptions:
    """An object; only include_usage is acted on."""

    def check(self, name: str, value: Any, context: Context) -> dict[str, Any]:
        _expect(Mapping, name, value, "an object")
        if value.get("include_usage") is not None:
            BOOLEAN.check(f"{name}.include_usage", value["include_usage"], context)
        return dict(value)

    def schema(self, context: Context) -> Schema:
        return {"type": "object", "properties": {"include_usage": BOOLEAN.schema(context)}}


class ResponseFormat:
    """An object whose type is text."""

    def check(self, name: str, value: Any, context: Context) -> None:
        _expect(Mapping, name, value, "an object")
        if value.get("type") in ("json_object", "json_schema"):
            raise unsupported(name, "JSON output needs the extra 'guided', which is not installed.")
        if value.get("type") != "text":
            raise bad_value(f"{name}.type", value.get("type"), "must be 'text'")

    def schema(self, context: Context) -> Schema:
        return object_schema(type={"const": "text"})


def token_id(name: str, value: Any, context: Context) -> int:
    """A whole number that is a token id of the model. Raises BadRequestError."""
    if type(value) is not int:
        raise bad_type(name, value, "token ids")
    if not 0 <= value < context.vocab_size:
        raise bad_value(name, value, f"token ids go from 0 to {context.vocab_size - 1}")
    return value


def object_schema(**properties: Schema) -> Schema:
    """The JSON Schema of an object whose properties are all required."""
    return {"type": "object", "required": list(properties), "properties": properties}


def missing(name: str) -> BadRequestError:
    """400 for a field that is required."""
    return BadRequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def asks_nothing(value: Any) -> bool:
    """Whether a value is the same as leaving the field out: null, false, or empty."""
    return value is None or value is False or (isinstance(value, (str, Sequence, Mapping)) and not len(value))


def _message(name: str, message: Any) -> Mapping[str, Any]:
    if isinstance(message, BaseModel):
        message = message.model_dump(exclude_none=True)
    _expect(Mapping, name, message, "an object with role and content")
    for key in ("role", "content"):
        if message.get(key) is None:
            raise missing(f"{name}.{key}")
    _expect(str, f"{name}.role", message["role"], "a string")
    for key in ("tool_calls", "function_call", "tool_call_id"):
        if not asks_nothing(message.get(key)):
            raise unsupported(f"{name}.{key}", "Tool calls are not supported by this model.")
    content = message["content"]
    _expect((str, *LIST), f"{name}.content", content, "a string or a list of text parts")
    for i, part in enumerate([] if isinstance(content, str) else content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise unsupported(f"{name}.content[{i}].type", "Only text parts are supported by this model.")
    return message


def _id_prompt(name: str, value: Any, context: Context) -> list[int]:
    _expect(LIST, name, value, "a list of token ids, like the ones before it")
    if not value:
        raise bad_value(name, value, "a prompt of ids needs at least one")
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) < context.vocab_size:
        return list(value)  # long prompts are checked in event loops, so at the speed of C
    return [token_id(name, item, context) for item in value]


def _expect(kind: type | tuple[type, ...], name: str, value: Any, what: str) -> None:
    if not isinstance(value, kind):
        raise bad_type(name, value, what)


def _check_count(name: str, items: Sequence[Any] | Mapping[Any, Any], most: int, what: str) -> None:
    if len(items) > most:
        raise bad_value(name, len(items), f"at most {most} {what}")


def _token_schema(context: Context) -> Schema:
    return Integer(0, context.vocab_size - 1).schema(context)


def _array(items: Schema, low: int, high: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}
