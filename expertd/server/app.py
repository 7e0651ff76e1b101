"""The endpoints: a request in, events from the cluster out, in OpenAI's words."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from expertd.engine.messages import Ready
from expertd.errors import ExpertdError
from expertd.server import anthropic_api, responses_api
from expertd.server.anthropic import CountRequest, MessagesRequest
from expertd.server.chat import ChatRequest
from expertd.server.completions import CompletionRequest
from expertd.server.door import guard
from expertd.server.errors import ApiError, as_api_error, error_body, error_response
from expertd.server.fan import Events, generate_all
from expertd.server.openapi import Endpoint, document
from expertd.server.page import page_response
from expertd.server.parse import parse_request
from expertd.server.responses import ResponsesRequest
from expertd.server.service import Service, our_bug
from expertd.server.status import status
from expertd.server.stream import EventStream, read_body, while_connected
from expertd.server.tokens import DetokenizeRequest, TokenizeRequest, counted
from expertd.server.wire import END_OF_STREAM, Answer, Json, encode_event

# nginx's number for "the client left"; nobody reads it.
CLIENT_LEFT = 499


def make_app(service: Service) -> ASGIApp:
    """Build the ASGI app over a service, whose cluster may come later."""

    router = Router([Route(e.path, _Handler(service, e), methods=[e.method]) for e in ENDPOINTS])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = app  # so it raises what it does not find
        try:
            await router(scope, receive, send)
        except HTTPException as e:
            await _no_such_endpoint(scope, e)(scope, receive, send)

    return guard(app, service.config.door, _refused)


class _Handler:
    """An endpoint, for its route. All errors of it are answered here, so it needs none of the wrappers for errors that
    starlette puts around the `send` of functions and of its own app: three calls for each token."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self._service, self._endpoint = service, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._endpoint.handle(self._service, Request(scope, receive, send))
        response = await _answer_errors(answer, partial(_refused, self._endpoint.path))
        await response(scope, receive, send)


def _refused(path: str, error: ApiError) -> Response:
    """An error in the words of the API that the path belongs to."""
    return (anthropic_api.error_response if path.startswith("/v1/messages") else error_response)(error)


async def _answer_errors(answer: Awaitable[Response], refuse: Callable[[ApiError], Response]) -> Response:
    try:
        return await answer
    except ApiError as e:
        return refuse(e)
    except ExpertdError as e:
        return refuse(as_api_error(e))
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)
    except Exception as e:
        return refuse(our_bug(e))


def _no_such_endpoint(scope: Scope, error: HTTPException) -> Response:
    message = f"{scope['method']} {scope['path']}: {error.detail}. Try POST /v1/chat/completions."
    return _refused(scope["path"], ApiError(error.status_code, message))


async def chat(service: Service, request: Request) -> Response:
    """POST /v1/chat/completions."""
    wanted = parse_request(ChatRequest, await read_body(request))
    service.check_model(wanted.model)
    head, dialect = service.head("chatcmpl"), service.dialect
    events = generate_all(service, wanted.to_submits(head["id"], dialect))
    return await _respond(request, wanted, wanted.answer(head, dialect), events)


async def complete(service: Service, request: Request) -> Response:
    """POST /v1/completions."""
    wanted = parse_request(CompletionRequest, await read_body(request))
    service.check_model(wanted.model)
    head = service.head("cmpl")
    events = generate_all(service, wanted.to_submits(head["id"]))
    return await _respond(request, wanted, wanted.answer(head), events)


async def tokenize(service: Service, request: Request) -> Response:
    """POST /tokenize."""
    wanted = parse_request(TokenizeRequest, await read_body(request))
    service.check_model(wanted.model or service.config.model_id)
    submit = wanted.to_submit(service.head("tokenize")["id"], service.dialect)
    prompt = await while_connected(request.receive, counted(service.alive(), submit))
    return JSONResponse(wanted.answer(prompt, service.alive().ready.context_length))


async def detokenize(service: Service, request: Request) -> Response:
    """POST /detokenize."""
    wanted = parse_request(DetokenizeRequest, await read_body(request))
    service.check_model(wanted.model or service.config.model_id)
    submit = wanted.to_submit(service.head("detokenize")["id"])
    prompt = await while_connected(request.receive, counted(service.alive(), submit))
    return JSONResponse({"prompt": prompt.text})


async def _respond(
    request: Request, wanted: ChatRequest | CompletionRequest, answer: Answer, events: Events
) -> Response:
    if wanted.stream:
        pieces = _stream(events, answer, wanted.include_usage)
        # Awaited here, the first event decides on the status; a later failure is an event of the stream.
        first = await while_connected(request.receive, _next(pieces))
        return EventStream(first, pieces)
    await while_connected(request.receive, _collect(events, answer))
    return JSONResponse(answer.whole())


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces)


async def _collect(events: Events, answer: Answer) -> None:
    async with aclosing(events):
        async for index, event in events:
            answer.chunks(index, event, False)


