"""A short, repeatable form of `make fuzz` for web servers' answers (tests/fuzz_answers.py)."""

import random
import struct

from tests.fuzz_answers import GOOD, HEADER, answer, parse


def mutate(data: bytes, chance: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(result))
        kind = chance.randrange(3)
        if kind == 0:
            result[at] = chance.randrange(256)
        elif kind == 1:
            del result[at : at + chance.randrange(1, 9)]
        else:
            result[at:at] = chance.choice([b"\n", b"9" * 20, b"-", b"\xff\x00", b"http://[", b"{", b"gzip\n"])
    return bytes(result)


def test_mutated_answers_are_right_or_refused() -> None:
    chance = random.Random(3)
    assert not answer(GOOD) and not answer(b"")
    refused = [answer(mutate(GOOD, chance)) for _ in range(400)]
    assert 20 < sum(refused) < 400


def test_mutated_headers_are_right_or_refused() -> None:
    chance = random.Random(4)
    good = struct.pack("<Q", len(HEADER)) + HEADER + bytes(12)
    assert not parse(good)
    refused = [parse(mutate(good, chance)) for _ in range(3000)]
    assert 1000 < sum(refused) < 3000
