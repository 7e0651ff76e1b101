"""The other hosts' copies of kept transcripts: a token reaches a client only when every living host holds it.

On the leading host. Each other host has a task that sends it what is new, all of it in one Hold at a time and never
waiting for the Held before it, so a host is behind by its round trip and no more. Delivery waits for the slowest host,
the engine for none. A host that has not answered a Hold for HELD_TIMEOUT_S is left out until it answers in time again:
its channel finds out within a second whether it lives, and a slow one must not hold up a stream.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from expertd.cluster.host_messages import Copy, Hold
from expertd.cluster.transcripts import Event, Transcript
from expertd.engine.messages import Done, Started, Token
from expertd.errors import ExpertdError

HELD_TIMEOUT_S = 1.0
# A host that joins gets what is kept in Holds of about this size.
HOLD_BYTES = 1 << 20

_log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """How many of a transcript's events a host was sent, with how many tokens, and how many events it holds."""

    sent: int = 0
    num_tokens: int = 0
    held: int = 0


@dataclass(eq=False)
class _Sent:
    """A Hold on its way. `upto` is what the host holds once it has answered."""

    number: int
    sent_at: float
    upto: list[tuple[Transcript, int]] = field(default_factory=list)


class _Host:
    """One host's copies. `settle` is called with the transcripts of which it holds more, or no longer has a say."""

    def __init__(
        self,
        host_id: str,
        send: Callable[[Hold], Awaitable[None]],
        settle: Callable[[list[Transcript]], None],
    ) -> None:
        self.host_id, self.is_late = host_id, False
        self._send, self._settle = send, settle
        self._progress: dict[Transcript, _Progress] = {}
        self._new: dict[Transcript, None] = {}
        self._forgotten: list[str] = []
        self._sent: deque[_Sent] = deque()
        self._num_holds = 0
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def offer(self, transcript: Transcript) -> None:
        """Send what is new of it, soon."""
        self._progress.setdefault(transcript, _Progress())
        self._new[transcript] = None
        self._wake.set()

    def forget(self, request_id: str) -> None:
        self._forgotten.append(request_id)
        self._wake.set()

    def num_held(self, transcript: Transcript) -> int:
        """How many of its events may be given out as far as this host is concerned."""
        progress = self._progress.get(transcript)
        return len(transcript.events) if self.is_late or progress is None else progress.held

    def held(self, number: int) -> None:
        """The host has answered Hold `number`, and all before it."""
        transcripts = []
        while self._sent and self._sent[0].number <= number:
            sent = self._sent.popleft()
            self._judge(time.monotonic() - sent.sent_at > HELD_TIMEOUT_S)
            for transcript, upto in sent.upto:
                transcripts.append(transcript)
                progress = self._progress.get(transcript, _Progress())
                progress.held = upto
                if transcript.end and upto == len(transcript.events) and transcript not in self._new:
                    self._progress.pop(transcript, None)
        self._settle(transcripts)

    def close(self) -> None:
        """The host is gone, and nothing waits for it."""
        self._task.cancel()
        self._sent.clear()
        self._settle(list(self._progress))

    def _judge(self, is_late: bool) -> None:
        if is_late != self.is_late:
            what = "late, and left out" if is_late else "in time again"
            _log.warning("host %s: its copies of answers are %s", self.host_id, what)
            self.is_late = is_late
            self._settle(list(self._progress))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                self._num_holds += 1
                hold, sent = self._next_hold(), _Sent(self._num_holds, time.monotonic())
                sent.upto = [(t, self._progress[t].sent) for t in hold]
                self._sent.append(sent)
                loop.call_later(HELD_TIMEOUT_S + 0.01, self._look_at, sent)
                forgotten, self._forgotten = self._forgotten, []
                await self._send(Hold(sent.number, list(hold.values()), forgotten))
        except ExpertdError as e:  # whoever reads the channel sees it too, and closes us
            _log.debug("copies for host %s: %s", self.host_id, e)

    def _look_at(self, sent: _Sent) -> None:
        if sent in self._sent:
            self._judge(is_late=True)

    def _next_hold(self) -> dict[Transcript, Copy]:
        copies: dict[Transcript, Copy] = {}
        num_bytes = 0
        while self._new and num_bytes < HOLD_BYTES:
            transcript = next(iter(self._new))
            del self._new[transcript]
            progress = self._progress[transcript]
            copies[transcript] = copy = copy_of(transcript, progress.sent, progress.num_tokens)
            num_bytes += 0 if progress.sent else transcript.num_bytes
            progress.sent = len(transcript.events)
            progress.num_tokens += sum(len(token.token_ids) for token in copy.tokens)
        if not self._new:
            self._wake.clear()
        return copies


def copy_of(transcript: Transcript, num_events: int = 0, num_tokens: int = 0) -> Copy:
    """What a host needs that was sent the first `num_events` events, with so many tokens in them."""
    events: list[Event] = transcript.events[num_events:]
    end = transcript.end
    return Copy(
        request_id=transcript.request_id,
        num_tokens=num_tokens,
        submit=None if num_events else transcript.submit,
        started=next((e for e in events if isinstance(e, Started)), None),
        tokens=[e for e in events if isinstance(e, Token)],
        done=next((e for e in events if isinstance(e, Done)), None),
        error=str(end) if isinstance(end, ExpertdError) else "",
        is_led=transcript.is_led,
    )


class Copies:
    """All hosts' copies. While there is no other host, everything is committed at once."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Host] = {}

    def add(self, host_id: str, send: Callable[[Hold], Awaitable[None]], kept: list[Transcript]) -> None:
        """From now on a host has copies, of `kept` too; `send` gives it a Hold."""
        self.remove(host_id)
        host = self._hosts[host_id] = _Host(host_id, send, self._settle)
        for transcript in kept:
            if transcript.is_whole and transcript.origin != host_id:
                host.offer(transcript)

    def remove(self, host_id: str) -> None:
        if host := self._hosts.pop(host_id, None):
            host.close()

    def held(self, host_id: str, number: int) -> None:
        if host := self._hosts.get(host_id):
            host.held(number)

    def offer(self, transcript: Transcript) -> None:
        """Something of a transcript is new: commit it where every host holds it."""
        if transcript.submit.keep and transcript.is_whole:
            for host in self._hosts.values():
                if host.host_id != transcript.origin:  # which is given it as its answer
                    host.offer(transcript)
        if self._hosts:
            self._settle([transcript])
        else:
            transcript.commit(len(transcript.events))

    def forget(self, request_id: str) -> None:
        """Let every host forget a request, after what was said of it before."""
        for host in self._hosts.values():
            host.forget(request_id)

    def close(self) -> None:
        for host_id in list(self._hosts):
            self.remove(host_id)

    def _settle(self, transcripts: list[Transcript]) -> None:
        for t in transcripts:
            held = (host.num_held(t) for host in self._hosts.values() if host.host_id != t.origin)
            t.commit(min(held, default=len(t.events)))
