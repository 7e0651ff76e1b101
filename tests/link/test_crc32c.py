"""CRC32C: known values, and the fast one against its slow twin."""

import random

import pytest

from expertd.native._transport import ffi, lib

# Appendix B.4 of RFC 3720 (iSCSI), and the check value of the catalogue of parametrised CRC algorithms.
KNOWN = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]
# Around every size at which another lane length begins or another piece is left.
EDGES = [192 << k for k in range(8)] + [64 << k for k in range(11)] + [16384, 65536, 262144]


@pytest.mark.parametrize("crc", [lib.xd_crc32c, lib.xd_crc32c_table])
def test_known_values(crc) -> None:  # type: ignore[no-untyped-def]
    assert [crc(0, data, len(data)) for data, _ in KNOWN] == [wanted for _, wanted in KNOWN]


def test_twins_agree_at_every_size() -> None:
    data = random.Random(1).randbytes(EDGES[-1] + 16)
    for size in [*range(800), *(edge + d for edge in EDGES for d in (-1, 0, 1, 9))]:
        assert lib.xd_crc32c(size, data, size) == lib.xd_crc32c_table(size, data, size), size


def test_twins_agree_at_every_alignment() -> None:
    data = ffi.from_buffer(random.Random(2).randbytes(5000))
    for at in range(64):
        assert lib.xd_crc32c(0, data + at, 4900) == lib.xd_crc32c_table(0, data + at, 4900), at


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 191, 4097, 20000])
def test_pieces_give_the_same_as_the_whole(cut: int) -> None:
    data = random.Random(3).randbytes(20000)
    first = lib.xd_crc32c(0, data[:cut], cut)
    assert lib.xd_crc32c(first, data[cut:], len(data) - cut) == lib.xd_crc32c(0, data, len(data))
