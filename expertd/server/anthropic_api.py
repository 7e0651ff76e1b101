"""Anthropic's Messages, endpoints, and the errors as its clients expect them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from expertd.engine.messages import Submit
from expertd.errors import ExpertdError
from expertd.server.anthropic import CountRequest, MessagesRequest
from expertd.server.anthropic_events import MessageEvents
from expertd.server.errors import ApiError, as_api_error, retry_headers, sendable
from expertd.server.fan import Event, generate_all
from expertd.server.parse import parse_request
from expertd.server.service import Service, our_bug
from expertd.server.stream import EventStream, read_body, while_connected
from expertd.server.tokens import counted
from expertd.server.wire import Json, encode_named

# Anthropic's names of errors, by status; other 4xx are invalid requests, 5xx are of the API.
ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> Json:
    kind = ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": sendable(error.message)}}


def error_response(error: ApiError) -> Response:
    return JSONResponse(error_body(error), status_code=error.status, headers=retry_headers(error.status))


async def messages(service: Service, request: Request) -> Response:
    """POST /v1/messages."""
    wanted = parse_request(MessagesRequest, await read_body(request))
    service.check_model(wanted.model)
    dialect, message_id = service.dialect, service.head("msg")["id"].replace("-", "_")
    submit, chat = wanted.to_submit(message_id, dialect)
    built = MessageEvents(message_id, service.config.model_id, chat.splitter(dialect))
    if wanted.stream:
        pieces = _pieces(service, submit, built)
        # Awaited here, the first event decides on the status; a later failure is an event of the stream.
        first = await while_connected(request.receive, _next(pieces))
        return EventStream(first, pieces)
    await while_connected(request.receive, _collect(service, submit, built))
    return JSONResponse(built.message())


async def count_tokens(service: Service, request: Request) -> Response:
    """POST /v1/messages/count_tokens."""
    wanted = parse_request(CountRequest, await read_body(request))
    service.check_model(wanted.model)
    dialect = service.dialect
    source = wanted.to_chat(dialect).source(dialect)
    submit = Submit(service.head("count")["id"], echo=True, max_tokens=0, **source)
    prompt = await while_connected(request.receive, counted(service.alive(), submit))
    return JSONResponse({"input_tokens": len(prompt.token_ids)})


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces)


async def _collect(service: Service, submit: Submit, built: MessageEvents) -> None:
    async with aclosing(generate_all(service, [submit])) as events:
        async for _, event in events:
            built.take(event)


async def _pieces(service: Service, submit: Submit, built: MessageEvents) -> AsyncGenerator[bytes, None]:
    async with aclosing(generate_all(service, [submit])) as events:
        _, event = await anext(events)
        yield _encoded(built, event)
        try:
            async for _, event in events:
                if piece := _encoded(built, event):
                    yield piece
        except ExpertdError as e:
            yield encode_named(error_body(as_api_error(e)))
        except Exception as e:
            yield encode_named(error_body(our_bug(e)))


def _encoded(built: MessageEvents, event: Event) -> bytes:
    return b"".join(map(encode_named, built.take(event)))
