"""Messages between processes and hosts: dataclasses on one side, framed msgpack on the other. No I/O.

A frame is a 4-byte big-endian length and that many bytes of msgpack, a map whose key "op" names the message's
class. The bytes may come from a stranger, so lengths are bounded before anything is allocated, and every field's
type is checked before a message exists.
"""

import struct
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Union, get_args

import msgpack
import msgspec

from expertd.errors import RemoteProtocolError

_LENGTH = struct.Struct(">I")


class Codec:
    """Encodes and decodes the messages of one conversation: `Codec(A | B | C)`.

    `max_frame_bytes` bounds a frame. Fields must be plain types, lists, dicts or dataclasses of these: msgpack knows
    no tuples, so what is declared a tuple arrives as one only because the types are known here.
    """

    def __init__(self, messages: Any, max_frame_bytes: int) -> None:
        classes = get_args(messages) or (messages,)
        self.max_frame_bytes = max_frame_bytes
        self._names: dict[type, str] = {c: c.__name__.lower() for c in classes}
        self._classes: dict[str, type] = {name: c for c, name in self._names.items()}
        self._fields = {c: frozenset(f.name for f in fields(c)) for c in classes}

    def extended(self, *classes: type) -> "Codec":
        """The same conversation with more messages, for a layer below that has some of its own."""
        return Codec(Union[(*self._names, *classes)], self.max_frame_bytes)

    def encode(self, message: Any) -> bytes:
        """Give the frame of one message. Raises KeyError for a class that is not of this conversation."""
        values = {"op": self._names[type(message)], **msgspec.to_builtins(message, builtin_types=(bytes,))}
        # Not msgpack.packb, which asks for 256 KiB each time: where glibc gave and took these back at the end of the
        # heap, a message cost 130 us instead of 5, in some processes and not in others.
        body = msgspec.msgpack.encode(values)
        return len(body).to_bytes(4, "big") + body

    def decoder(self) -> "Decoder":
        """A decoder for one connection."""
        return Decoder(self)

    def parse(self, body: bytes | bytearray) -> Any:
        """Give the message of one frame's body. Raises RemoteProtocolError when it is none of ours."""
        try:
            values = msgpack.unpackb(body, max_ext_len=0)
            message_class = self._classes[values.pop("op")]
            known = self._fields[message_class]
            if not values.keys() <= known:
                raise ValueError(f"unknown field {sorted(values.keys() - known)[0]}")
            return msgspec.convert(values, message_class)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            msgpack.UnpackException,
        ) as e:
            reason = " ".join(str(e).split())[:200]
            raise RemoteProtocolError(f"not a message of ours: {type(e).__name__}: {reason}") from None


class Decoder:
    """Turns received bytes into messages, whatever the pieces they come in."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield each message that `data` completes.

        Raises RemoteProtocolError when the bytes are no frame of ours; the connection is then of no further use.
        """
        buffer, at = self._buffer, 0
        buffer += data
        try:
            while len(buffer) - at >= 4:
                (size,) = _LENGTH.unpack_from(buffer, at)
                if size > self._codec.max_frame_bytes:
                    raise RemoteProtocolError(
                        f"frame of {size} bytes, at most {self._codec.max_frame_bytes} are allowed"
                    )
                if len(buffer) - at < 4 + size:
                    return
                at += 4 + size
                yield self._codec.parse(buffer[at - size : at])
        finally:
            del buffer[:at]
