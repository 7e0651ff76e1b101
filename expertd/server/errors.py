"""Errors as OpenAI clients expect them: a status, and one JSON object that says what to change."""

import re
from typing import Any

from starlette.responses import JSONResponse, Response

from expertd.errors import BusyError, ConfigError, ExpertdError, NotFoundError

# Of a message, in characters; ours are shorter, but for what a client sent.
MAX_MESSAGE = 2000
# The engine's messages begin with the parameter that is wrong, if one is.
_PARAM = re.compile(r"([a-z_]+): ")


class ApiError(Exception):
    """An answer to a wrong request; `param` names the field as the client wrote it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def as_api_error(error: ExpertdError) -> ApiError:
    """Give the HTTP face of one of our errors: 400 where the request is wrong, 404 where it names nothing that we know,
    429 where it is one too many, 503 where we are wrong."""
    message = str(error)
    if isinstance(error, NotFoundError):
        return ApiError(404, message)
    status = 400 if isinstance(error, ConfigError) else 429 if isinstance(error, BusyError) else 503
    named = _PARAM.match(message) if status == 400 else None
    return ApiError(
        status, message, named[1] if named else None, "rate_limit_exceeded" if status == 429 else None
    )


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON object that carries an error, in a response or in an event of a stream."""
    message, param = sendable(error.message), sendable(error.param) if error.param else None
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def sendable(text: str) -> str:
    """A text of the client's as an error may repeat it: not for ever, and in UTF-8."""
    # A name from the client's JSON may hold half of a surrogate pair, which UTF-8 cannot carry.
    return text[:MAX_MESSAGE].encode(errors="replace").decode()


def error_response(error: ApiError) -> Response:
    """The response that carries an error."""
    return JSONResponse(error_body(error), status_code=error.status, headers=retry_headers(error.status))


def retry_headers(status: int) -> dict[str, str]:
    """When to ask again, if that may help."""
    return {"retry-after": "1"} if status in (429, 503) else {}
