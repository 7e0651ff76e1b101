"""A rank without MLX: it speaks the wire protocol and answers with the words of the prompt.

Words that start with @ are switches: `@slow:0.05` (seconds per token), `@repeat:1000`, `@reject:why`,
`@fail:why`, `@exit:3`, `@raise:SIGKILL`, `@garbage`, `@fatal:LinkDown`, `@hang`. A file `stub.json` in the
checkpoint folder, {"1": "exit"}, changes how rank 1 starts: "exit", "fatal", "mute", "deaf". Each rank
writes what it receives to `rank<r>.log`, one JSON object per line.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertd.engine.messages import (
    Cancel,
    Decoder,
    Done,
    Failed,
    Fatal,
    Message,
    Ready,
    Rejected,
    Setup,
    Started,
    Submit,
    Token,
    encode,
)

CONTEXT_LENGTH = 5000


class Rank:
    def __init__(self, control: socket.socket, setup: Setup) -> None:
        self.control = control
        self.setup = setup
        self.lock = threading.Lock()
        self.cancelled: set[str] = set()
        folder = Path(setup.group["checkpoint"])
        self.log = (folder / f"rank{setup.rank}.log").open("a")
        switches = folder / "stub.json"
        self.mood = json.loads(switches.read_text()).get(str(setup.rank), "") if switches.exists() else ""

    def say(self, message: Message) -> None:
        self.write(encode(message))

    def write(self, data: bytes) -> None:
        with self.lock:
            self.control.sendall(data)

    def start(self) -> None:
        if self.mood == "exit":
            os._exit(3)
        if self.mood == "fatal":
            self.say(Fatal(self.setup.rank, "CheckpointError", "model-1.safetensors: damaged. Get it again."))
            os._exit(1)
        if self.mood == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            threading.Thread(target=self.watch_lifeline, daemon=True).start()
        if self.mood != "mute":
            self.say(Ready(self.setup.rank, "stub", CONTEXT_LENGTH, 1000, 8, 2, ["solo", "experts"], 0.1))

    def watch_lifeline(self) -> None:
        os.read(self.setup.lifeline_fd, 1)
        os._exit(0)

    def receive(self, message: Message) -> None:
        print(json.dumps({"op": type(message).__name__, **asdict(message)}), file=self.log, flush=True)
        if isinstance(message, Cancel):
            self.cancelled.add(message.request_id)
        elif isinstance(message, Submit):
            threading.Thread(target=self.answer, args=(message,), daemon=True).start()

    def answer(self, submit: Submit) -> None:
        text = submit.prompt if submit.messages is None else submit.messages[-1]["content"]
        assert text is not None
        switches = dict((w[1:] + ":").split(":")[:2] for w in text.split() if w.startswith("@"))
        words = [w for w in text.split() if not w.startswith("@")]
        if "reject" in switches:
            self.say(Rejected(submit.request_id, f"prompt: {switches['reject']}"))
        elif len(words) > CONTEXT_LENGTH:
            self.say(
                Rejected(submit.request_id, f"prompt: {len(words)} tokens, at most {CONTEXT_LENGTH}. Cut it.")
            )
        else:
            self.say(Started(submit.request_id, len(words)))
            self.misbehave(submit, switches)
            self.generate(submit, words * int(switches.get("repeat", 1)), float(switches.get("slow", 0)))

    def misbehave(self, submit: Submit, switches: dict[str, Any]) -> None:
        if "exit" in switches:
            os._exit(int(switches["exit"]))
        if "raise" in switches:
            os.kill(os.getpid(), signal.Signals[switches["raise"]])
            time.sleep(60)  # Another thread may be the one that dies of it, a moment later.
        if "garbage" in switches:
            self.write(b"\0\0\0\x05hello")
        if "fatal" in switches:
            self.say(Fatal(0, switches["fatal"], "rank 1 went away"))
        while "hang" in switches and submit.request_id not in self.cancelled:
            time.sleep(0.01)

    def generate(self, submit: Submit, words: list[str], pause_s: float) -> None:
        count, reason = 0, "stop"
        for word in words:
            if submit.request_id in self.cancelled or "fail" in word:
                break
            if count == submit.max_tokens:
                reason = "length"
                break
            time.sleep(pause_s)
            count += 1
            self.say(Token(submit.request_id, [count], word + " "))
        if submit.request_id in self.cancelled:
            reason = "cancelled"
        if "fail" in words:
            self.say(Failed(submit.request_id, "the step failed"))
        split, ranks = self.setup.group["split"], self.setup.group["num_ranks"]
        self.say(Done(submit.request_id, reason, len(words), count, 100.0, 10.0, split, ranks))


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    decoder = Decoder()
    rank: Rank | None = None
    while data := control.recv(1 << 16):
        for message in decoder.feed(data):
            if rank is None:
                assert isinstance(message, Setup)
                rank = Rank(control, message)
                rank.start()
            else:
                rank.receive(message)
    while rank is not None and rank.mood == "deaf":
        time.sleep(1)


if __name__ == "__main__":
    main()
