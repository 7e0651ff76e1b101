"""The rank process: `python -m expertd.cluster.rank CONTROL_FD`, spawned by the supervisor.

Only this process imports MLX. Its first frame says who it is; then it loads the checkpoint, says Ready, and
runs until its supervisor or its group ends. Its threads: the main one owns the engine and MLX; one reads
the control socket; the mailbox's C thread beats the pulse and ends the process with its supervisor.
"""

import os
import queue
import select
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

from expertd.config import GroupConfig
from expertd.engine.messages import Decoder, Fatal, Message, Ready, Setup, encode
from expertd.errors import ExpertdError, RemoteProtocolError
from expertd.topology.machine import settle

# The supervisor reads at once; one that does not for this long is stuck, and its ranks must not be.
SEND_TIMEOUT_S = 30.0


class Control:
    """This rank's end of the control socket: a reading thread, and sends with a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._decoder = sock, Decoder()
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def setup(self) -> Setup:
        """Wait for the first frame. Ends the process when the supervisor is gone."""
        while True:
            for message in self._decoder.feed(self._receive()):
                if isinstance(message, Setup):
                    return message
                raise RemoteProtocolError(f"first frame is {type(message).__name__}, wanted Setup")

    def start(self) -> None:
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def send(self, message: Message) -> None:
        data = memoryview(encode(message))
        while data:
            _, writable, _ = select.select([], [self._sock], [], SEND_TIMEOUT_S)
            if not writable:
                os._exit(1)
            data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]

    def _read(self) -> None:
        while True:
            for message in self._decoder.feed(self._receive()):
                self.inbox.put(message)

    def _receive(self) -> bytes:
        try:
            data = self._sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:  # the supervisor closed it: our work is over, whatever step is running
            os._exit(0)
        return data


def _serve(setup: Setup, control: Control) -> None:
    from expertd.checkpoint.inspect import check_checkpoint
    from expertd.engine.engine import Engine
    from expertd.engine.runner import Runner
    from expertd.engine.text import Tokenizer
    from expertd.link.mailbox import Mailbox
    from expertd.model.model import Model

    group = _group(setup)
    mailbox = Mailbox(
        setup.mailbox_fd,
        setup.rank,
        group.num_ranks,
        step_timeout_s=group.exchange_timeout_s,
        pulse_timeout_s=group.pulse_timeout_s,
        lifeline_fd=setup.lifeline_fd,
    )
    info = check_checkpoint(Path(group.checkpoint))
    model = Model(info.folder, info.config, mailbox if group.num_ranks > 1 else None)
    model.require(group.split)
    runner = Runner(model, mailbox)
    ready = Ready(
        rank=setup.rank,
        family=info.family,
        context_length=info.context_length,
        vocab_size=int(info.config.get("vocab_size", 0)),
        num_experts=info.num_experts,
        top_k=info.top_k,
        splits=model.splits,
        load_s=model.load_s,
    )
    if setup.rank > 0:
        control.send(ready)
        while True:
            runner.follow()
    tokenizer = Tokenizer(info.folder, info.config)
    engine = Engine(group, runner, tokenizer, info.context_length, model.splits, control.inbox, control.send)
    control.send(ready)
    while True:
        engine.step()


def _group(setup: Setup) -> GroupConfig:
    group = GroupConfig(**setup.group)
    cpus = tuple(tuple(c) for c in group.cpus)
    return replace(group, shares=tuple(group.shares), cpus=cpus)


def main() -> None:
    # Ctrl-C goes to the terminal's foreground group; ending this process is the supervisor's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    setup = control.setup()
    control.start()
    cpus = setup.group.get("cpus")
    settle(cpus[setup.rank] if cpus else ())
    try:
        _serve(setup, control)
    except ExpertdError as e:
        control.send(Fatal(setup.rank, type(e).__name__, str(e)))
    except Exception as e:
        control.send(Fatal(setup.rank, "ClusterError", f"rank {setup.rank}: {type(e).__name__}: {e}"))
        if os.environ.get("EXPERTD_DEBUG"):
            raise
    os._exit(1)  # MLX's stream thread may still sit in an exchange; nothing here needs a tidy end


if __name__ == "__main__":
    main()
