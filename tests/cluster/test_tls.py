"""What a user is told when a call fails."""

import errno
import socket
import ssl

import pytest

from expertd.cluster.tls import explain, plain_address


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "no answer in time"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]"), "something answers there, but not expertd"),
        (socket.gaierror(-2, "Name or service not known"), "no machine of this name is known"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), "connection refused: nothing listens there"),
        (
            OSError(f"Multiple exceptions: [Errno {errno.ECONNREFUSED}] Connect, [Errno 1] x"),
            "connection refused",
        ),
        (OSError(errno.EHOSTUNREACH, "x"), "no route to this machine"),
        (OSError(errno.ENETUNREACH, "x"), "no route to this machine"),
        (ConnectionResetError(errno.ECONNRESET, "x"), "it closed the connection"),
        (OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), "Cannot assign requested address"),
        (OSError(), "OSError"),
    ],
)
def test_reason_is_named(error: OSError, words: str) -> None:
    assert explain(error, "linux").startswith(words)


def test_macos_may_have_forbidden_the_local_network() -> None:
    error = OSError(errno.EHOSTUNREACH, "No route to host")
    assert "Privacy & Security > Local Network" in explain(error, "darwin")
    assert "Privacy" not in explain(error, "linux")


def test_plain_address() -> None:
    assert [plain_address(a) for a in ("::ffff:10.0.0.1", "fd00::1", "::1", "10.0.0.1")] == [
        *("10.0.0.1", "fd00::1", "::1", "10.0.0.1")
    ]
