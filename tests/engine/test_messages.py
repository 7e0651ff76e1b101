"""The control protocol: every message comes back, in any pieces, and damage is nothing but an error."""

import random
import tracemalloc
from typing import Any

import msgpack
import pytest

from expertd.cluster import host_messages
from expertd.engine.messages import (
    MAX_FRAME_BYTES,
    Begin,
    Cancel,
    Candidate,
    Choice,
    Done,
    Ended,
    Failed,
    Fatal,
    Joined,
    Load,
    Loading,
    Logprobs,
    Message,
    Observe,
    Reading,
    Ready,
    Rejected,
    Setup,
    Started,
    Stats,
    Steps,
    Submit,
    Token,
    codec,
)
from expertd.errors import RemoteProtocolError
from expertd.sampling import Sampling

MESSAGES: list[Message] = [
    Setup(rank=1, lifeline_fd=5, fd_channel=6, group={"checkpoint": "/x", "shares": [0.5, 0.5]}),
    Submit("r1", prompt="a \u0000 日本 👍"),
    Submit(
        "r2",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=3,
        sampling=Sampling(0.7, 0.9, 40, 0.05, 1.1, -0.5, 2.0, ((5, -100.0), (2**31, 1.5)), 2**63 - 1),
        stop_ids=[7],
        min_tokens=2,
        logprobs=20,
    ),
    Submit("r3", prompt="", stop=["\n", "</s>"], ignore_end=True, logits_file="/tmp/x.safetensors"),
    Observe("w1", [[1, 2], [3, 2**31]], "/tmp/x.safetensors"),
    Cancel("r1"),
    Begin(epoch=3, rank=1, split="auto", fractions=(0.25, 0.75), reason="rank 1 died: killed by SIGKILL"),
    Begin(4, 0, "auto", (0.5, 0.5), "", address="10.0.0.1", interface="en2"),
    Joined(4, "mlx (ring)"),
    Choice("decode of 1", "experts", "1.20 times as fast as solo", {"solo": 1.2, "experts": 1.0}),
    Stats(),
    Stats(
        1, 2, 3, 4, [Reading("r", 5, 9)], [Steps("solo", True, 1, 2, 0.5)], [0, 7], 0.25, [Load(3, [1, 0])]
    ),
    Ended(3, "LinkDown", "rank 0, exchange 1 with rank 1: it is dead"),
    Loading(1 << 40, 1 << 41),
    Ready(0),
    Ready(3, "mixtral", 4096, 257, 8, 2, ["solo", "experts"], 1.25, "0.32.4", "applegpu_g15d", "gpu"),
    Fatal(2, "CheckpointError", "checkpoint /x: gone"),
    Started("r1", 17),
    Token("r1", [1, 2, 2**31], "text"),
    Token("r1", [7], "", [Logprobs(Candidate(7, b"\xe4\xb8", -0.25), [Candidate(8, b"", -9999.0)], 3)]),
    Done("r1", "stop", 17, 3, 123.5, 0.0, "experts", 2),
    Rejected("r1", "no"),
    Failed("r1", "oops"),
]


def test_every_class_is_tried() -> None:
    assert {type(m) for m in MESSAGES} == set(Message.__args__)


def test_no_other_host_can_name_a_file_of_ours() -> None:
    """Observe makes rank 0 write a file, so it is no message between hosts."""
    frame = codec.encode(Observe("w", [[1]], "/tmp/x"))
    with pytest.raises(RemoteProtocolError):
        list(host_messages.codec.decoder().feed(frame))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: Message) -> None:
    assert list(codec.decoder().feed(codec.encode(message))) == [message]


@pytest.mark.parametrize("seed", range(20))
def test_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    data = b"".join(map(codec.encode, MESSAGES))
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 3, 50, 500])))
    decoder, found = codec.decoder(), []
    for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
        found += decoder.feed(data[a:b])
    assert found == MESSAGES


def test_byte_by_byte_comes_as_soon_as_whole() -> None:
    decoder = codec.decoder()
    for message in MESSAGES:
        frame = codec.encode(message)
        assert [m for i in range(len(frame) - 1) for m in decoder.feed(frame[i : i + 1])] == []
        assert list(decoder.feed(frame[-1:])) == [message]


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 3)):
        kind, at = rng.randrange(4), rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice([0, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xC7, 0xD6, 0xDD, 0xDF, 0xFF])
        elif kind == 2:
            data.insert(at, rng.randrange(256))
        elif len(data) > 5:
            del data[at]
    if rng.random() < 0.7:  # with a right length the damage reaches the parser
        data[:4] = max(0, len(data) - 4).to_bytes(4, "big")
    return bytes(data)


def test_mutated_frames_parse_or_are_refused() -> None:
    rng = random.Random(4)
    frames = [codec.encode(m) for m in MESSAGES]
    num_refused = 0
    for _ in range(3000):
        try:
            for message in codec.decoder().feed(mutate(rng.choice(frames), rng)):
                assert type(message) in Message.__args__
        except RemoteProtocolError as e:
            assert "\n" not in str(e)
            num_refused += 1
    assert 500 < num_refused < 3000


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"op": "nothing"},
        {"op": ["cancel"]},
        {"op": "cancel"},
        {"op": "cancel", "request_id": "r", "more": 1},
        {"op": "cancel", 7: 1},
    ],
)
def test_other_values_are_refused(values: Any) -> None:
    body = msgpack.packb(values)
    with pytest.raises(RemoteProtocolError, match="not a message of ours"):
        list(codec.decoder().feed(len(body).to_bytes(4, "big") + body))


def test_oversized_frame_is_refused_without_memory() -> None:
    tracemalloc.start()
    try:
        for size in (MAX_FRAME_BYTES + 1, 2**32 - 1):
            with pytest.raises(RemoteProtocolError, match=f"frame of {size} bytes"):
                list(codec.decoder().feed(size.to_bytes(4, "big") + b"x"))
        # A length inside the body: msgpack must not believe it either.
        with pytest.raises(RemoteProtocolError):
            list(codec.decoder().feed((5).to_bytes(4, "big") + b"\xdd" + (2**31).to_bytes(4, "big")))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
