"""The pump: carries rounds between this host's mailbox and other hosts. native/pump.h is the contract."""

from expertd.errors import ClusterError, LocalProtocolError
from expertd.link import codes
from expertd.link.connection import Connection
from expertd.native._transport import ffi, lib


class Pump:
    """Works on the mailbox `mailbox_fd`, whose ranks `local_ranks` run on this host.

    A host that is not heard for silence_s is gone. Raises ClusterError when it cannot.
    """

    def __init__(self, mailbox_fd: int, local_ranks: range, lifeline_fd: int, silence_s: float) -> None:
        err = codes.buffer()
        self._pump = lib.xd_pump_open(mailbox_fd, _bits(local_ranks), lifeline_fd, silence_s, err, len(err))
        if self._pump == ffi.NULL:
            raise ClusterError(codes.text(err))

    def add(self, connection: Connection, host: int, remote_ranks: range) -> None:
        """Carry to and from `host`; the connection stays the caller's, and open until `close`."""
        code = lib.xd_pump_add(self._pump, connection.handle, host, _bits(remote_ranks))
        if code != lib.XD_OK:
            raise LocalProtocolError(f"pump: host {host} with ranks {list(remote_ranks)}: code {code}")

    def run(self, run_s: float) -> bool:
        """Carry for run_s seconds; False when it has ended, see `failure`."""
        return bool(lib.xd_pump_run(self._pump, run_s) == lib.XD_TIMEOUT)

    def failure(self) -> tuple[int, int, str]:
        """Code, host (-1: this one) and reason of the end."""
        err, host = codes.buffer(), ffi.new("int *")
        code = lib.xd_pump_failure(self._pump, host, err, len(err))
        return code, host[0], codes.text(err)

    def statistics(self) -> dict[str, float]:
        """Rounds sent, once for every host, and seconds from seeing them published to having sent them."""
        count, carried = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.xd_pump_statistics(self._pump, count, carried)
        return {"num_rounds": count[0], "carried_s": carried[0] * 1e-9}

    def close(self) -> None:
        """Release it; may be called twice."""
        pump, self._pump = self._pump, ffi.NULL
        lib.xd_pump_close(pump)


def _bits(ranks: range) -> int:
    return sum(1 << rank for rank in ranks)
