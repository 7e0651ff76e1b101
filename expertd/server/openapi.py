"""The OpenAPI document, made from the endpoints and the types of their requests."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

import expertd
from expertd.server.parse import Body
from expertd.server.service import Service
from expertd.server.wire import Json

Handler = Callable[[Service, Request], Awaitable[Response]]

TEMPLATE = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}


@dataclass(frozen=True)
class Endpoint:
    """What answers `method` requests to `path`; `body` is the type of their JSON, None if there is none."""

    method: str
    path: str
    handle: Handler
    body: type[Body] | None = None
    query: tuple[str, ...] = ()
    streams: bool = False


def document(endpoints: list[Endpoint]) -> Json:
    """The document, version 3.1."""
    bodies = [e.body for e in endpoints if e.body]
    names, schema = models_json_schema([(body, "validation") for body in bodies], ref_template=TEMPLATE)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        reference = names[(endpoint.body, "validation")] if endpoint.body else None
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, reference)
    keys = {"bearer": {"type": "http", "scheme": "bearer"}}
    keys["header"] = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "expertd", "version": expertd.__version__},
        "paths": paths,
        "components": {"schemas": {**schema["$defs"], "Error": ERROR}, "securitySchemes": keys},
        "security": [{"bearer": []}, {"header": []}, {}],
    }


def _operation(endpoint: Endpoint, path: str, body: Any) -> Json:
    kinds = ["application/json", *(["text/event-stream"] if endpoint.streams else [])]
    error = {
        "description": "Why not.",
        "content": {"application/json": {"schema": {"$ref": TEMPLATE.format(model="Error")}}},
    }
    text = (endpoint.handle.__doc__ or "").split(". ")[0].strip().rstrip(".")
    operation: Json = {
        "summary": text,
        "operationId": endpoint.handle.__name__,
        "parameters": [*_parameters(endpoint, path)],
        "responses": {
            "200": {"description": "The answer.", "content": {kind: {} for kind in kinds}},
            "4XX": error,
            "5XX": error,
        },
    }
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _parameters(endpoint: Endpoint, path: str) -> list[Json]:
    inside = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [
        *({"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in inside),
        *({"name": n, "in": "query", "schema": {"type": "string"}} for n in endpoint.query),
    ]
