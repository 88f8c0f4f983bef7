"""`document`: the OpenAPI description of the endpoints that generate, for clients' generators and for tests.

Made from the table of arguments and the objects that answers are; what an argument may be stands here once more, as
JSON Schema, and a test sees that each has its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.arguments import TABLE, Action
from api.checks import MAX_INTEGER, Endpoint
from api.schema import ChatCompletion, Completion
from llama.config import Limits

Schema = dict[str, Any]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
REFUSALS = {400: "the body is wrong", 401: "no known key", 404: "no such model", 413: "too large", 429: "no free slot"}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(names: Sequence[str], limits: Limits, vocab_size: int, version: str) -> Schema:
    """OpenAPI 3.1. names: of all models; limits, vocab_size: of the first."""
    components = {"Error": ERROR}
    paths = {
        path: {"post": _operation(endpoint, names, limits, vocab_size, components)} for endpoint, path in PATHS.items()
    }
    security = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama-slots", "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": security},
        "security": [{}, {"key": []}],
    }


def argument_schemas(endpoint: Endpoint, limits: Limits, vocab_size: int) -> dict[str, Schema]:
    """For each argument of an endpoint that is acted on, what it may be, besides null."""

    def integer(low: int, high: int) -> Schema:
        return {"type": "integer", "minimum": low, "maximum": high}

    def number(low: float, high: float) -> Schema:
        return {"type": "number", "minimum": low, "maximum": high}

    def array(items: Schema, low: int, high: int) -> Schema:
        return {"type": "array", "items": items, "minItems": low, "maxItems": high}

    token, stop = integer(0, vocab_size - 1), TEXT | {"minLength": 1, "maxLength": limits.stop_chars}
    ids = {"type": "array", "items": token, "minItems": 1}
    role = {"type": "string", "enum": ["system", "developer", "user", "assistant"]}
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": TEXT}}
    content = {"anyOf": [TEXT, array(part, 1, 8)]}
    message = {"type": "object", "required": ["role", "content"], "properties": {"role": role, "content": content}}
    kind = {"type": "object", "required": ["type"], "properties": {"type": {"const": "text"}}}
    known: dict[str, Schema] = {
        "model": TEXT,
        "messages": array(message, 1, limits.messages),
        "prompt": {"anyOf": [TEXT, array(TEXT, 1, limits.sequences), ids, array(ids, 1, limits.sequences)]},
        "max_tokens": integer(1, MAX_INTEGER),
        "max_completion_tokens": integer(1, MAX_INTEGER),
        "n": integer(1, limits.n),
        "best_of": integer(1, limits.n),
        "seed": integer(-(1 << 63), (1 << 63) - 1),
        "stop": {"anyOf": [stop, array(stop, 0, limits.stop)]},
        "logit_bias": {
            "type": "object",
            "patternProperties": {"^(0|[1-9][0-9]{0,9})$": number(-100, 100)},
            "additionalProperties": False,
            "maxProperties": limits.logit_bias,
        },
        "logprobs": FLAG if endpoint == "chat" else integer(0, limits.completion_logprobs),
        "top_logprobs": integer(0, limits.logprobs),
        "stream_options": {"type": "object", "properties": {"include_usage": FLAG}},
        "response_format": kind,
        "modalities": {"const": ["text"]},
        "top_k": integer(-1, MAX_INTEGER),
        "repetition_penalty": number(0, 10) | {"exclusiveMinimum": 0},
        "min_tokens": integer(0, MAX_INTEGER),
        "stop_token_ids": array(token, 0, limits.stop_token_ids),
    }
    known |= dict.fromkeys(("temperature",), number(0, 2)) | dict.fromkeys(("top_p", "min_p"), number(0, 1))
    known |= dict.fromkeys(("presence_penalty", "frequency_penalty"), number(-2, 2))
    flags = ("echo", "stream", "ignore_eos", "return_token_ids", "explain", "strict")
    known |= dict.fromkeys((*flags, "add_special_tokens", "parse_special"), FLAG)
    honoured = [name for name, row in TABLE[endpoint].items() if row.action is Action.HONOURED]
    return {name: known[name] for name in honoured}


def _operation(
    endpoint: Endpoint, names: Sequence[str], limits: Limits, vocab_size: int, components: dict[str, Schema]
) -> Schema:
    """One endpoint; the objects it answers with are added to `components`."""
    answer = ChatCompletion if endpoint == "chat" else Completion
    made = answer.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    components |= made.pop("$defs")
    components[answer.__name__] = made
    required = ["model", "messages" if endpoint == "chat" else "prompt"]
    properties = {
        name: one if name in required else {"anyOf": [one, {"type": "null"}]}
        for name, one in argument_schemas(endpoint, limits, vocab_size).items()
    }
    properties["model"] = TEXT | {"enum": list(names)}
    body = {"type": "object", "required": required, "properties": properties}
    good = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{answer.__name__}"}},
        "text/event-stream": {"schema": TEXT},
    }
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Schema] = {"200": {"description": "the answer, or its chunks", "content": good}}
    responses |= {str(status): {"description": why, "content": refused} for status, why in REFUSALS.items()}
    return {
        "operationId": endpoint,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": responses,
    }