async def _stream(events: Events, answer: Answer, usage: bool) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        index, event = await anext(events)
        yield _encoded(answer.chunks(index, event, usage))
        try:
            async for index, event in events:
                if chunks := answer.chunks(index, event, usage):
                    yield _encoded(chunks)
            yield (encode_event(answer.usage_chunk()) if usage else b"") + END_OF_STREAM
        except ExpertdError as e:
            yield encode_event(error_body(as_api_error(e)))
        except Exception as e:
            yield encode_event(error_body(our_bug(e)))


def _encoded(chunks: list[Json]) -> bytes:
    return b"".join(map(encode_event, chunks))


def _model(service: Service) -> dict[str, Any]:
    model_id, created = service.config.model_id, service.created
    return {"id": model_id, "object": "model", "created": created, "owned_by": "expertd"}


async def list_models(service: Service, request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def show_model(service: Service, request: Request) -> Response:
    """GET /v1/models/{model}."""
    service.check_model(request.path_params["model"])
    return JSONResponse(_model(service))


def _kernels(ready: Ready) -> dict[str, Any]:
    native = {"activation_bits": ready.activation_bits, "isa": ready.isa, "threads": ready.num_threads}
    return {"name": ready.kernels, **(native if ready.kernels == "native" else {})}


async def health(service: Service, request: Request) -> Response:
    """GET /health: 200 while requests are answered, as the last step showed, 503 otherwise; `group` is its state.

    Who has no key, where there are keys, gets the status alone.
    """
    group, cluster = service.config.group, service.cluster
    ready = cluster.ready if cluster else None
    status, reason = service.status
    body = {
        "status": status,
        "model": service.config.model_id,
        "ranks": group.num_ranks,
        "split": group.split,
        "context_length": ready.context_length if ready else None,
        "kernels": _kernels(ready) if ready else None,
        "uptime_s": round(time.monotonic() - service.started, 3),
        "last_step_s_ago": round(time.monotonic() - cluster.probe.last_step_at, 3) if cluster else None,
        "group": cluster.describe() if cluster else None,
        "hosts": service.hosts() if service.hosts else None,
    }
    if not request.state.known:
        body = {"status": status}
    elif reason:
        body["reason"] = reason
    return JSONResponse(body, status_code=200 if status == "ok" else 503)


async def metrics(service: Service, request: Request) -> Response:
    """GET /metrics, for Prometheus; `?experts=each` gives the counts of every expert of every layer instead."""
    accept, each = request.headers.get("accept", ""), request.query_params.get("experts") == "each"
    body, content_type = service.metrics.render(accept, each)
    return Response(body, media_type=content_type)


async def show_status(service: Service, request: Request) -> Response:
    """GET /status.json: all that the page shows; `?since=N&experts=no` leaves out what a reader has already."""
    since = request.query_params.get("since", "0")
    if not (since.isascii() and since.isdigit() and len(since) < 10):
        raise ApiError(
            400, f"since: {since[:20]!r} is no number of a point. Leave it out to get all.", "since"
        )
    experts = request.query_params.get("experts") != "no"
    return JSONResponse(status(service, int(since), experts), headers={"cache-control": "no-store"})


async def show_page(service: Service, request: Request) -> Response:
    """GET /: the page that shows what /status.json says, and a chat box."""
    return page_response()


async def openapi(service: Service, request: Request) -> Response:
    """GET /openapi.json: what this API takes, for programs."""
    return JSONResponse(document(ENDPOINTS))


ENDPOINTS = [
    Endpoint("POST", "/v1/chat/completions", chat, ChatRequest, streams=True),
    Endpoint("POST", "/v1/completions", complete, CompletionRequest, streams=True),
    Endpoint("POST", "/v1/responses", responses_api.create, ResponsesRequest, streams=True),
    Endpoint(
        "GET", "/v1/responses/{response_id}", responses_api.show, None, ("stream", "starting_after"), True
    ),
    Endpoint("DELETE", "/v1/responses/{response_id}", responses_api.delete),
    Endpoint("POST", "/v1/responses/{response_id}/cancel", responses_api.cancel),
    Endpoint("POST", "/v1/messages", anthropic_api.messages, MessagesRequest, streams=True),
    Endpoint("POST", "/v1/messages/count_tokens", anthropic_api.count_tokens, CountRequest),
    Endpoint("POST", "/tokenize", tokenize, TokenizeRequest),
    Endpoint("POST", "/detokenize", detokenize, DetokenizeRequest),
    Endpoint("GET", "/v1/models", list_models),
    Endpoint("GET", "/v1/models/{model:path}", show_model),
    Endpoint("GET", "/health", health),
    Endpoint("GET", "/metrics", metrics, None, ("experts",)),
    Endpoint("GET", "/openapi.json", openapi),
    Endpoint("GET", "/status.json", show_status, None, ("since", "experts")),
    Endpoint("GET", "/", show_page),
]
