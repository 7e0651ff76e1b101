"""Two peers (peer.py), a process on each of the hosts a and b, with a verbs connection over their cable."""

import contextlib
import json
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import netns

LIMIT_S = 120.0  # for one line of a peer: set-up or a whole job, under emulation
PEER = Path(__file__).parent / "peer.py"


class Peer:
    """One process; index 0 listens for the side connection."""

    def __init__(
        self, net: netns.Net, index: int, job: str, side_on_cable: bool, settings: dict[str, Any]
    ) -> None:
        listener = net.hosts[0]
        own = {
            "job": job,
            "listen": index == 0,
            "local_ip": net.hosts[index].cables[1 - index].address,
            "side_address": listener.cables[1].address if side_on_cable else listener.lan_address,
        }
        argv = [sys.executable, str(PEER), json.dumps(settings | own)]
        self.process = net.run(index, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._said = b""
        self.chosen: dict[str, Any] = {}  # device and MTU, once it is up

    def line(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """The next thing that it says."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._said:
                assert selector.select(max(0, deadline - time.monotonic())), f"nothing for {limit_s} s"
                piece = self.process.stdout.read1()  # type: ignore[attr-defined]
                assert piece, f"it ended: {self._errors()}"
                self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        said = json.loads(line)
        assert isinstance(said, dict)
        return said

    def end(self, limit_s: float = LIMIT_S) -> None:
        """Wait until it has ended, well."""
        assert self.process.wait(limit_s) == 0, self._errors()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """Whatever it does, it is gone."""
        self.process.kill()
        self.process.communicate()

    def _errors(self) -> str:
        self.process.kill()
        return self.process.communicate()[1].decode(errors="replace")[-2000:]


@contextlib.contextmanager
def peers(
    net: netns.Net, job: str, num_frames: int, *, side_on_cable: bool = False, **settings: Any
) -> Iterator[tuple[Peer, Peer]]:
    """Both, with their connection up and warm, at their job."""
    settings |= {"num_frames": num_frames}
    with contextlib.ExitStack() as stack:
        both = []
        for index in (0, 1):
            both.append(Peer(net, index, job, side_on_cable, settings))
            stack.callback(both[-1].close)
        for peer in both:
            peer.chosen = peer.line()["up"]
        yield both[0], both[1]


def results(both: tuple[Peer, Peer]) -> list[dict[str, Any]]:
    """What came of the job at each end, after both have ended."""
    said = [peer.line() for peer in both]
    for peer in both:
        peer.end()
    return said
