"""`document`: the OpenAPI description of the endpoints that generate, from the table of arguments and `api.schema`."""

from __future__ import annotations

from collections.abc import Sequence

from api.arguments import ENDPOINTS, TABLE, Action
from api.checks import STRING, Context, Endpoint, Schema, object_schema
from api.schema import ChatCompletion, Completion
from llama.config import Limits

PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
REFUSALS = {400: "the body is wrong", 401: "no known key", 404: "no such model", 413: "too large", 429: "no free slot"}
TEXT: Schema = {"type": "string"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
ERROR = object_schema(error=object_schema(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL))


def document(names: Sequence[str], limits: Limits, vocab_size: int, version: str) -> Schema:
    """OpenAPI 3.1. names: of all models; limits, vocab_size: of the first."""
    components = {"Error": ERROR}
    paths = {}
    for endpoint in ENDPOINTS:
        operation = _operation(endpoint, _body(names, Context(endpoint, limits, vocab_size)), components)
        paths[PATHS[endpoint]] = {"post": operation}
    security = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama-slots", "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": security},
        "security": [{}, {"key": []}],
    }


def _body(names: Sequence[str], context: Context) -> Schema:
    """A request's fields, as the table says; those that are not required may be null."""
    required = ["model", "messages" if context.endpoint == "chat" else "prompt"]
    properties: Schema = {}
    for row in TABLE[context.endpoint].values():
        if row.action is Action.HONOURED and row.kind is not None:
            schema = row.kind.schema(context)
            properties[row.name] = schema if row.name in required else {"anyOf": [schema, {"type": "null"}]}
    properties["model"] = STRING.schema(context) | {"enum": list(names)}
    return {"type": "object", "required": required, "properties": properties}


def _operation(endpoint: Endpoint, body: Schema, components: Schema) -> Schema:
    """One endpoint; the objects it answers with are added to `components`."""
    answer = ChatCompletion if endpoint == "chat" else Completion
    schema = answer.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    components |= schema.pop("$defs")
    components[answer.__name__] = schema
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
