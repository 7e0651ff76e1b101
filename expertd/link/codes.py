"""What the C side's codes mean here: the one place where they become exceptions."""

from typing import Any

from expertd.errors import (
    ClusterError,
    ExpertdError,
    LinkDown,
    LinkTimeout,
    LocalProtocolError,
    RemoteProtocolError,
)
from expertd.native._transport import ffi, lib

_ERRORS: dict[str, type[ExpertdError]] = {
    "XD_TIMEOUT": LinkTimeout,
    "XD_PEER_DEAD": LinkDown,
    "XD_POISONED": LinkDown,
    "XD_MISMATCH": RemoteProtocolError,
    "XD_DIVERGED": RemoteProtocolError,
    "XD_TOO_LARGE": LocalProtocolError,
    "XD_LOST": LinkDown,
    "XD_CORRUPT": RemoteProtocolError,
    "XD_CLOSED": LinkDown,
    "XD_SILENT": LinkDown,
    "XD_DEVICE": LinkDown,
    "XD_UNAVAILABLE": ClusterError,
}
_NAMES: dict[int, str] = {getattr(lib, name): name for name in _ERRORS}
_REASON_BYTES = 400  # the longest reason that C keeps


def name(code: int) -> str:
    """The name of a failure in C, such as "XD_SILENT"."""
    return _NAMES[code]


def error(code: int, reason: str) -> ExpertdError:
    """The exception for a failure, to be raised."""
    return _ERRORS[_NAMES[code]](reason)


def buffer() -> Any:
    """Room for a reason: C takes it and its len."""
    return ffi.new("char[]", _REASON_BYTES)


def text(err: Any) -> str:
    """A reason that C wrote."""
    return str(ffi.string(err).decode(errors="replace"))
