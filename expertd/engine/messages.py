"""What the supervisor and rank 0 say to each other: plain values, and their framing in bytes.

A frame is a 4-byte big-endian length and that many bytes of msgpack, a map whose key "op" names the
message class. Nothing here does I/O: `encode` gives bytes, `Decoder.feed` takes them as they come.

    supervisor -> rank   Setup (first, once), Submit, Cancel
    rank -> supervisor   Ready or Fatal (once); then, from rank 0, per request: Started, Token..., and
                         one of Done, Rejected (the request is wrong), Failed (we are)
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

from expertd.errors import RemoteProtocolError

# A request carries a prompt; 64 MiB is far above any context length and far below any memory.
MAX_FRAME_BYTES = 64 << 20


@dataclass(frozen=True)
class Setup:
    """The first frame to each rank: who it is and what it serves. `group` is GroupConfig as a map."""

    rank: int
    mailbox_fd: int
    lifeline_fd: int
    group: dict[str, Any]


@dataclass(frozen=True)
class Submit:
    """One request; exactly one of `prompt` (raw text) and `messages` (for the chat template) is given.

    `seed` None means an arbitrary one. `logits_file` asks rank 0 to write the float32 logits of every
    generated position there, as safetensors: "logits" [num_tokens, vocab].
    """

    request_id: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    ignore_end: bool = False
    logits_file: str | None = None


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass(frozen=True)
class Ready:
    """The rank has loaded the checkpoint. `splits` are those that this model's family supports."""

    rank: int
    family: str = ""
    context_length: int = 0
    vocab_size: int = 0
    num_experts: int = 0
    top_k: int = 0
    splits: list[str] = field(default_factory=list)
    load_s: float = 0.0


@dataclass(frozen=True)
class Fatal:
    """The rank cannot go on; `kind` is the class name of an ExpertdError."""

    rank: int
    kind: str
    message: str


@dataclass(frozen=True)
class Started:
    request_id: str
    prompt_tokens: int


@dataclass(frozen=True)
class Token:
    """Newly generated token ids, and the text that became final with them (often empty, never torn)."""

    request_id: str
    token_ids: list[int]
    text: str


@dataclass(frozen=True)
class Done:
    """The end of a request; `finish_reason` is "stop", "length" or "cancelled".

    `prefill_tokens_per_s` counts prompt tokens until the first token is sampled,
    `decode_tokens_per_s` the tokens after the first (0 when there is none).
    """

    request_id: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    split: str
    ranks: int


@dataclass(frozen=True)
class Rejected:
    request_id: str
    message: str


@dataclass(frozen=True)
class Failed:
    request_id: str
    message: str


Message = Setup | Submit | Cancel | Ready | Fatal | Started | Token | Done | Rejected | Failed
_CLASSES: dict[str, Any] = {c.__name__.lower(): c for c in Message.__args__}


def encode(message: Message) -> bytes:
    """Give the frame of one message."""
    body = msgpack.packb({"op": type(message).__name__.lower(), **asdict(message)})
    return len(body).to_bytes(4, "big") + body


class Decoder:
    """Turns received bytes into messages, whatever the pieces they come in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield each message that `data` completes.

        Raises RemoteProtocolError when the bytes are no frame of ours; the connection is then dead.
        """
        self._buffer += data
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > MAX_FRAME_BYTES:
                raise RemoteProtocolError(f"frame of {size} bytes, at most {MAX_FRAME_BYTES} allowed")
            if len(self._buffer) < 4 + size:
                return
            body = bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            yield _parse(body)


def _parse(body: bytes) -> Message:
    try:
        values = msgpack.unpackb(body)
        message: Message = _CLASSES[values.pop("op")](**values)
    except Exception as e:
        raise RemoteProtocolError(f"not a message of ours: {e}") from e
    return message
