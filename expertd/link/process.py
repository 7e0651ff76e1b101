"""The link process: `python -m expertd.link.process CONTROL_FD`, spawned by the supervisor, one for each epoch.

It plays the ranks of other hosts in this host's mailbox. Apple's provider is known to crash when a cable is pulled and
to block for ever in set-up calls, so all of verbs happens here, and the death of this process is an ordinary event. It
imports no MLX. The main thread sets up, then pumps; another reads the control socket.

Whoever is wanted no more goes at once, but for one that has verbs open: on a Mac these must be given back in order, so
it gets END_S for that.
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time

from expertd.errors import ExpertdError
from expertd.link import codes
from expertd.link.control import Control
from expertd.link.establish import Link, establish
from expertd.link.handshake import Identity, SetupFailed, meet, open_listener
from expertd.link.messages import LinkConnect, LinkDown, LinkListening, LinkSetup, LinkUp, codec
from expertd.link.pump import Pump

SLICE_S = 0.25
END_S = 2.0
# The supervisor ends a set-up that takes too long; this is for the case that it does not.
GRACE_S = 2.0
EXIT_STUCK, EXIT_ORPHANED = 4, 3


class Ending:
    """Whether the supervisor has hung up, and what that means."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.must_be_tidy = False

    def ask(self) -> None:
        """On the control thread."""
        if not self.must_be_tidy:
            os._exit(0)
        _exit_after(END_S, 0)
        self.is_asked.set()


def _exit_after(delay_s: float, code: int) -> threading.Timer:
    timer = threading.Timer(delay_s, os._exit, (code,))
    timer.daemon = True
    timer.start()
    return timer


def ranks_of(num_ranks: list[int], host: int) -> range:
    """The ranks of a host, which are numbered through."""
    first = sum(num_ranks[:host])
    return range(first, first + num_ranks[host])


def set_up(setup: LinkSetup, control: Control) -> list[Link]:
    """Find the other hosts and bring up a connection to each. Raises SetupFailed."""
    deadline = time.monotonic() + setup.setup_s
    listener = open_listener(setup.listen) if setup.listen else None
    control.send(LinkListening(listener.getsockname()[1] if listener else 0))
    peers = sorted(control.take(LinkConnect).peers, key=lambda p: p.host)
    identity = Identity(setup.epoch, setup.host, setup.secret)
    sockets = asyncio.run(meet(identity, peers, listener, deadline - time.monotonic()))
    if listener:
        listener.close()
    # In the order of hosts everywhere: every pair then finds both ends free, sooner or later.
    links = [establish(setup, peer, sockets[peer.host], deadline) for peer in peers]
    # A host that pumps expects to hear the others, so none begins before all are done.
    for link in links:
        link.meet(deadline - time.monotonic())
    return links


def carry(setup: LinkSetup, links: list[Link], ending: Ending) -> LinkDown | None:
    """Pump until the epoch ends, and say why; None when the supervisor has asked for it."""
    pump = Pump(setup.mailbox_fd, ranks_of(setup.num_ranks, setup.host), setup.lifeline_fd, setup.silence_s)
    for link in links:
        pump.add(link.connection, link.report.host, ranks_of(setup.num_ranks, link.report.host))
    while pump.run(SLICE_S):
        if ending.is_asked.is_set():
            return None
    code, host, reason = pump.failure()
    return LinkDown(host, "running", codes.name(code), reason)


def run(setup: LinkSetup, control: Control, ending: Ending) -> int:
    """One epoch, from its set-up to its end; gives the process's exit code."""
    links: list[Link] = []
    ending.must_be_tidy = setup.kind == "verbs"
    watchdog = _exit_after(setup.setup_s + GRACE_S, EXIT_STUCK)
    down: LinkDown | None
    try:
        links = set_up(setup, control)
        watchdog.cancel()
        control.send(LinkUp([link.report for link in links]))
        down = carry(setup, links, ending)
    except SetupFailed as e:
        down = LinkDown(e.host, "setup", e.code, e.reason)
    except ExpertdError as e:
        down = LinkDown(-1, "setup", "XD_UNAVAILABLE", str(e))
    except Exception as e:  # a mistake of ours, which must not end as silence
        down = LinkDown(-1, "setup", "XD_DEVICE", f"host {setup.host}: {type(e).__name__}: {e}")
    watchdog.cancel()
    if down:
        control.send(down)
    _exit_after(END_S, 0)
    for link in links:
        link.close()
    return EXIT_ORPHANED if down and (down.host, down.code) == (-1, "XD_CLOSED") else 0


def main() -> None:
    # Ctrl-C goes to the terminal's foreground group; ending this process is the supervisor's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending = Ending()
    control = Control(socket.socket(fileno=int(sys.argv[1])), codec, ending.ask)
    control.start()
    os._exit(run(control.take(LinkSetup), control, ending))


if __name__ == "__main__":
    main()
