"""Coverage-guided fuzzing of the decoder: `make fuzz` (needs atheris). tests/test_wire.py uses the same messages.

Any exception but RemoteProtocolError is a finding; libFuzzer leaves the bytes in a file.
"""

import sys
from dataclasses import dataclass, field

from expertd.errors import RemoteProtocolError
from expertd.wire import Codec

LIMIT = 1 << 16


@dataclass(frozen=True)
class Inner:
    a: int
    b: list[float]


@dataclass(frozen=True)
class One:
    number: int
    text: str
    data: bytes = b""
    maybe: str | None = None


@dataclass(frozen=True)
class Many:
    inner: list[Inner]
    table: dict[str, int]
    pair: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Nothing:
    names: list[str] = field(default_factory=list)


codec = Codec(One | Many | Nothing, LIMIT)
MESSAGES = [
    Nothing(),
    One(7, "seven é 漢", b"\x00\xff", "x"),
    One(-(2**63), ""),
    One(2**64 - 1, "y" * 1000),
    Many([Inner(1, [0.5, 1.0]), Inner(-2, [])], {"a": 1, "": 2}, (3, 4)),
    Nothing(["a", "b"]),
]


def decode(data: bytes) -> bool:
    """Feed bytes to a new decoder; whether it refused them."""
    try:
        for message in codec.decoder().feed(data):
            assert isinstance(message, One | Many | Nothing)
    except RemoteProtocolError:
        return True
    return False


def main() -> None:
    import atheris

    def one_input(data: bytes) -> None:
        decode(data)
        decode(len(data).to_bytes(4, "big") + data)

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
