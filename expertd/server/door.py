"""What stands before every endpoint: request ids, API keys, and a line in the log for each request."""

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertd.config import DoorConfig
from expertd.server.errors import ApiError
from expertd.server.keys import find_key

# Open to everybody: the page's own text, and whether the server lives, without details.
OPEN = {"/", "/health"}
# Of a prompt in the log.
MAX_LOGGED_BYTES = 64 << 10
# Ids that come from a client stay in one line of a log.
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Refuse = Callable[[str, ApiError], Response]

_log = logging.getLogger(__name__)


def guard(app: ASGIApp, config: DoorConfig, refuse: Refuse) -> ASGIApp:
    """Put the door before an app; `refuse` makes an error's response, given the path that was asked for."""
    guarded: ASGIApp = Door(app, config, refuse)
    if config.cors_origins:
        # Outside: a browser's preflight has no key.
        guarded = CORSMiddleware(
            guarded,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return guarded


class Door:
    def __init__(self, app: ASGIApp, config: DoorConfig, refuse: Refuse) -> None:
        self._app, self._config, self._refuse = app, config, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send, self._config.log_prompts)
        known = self._key_of(Headers(scope=scope))
        scope.setdefault("state", {})["known"] = known is not None
        try:
            if known is None and scope["path"] not in OPEN:
                message = "no valid API key. Send one as `Authorization: Bearer KEY` or `x-api-key: KEY`."
                await self._refuse(scope["path"], ApiError(401, message, code="invalid_api_key"))(
                    scope, receive, visit.send
                )
            else:
                await self._app(scope, visit.receive, visit.send)
        finally:
            if self._config.log_json:
                write_log(visit.line(known))

    def _key_of(self, headers: Headers) -> str | None:
        """Whose key came with a request: "" for anybody's where there are none, None if it is wrong or missing."""
        if not self._config.keys:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return find_key(self._config.keys, key)


class _Visit:
    """One request and its response, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, keep_body: bool) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._keep_body = keep_body
        self._began = time.monotonic()
        self._body = bytearray()
        self._status, self._num_bytes = 0, 0
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

    async def receive(self) -> Message:
        message = await self._receive()
        if self._keep_body and message["type"] == "http.request":
            self._body += message.get("body", b"")[: MAX_LOGGED_BYTES - len(self._body)]
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self._status == 401:
                headers["www-authenticate"] = "Bearer"
        elif message["type"] == "http.response.body":
            self._num_bytes += len(message.get("body", b""))
        return self._send(message)

    def line(self, key: str | None) -> dict[str, Any]:
        """What the log says of it; status 0: the client left before there was one."""
        client = self._scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.request_id,
            "client": client[0] if client else None,
            "key": key or None,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self._status,
            "seconds": round(time.monotonic() - self._began, 4),
            "response_bytes": self._num_bytes,
        }
        if self._keep_body:
            line["request"] = bytes(self._body).decode(errors="replace")
        return line


def write_log(line: dict[str, Any]) -> None:
    """One JSON object on standard error; whoever closed that gets none."""
    try:
        print(json.dumps(line, ensure_ascii=True), file=sys.stderr, flush=True)
    except (OSError, ValueError) as e:
        _log.debug("no log: %s", e)
