"""OpenAI's Responses, endpoints: create, and what can be done with a stored response on any host that knows it."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from expertd.cluster.transcripts import Transcript
from expertd.engine.messages import Submit
from expertd.errors import ExpertdError, NotFoundError
from expertd.server.errors import ApiError, as_api_error
from expertd.server.parse import parse_request
from expertd.server.response_events import ResponseEvents
from expertd.server.responses import ResponsesRequest, events_from_note, said_before
from expertd.server.service import Service, our_bug
from expertd.server.stream import EventStream, read_body, while_connected
from expertd.server.wire import Event, Json, encode_named

EngineEvents = AsyncGenerator[Event, None]


async def create(service: Service, request: Request) -> Response:
    """POST /v1/responses."""
    wanted = parse_request(ResponsesRequest, await read_body(request))
    service.check_model(wanted.model)
    dialect, before = service.dialect, _said_before(service, wanted.previous_response_id)
    base = wanted.base(f"resp_{uuid.uuid4().hex}", int(time.time()), service.config.model_id)
    submit = wanted.to_submit(base, before, dialect)
    built = ResponseEvents(base, wanted.to_chat(before).splitter(dialect), wanted.logprobs)
    events = service.generate(submit)
    if wanted.stream:
        return await _streamed(request, events, built, -1)
    try:
        await while_connected(request.receive, _collect(events, built, only_first=wanted.background))
    except ClientDisconnect:
        _forget_unread(service, submit)
        raise
    return JSONResponse(built.response())


async def show(service: Service, request: Request) -> Response:
    """GET /v1/responses/{response_id}; with `stream=true` its events, those after number `starting_after`."""
    transcript, built = _find(service, request.path_params["response_id"])
    if request.query_params.get("stream") != "true":
        return JSONResponse(_as_it_is(transcript, built))
    after = request.query_params.get("starting_after", "-1")
    if not after.removeprefix("-").isdecimal() or len(after) > 18:
        message = f"starting_after: found {after[:40]!r}; wanted the sequence_number of an event."
        raise ApiError(400, message, "starting_after")
    return await _streamed(request, service.alive().resume(transcript.request_id), built, int(after))


async def cancel(service: Service, request: Request) -> Response:
    """POST /v1/responses/{response_id}/cancel; one that has ended is only shown. A cancelled one is forgotten."""
    transcript, built = _find(service, request.path_params["response_id"])
    shown = _as_it_is(transcript, built)
    if transcript.end is None:
        service.alive().requests.forget(transcript.request_id)
        shown = built.cancel()
    return JSONResponse(shown)


async def delete(service: Service, request: Request) -> Response:
    """DELETE /v1/responses/{response_id}; one that runs ends."""
    transcript, _ = _find(service, request.path_params["response_id"])
    service.alive().requests.forget(transcript.request_id)
    return JSONResponse({"id": transcript.request_id, "object": "response", "deleted": True})


def _find(service: Service, response_id: str) -> tuple[Transcript, ResponseEvents]:
    """A stored response, and what builds its answer from the beginning. Raises ApiError (404)."""
    transcript = service.alive().requests.kept.find(response_id)
    built = events_from_note(transcript.submit.note, service.dialect) if transcript else None
    if transcript is None or built is None:
        message = f"response_id: no response {response_id[:80]!r} is stored here, or not any more."
        raise ApiError(404, message, "response_id", "not_found")
    return transcript, built


def _as_it_is(transcript: Transcript, built: ResponseEvents) -> Json:
    for event in transcript.events[: transcript.num_committed]:
        built.take(event)
    if isinstance(transcript.end, ExpertdError):
        built.fail("server_error", str(transcript.end))
    return built.response()


def _said_before(service: Service, response_id: str | None) -> list[Json]:
    """The conversation up to and with an earlier response. Raises ApiError: 404, or 400 while that goes on."""
    if response_id is None:
        return []
    try:
        transcript, built = _find(service, response_id)
    except ApiError as e:
        raise ApiError(
            404, e.message.replace("response_id", "previous_response_id"), "previous_response_id"
        ) from e
    response = _as_it_is(transcript, built)
    if response["status"] not in ("completed", "incomplete"):
        message = f"previous_response_id: that response is {response['status']}. Wait for its end."
        raise ApiError(400, message, "previous_response_id")
    return said_before(transcript.submit, response)


def _forget_unread(service: Service, submit: Submit) -> None:
    """A client that left without a stream does not know the response's id: nobody will ask for it."""
    with suppress(NotFoundError):
        if submit.keep and service.cluster:
            service.cluster.requests.forget(submit.request_id)


async def _streamed(request: Request, events: EngineEvents, built: ResponseEvents, after: int) -> Response:
    pieces = _pieces(events, built, after)
    # Awaited here, the first event decides on the status; a later failure is an event of the stream.
    first = await while_connected(request.receive, _next(pieces))
    return EventStream(first, pieces)


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces)


async def _collect(events: EngineEvents, built: ResponseEvents, only_first: bool) -> None:
    """Read the answer; with `only_first`, that it has begun: a stored one goes on without a reader."""
    async with aclosing(events):
        async for event in events:
            built.take(event)
            if only_first:
                return


async def _pieces(events: EngineEvents, built: ResponseEvents, after: int) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield _encoded(built.take(await anext(events)), after)
        try:
            async for event in events:
                if piece := _encoded(built.take(event), after):
                    yield piece
        except ExpertdError as e:
            error = as_api_error(e)
            yield _encoded(built.fail(error.code or "server_error", error.message), after)
        except Exception as e:
            yield _encoded(built.fail("server_error", our_bug(e).message), after)


def _encoded(events: list[Json], after: int) -> bytes:
    return b"".join([encode_named(e) for e in events if e["sequence_number"] > after])
