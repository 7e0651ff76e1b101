"""Coverage-guided fuzzing of what web servers answer and of safetensors headers (needs atheris); `make fuzz`.

Any exception but CheckpointError is a finding, and so are bytes of a number that nobody asked for; libFuzzer leaves the
input in a file. tests/checkpoint/test_fuzz.py uses the same code.
"""

import struct
import sys

import httpx2

from expertd.checkpoint.ranges import Limits, RemoteFile, WebReader
from expertd.checkpoint.shards import header_bytes, parse_header
from expertd.errors import CheckpointError

URL = "http://127.0.0.1/model/model.safetensors"
FILE = RemoteFile(URL, 1000, '"tag"')
NAMES = (
    "Content-Range",
    "ETag",
    "Last-Modified",
    "Location",
    "Retry-After",
    "Content-Encoding",
    "Content-Length",
)
STATUSES = (200, 206, 302, 307, 404, 416, 429, 503)
# What a good server says to the question of `answer`: an answer's status, its headers, and its body.
GOOD = b'\x01bytes 100-199/1000\n"tag"\n\n\n\n\n\n' + bytes(100)
HEADER = (
    b'{"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"format": "pt"}}'
)


def answer(data: bytes) -> bool:
    """Let a server answer `data` to requests for a range, a first piece and a small file; whether all were refused."""
    status = STATUSES[data[0] % len(STATUSES)] if data else 200
    *values, body = data[1:].split(b"\n", len(NAMES))
    headers = [(name.encode(), value) for name, value in zip(NAMES, values, strict=False) if value]
    reader = WebReader(limits=Limits(num_tries=2, pause_s=0, longest_pause_s=0))
    reader._client = httpx2.Client(
        transport=httpx2.MockTransport(
            lambda request: httpx2.Response(status, headers=headers, content=iter([body]))
        )
    )
    refused = 0
    try:
        assert len(reader.read_range(FILE, 100, 200)) == 100
    except CheckpointError:
        refused += 1
    try:
        file, first = reader.open_file(URL)
        assert 0 < len(first) <= file.size and file.validator
    except CheckpointError:
        refused += 1
    try:
        reader.read_small(URL)
    except CheckpointError:
        refused += 1
    reader.close()
    return refused == 3


def parse(data: bytes) -> bool:
    """Take `data` for a whole safetensors file; whether it was refused."""
    try:
        entries = parse_header("x", data[: header_bytes("x", data, len(data))], len(data))
    except CheckpointError:
        return True
    assert all(entry.end <= len(data) for entry in entries.values())
    return False


def main() -> None:
    import atheris

    def one_input(data: bytes) -> None:
        answer(data)
        parse(data)
        parse(struct.pack("<Q", len(data)) + data + bytes(64))

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
