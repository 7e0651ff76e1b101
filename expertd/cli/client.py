"""A running server as the command line sees it: asked by URL, with a key if it wants one."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from expertd.errors import ClusterError, ConfigError, ExpertdError

if TYPE_CHECKING:
    import httpx2

F = TypeVar("F", bound=Callable[..., Any])

SERVER = "http://127.0.0.1:8080"
ANSWER_TIMEOUT_S = 10.0
# Between two tokens; a long prompt may be read for minutes, and the server itself gives up on what hangs.
TOKEN_TIMEOUT_S = 1800.0


def client_options(command: F) -> F:
    """Add --server and --api-key."""
    server = click.option(
        "--server", default=SERVER, show_default=True, metavar="URL", help="A running server."
    )
    key = click.option(
        "--api-key",
        envvar="EXPERTD_API_KEY",
        show_envvar=True,
        default="",
        metavar="KEY",
        help="If it asks for one.",
    )
    return server(key(command))


@dataclass(frozen=True)
class Client:
    """Every call raises ClusterError when the server does not answer, ConfigError when it refuses what was asked."""

    url: str
    key: str = ""

    def __post_init__(self) -> None:
        try:
            right = urlsplit(self.url).scheme in ("http", "https") and urlsplit(self.url).hostname
        except ValueError:
            right = None
        if not right:
            raise ConfigError(f"--server {self.url}: wanted an address such as {SERVER}.")

    def status(self, experts: bool = False, since: int = 0) -> dict[str, Any]:
        """/status.json."""
        return self._get(f"/status.json?since={since}&experts={'yes' if experts else 'no'}")

    def model(self) -> str:
        """The id of the model that is served."""
        models = self._get("/v1/models")["data"]
        if not models:
            raise ClusterError(f"{self.url} serves no model yet. Try again later.")
        return str(models[0]["id"])

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Ask, and yield the events of the answer; closing the iterator cancels the request."""
        with self._asked("POST", path, TOKEN_TIMEOUT_S, json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ClusterError(str(event["error"]["message"]))
                yield event

    def _get(self, path: str) -> dict[str, Any]:
        with self._asked("GET", path, ANSWER_TIMEOUT_S) as response:
            response.read()
            found: dict[str, Any] = response.json()
            return found

    @contextmanager
    def _asked(self, method: str, path: str, timeout_s: float, **body: Any) -> "Iterator[httpx2.Response]":
        import httpx2

        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx2.Timeout(ANSWER_TIMEOUT_S, read=timeout_s)
        try:
            # One request, then no more: a connection that is kept would outlive a server that restarts.
            with (
                httpx2.Client(timeout=timeout, headers=headers) as client,
                client.stream(method, self.url.rstrip("/") + path, **body) as response,
            ):
                if response.is_error:
                    response.read()
                    raise _refusal(self.url, response)
                yield response
        except (httpx2.HTTPError, ValueError) as e:
            raise ClusterError(
                f"{self.url}: {_reason(e)}. Is `expertd serve` running there? See --server."
            ) from e


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refusal(url: str, response: "httpx2.Response") -> ExpertdError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}; something answers there, but not expertd"
    if response.status_code == 401:
        return ConfigError(f"{url}: {message} Give it with --api-key or EXPERTD_API_KEY.")
    return ConfigError(message) if response.status_code < 500 else ClusterError(message)
