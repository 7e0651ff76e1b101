"""A rank without MLX: it speaks the wire protocol and answers with the words of the prompt.

Words that start with @ are switches: `@slow:0.05` (seconds per token), `@repeat:1000`, `@torn` (each byte is a token),
`@reject:why`, `@fail:why`, `@exit:3`, `@raise:SIGKILL`, `@garbage`, `@fatal:LinkDown`, `@ended:why`, `@hang`, `@stats`
(it reports STATS). A file `stub.json` in the checkpoint folder, {"1": "exit"}, changes how rank 1 starts: "exit",
"fatal", "mute", "deaf"; or how it speaks: "tools" (a dialect with tools); or how it takes epochs: "unsteady" (each
with another rank in it fails), "hopeless" (each fails), "absent" (joins none). Each rank writes what it receives to
`rank<r>.log`, one JSON object per line. In its epoch it counts beats into the stub mailbox; an epoch that ends
interrupts no answer.
"""

import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from expertd.dialect import Dialect
from expertd.engine.messages import (
    Begin,
    Cancel,
    Candidate,
    Done,
    Drafted,
    Ended,
    Failed,
    Fatal,
    Load,
    Loading,
    Logprobs,
    Message,
    Prompt,
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

CONTEXT_LENGTH = 5000
STATS = Stats(
    num_running=2,
    num_waiting=1,
    kv_tokens=300,
    kv_bytes=1 << 20,
    reading=[Reading("other", 512, 2048)],
    steps=[Steps("experts", True, 10, 20, 0.5), Steps("tokens", False, 1, 512, 0.25)],
    waits=[5, *[0] * 11, 4, 1],
    waited_s=2e-5,
    loads=[Load(0, [3, 0, 1]), Load(1, [1, 1, 1, 5])],
    drafts=[Drafted("model", 9, 6)],
)
TOOLS = Dialect("<think>", "</think>", "<tool_call>", "</tool_call>", "json_tools", ["messages", "tools"])


class Rank:
    def __init__(self, control: socket.socket, setup: Setup) -> None:
        self.control = control
        self.setup = setup
        self.lock = threading.Lock()
        self.cancelled: set[str] = set()
        self.answering: set[str] = set()
        self.channel = socket.socket(fileno=setup.fd_channel)
        self.begun: Begin | None = None
        folder = Path(setup.group["checkpoint"])
        self.log = (folder / f"rank{setup.rank}.log").open("a")
        switches = folder / "stub.json"
        self.mood = json.loads(switches.read_text()).get(str(setup.rank), "") if switches.exists() else ""

    def say(self, message: Message) -> None:
        self.write(codec.encode(message))

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
        for num_bytes in (5, 10):
            self.say(Loading(num_bytes, 10))
        if self.mood != "mute":
            ready = Ready(self.setup.rank, "stub", CONTEXT_LENGTH, 1000, 8, 2, ["solo", "experts"], 0.1)
            self.say(replace(ready, dialect=TOOLS) if self.mood == "tools" else ready)

    def watch_lifeline(self) -> None:
        os.read(self.setup.lifeline_fd, 1)
        os._exit(0)

    def receive(self, message: Message) -> None:
        print(json.dumps({"op": type(message).__name__, **asdict(message)}), file=self.log, flush=True)
        if isinstance(message, Cancel):
            self.cancelled.add(message.request_id)
        elif isinstance(message, Begin):
            self.begin(message)
        elif isinstance(message, Submit):
            self.answering.add(message.request_id)
            threading.Thread(target=self.answer, args=(message,), daemon=True).start()

    def begin(self, begin: Begin) -> None:
        number, (mailbox,), _, _ = socket.recv_fds(self.channel, 8, 1)
        assert int.from_bytes(number, "big") == begin.epoch
        self.begun = begin
        if self.mood != "absent":
            threading.Thread(target=self.beat, args=(begin, mailbox), daemon=True).start()
        for request_id in self.answering if begin.rank > 0 else set():
            self.cancelled.add(request_id)
            self.say(Failed(request_id, "another rank leads", lost=True))
        if self.mood == "hopeless" or (self.mood == "unsteady" and begin.num_ranks > 1):
            self.say(Ended(begin.epoch, "LinkDown", "the link is torn"))

    def beat(self, begin: Begin, mailbox: int) -> None:
        for count in itertools.count(1):
            os.pwrite(mailbox, count.to_bytes(8, "little"), 8 * begin.rank)
            if self.begun is not begin:
                os.close(mailbox)
                return
            time.sleep(0.02)

    def answer(self, submit: Submit) -> None:
        text = submit.prompt if submit.messages is None else submit.messages[-1]["content"]
        if text is None:
            text = " ".join(map(str, submit.prompt_ids or []))
        switches = dict((w[1:] + ":").split(":")[:2] for w in text.split() if w.startswith("@"))
        words = [w for w in text.split() if not w.startswith("@")]
        if "reject" in switches:
            self.say(Rejected(submit.request_id, f"prompt: {switches['reject']}"))
        elif len(words) > CONTEXT_LENGTH:
            self.say(
                Rejected(submit.request_id, f"prompt: {len(words)} tokens, at most {CONTEXT_LENGTH}. Cut it.")
            )
        else:
            self.say(
                Started(submit.request_id, len(words), self.prompt(submit, text) if submit.echo else None)
            )
            self.misbehave(submit, switches)
            if "torn" in switches:
                self.tear(submit, words)
            else:
                self.generate(submit, words * int(switches.get("repeat", 1)), float(switches.get("slow", 0)))

    def prompt(self, submit: Submit, text: str) -> Prompt:
        """Each word is a token, and half as likely as the one before it."""
        logprobs = []
        for i, match in enumerate(re.finditer(r"\S+\s*", text) if submit.prompt_logprobs is not None else ()):
            logprobs.append(Logprobs(Candidate(i, match[0].encode(), -float(i)), [], match.start()))
        return Prompt(list(range(len(text.split()))), text, logprobs[1:])

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
        if "stats" in switches:
            self.say(STATS)
        if "ended" in switches:
            assert self.begun
            self.say(Ended(self.begun.epoch, "LinkDown", switches["ended"]))
        while "hang" in switches and submit.request_id not in self.cancelled:
            time.sleep(0.01)

    def generate(self, submit: Submit, words: list[str], pause_s: float) -> None:
        count, reason = len(submit.generated), "stop"
        num_chars = sum(len(word) + 1 for word in words[:count])
        for word in words[count:]:
            if submit.request_id in self.cancelled or "fail" in word:
                break
            if count == submit.max_tokens:
                reason = "length"
                break
            time.sleep(pause_s)
            count += 1
            found = self.logprobs(submit, count, (word + " ").encode(), num_chars)
            self.say(Token(submit.request_id, [count], word + " ", found))
            num_chars += len(word) + 1
        if submit.request_id in self.cancelled:
            reason = "cancelled"
        if "fail" in words:
            self.say(Failed(submit.request_id, "the step failed"))
        assert self.begun
        split, ranks = self.begun.split, self.begun.num_ranks
        self.say(Done(submit.request_id, reason, len(words), count, 100.0, 10.0, split, ranks))
        self.answering.discard(submit.request_id)

    def tear(self, submit: Submit, words: list[str]) -> None:
        """The characters of all words, and an end token."""
        count = 0
        for at, letter in enumerate("".join(words)):
            data = letter.encode()
            for i in range(len(data)):
                count += 1
                text = letter if i == len(data) - 1 else ""
                found = self.logprobs(submit, count, data[i : i + 1], at)
                self.say(Token(submit.request_id, [count], text, found))
        found = self.logprobs(submit, 0, b"<end>", len("".join(words)))
        self.say(Token(submit.request_id, [0], "", found))
        self.say(Done(submit.request_id, "stop", len(words), count + 1, 100.0, 10.0, "auto", 1))

    def logprobs(self, submit: Submit, token_id: int, data: bytes, offset: int) -> list[Logprobs]:
        """Token 999, "other", is as likely as the chosen one is unlikely; 1000 and so on have no text."""
        if submit.logprobs is None:
            return []
        others = [Candidate(999 + i, b"" if i else b"other", -0.125 - i) for i in range(submit.logprobs)]
        return [Logprobs(Candidate(token_id, data, -0.5 * token_id), others, offset)]


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    decoder = codec.decoder()
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
