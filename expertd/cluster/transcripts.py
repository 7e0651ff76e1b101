"""What a supervisor knows of a request: enough to give its answer again, and to let another leader go on with it."""

import asyncio
import secrets
import time
from dataclasses import replace

from expertd.engine.messages import Done, Started, Submit, Token
from expertd.errors import ClusterError, ExpertdError

Event = Started | Token | Done

# Of requests with `keep`, once they are over: by number, by bytes, and since they last changed.
MAX_KEPT = 1000
MAX_KEPT_BYTES = 64 << 20
MAX_KEPT_S = 3600.0
# What a Token, and each candidate of its log-probabilities, take in memory beside their text (sys.getsizeof).
TOKEN_BYTES, CANDIDATE_BYTES = 400, 250


class Transcript:
    """One request and its events so far. `submit` has a seed, so what follows is decided, whoever computes it.

    `num_committed` of the events may be given to readers, who wait for more with `news`. `end` is the Done, or
    why there is none. `is_led` says that a host sees to it that it goes on; `origin` is the host whose client asks, ""
    for this one.
    """

    def __init__(self, submit: Submit, origin: str = "") -> None:
        self.submit = submit
        self.request_id = submit.request_id.partition("~")[0]
        self.origin = origin
        self.events: list[Event] = []
        self.num_tokens = len(submit.generated)
        self.num_committed = 0
        self.num_bytes = sum(map(len, (submit.prompt or "", repr(submit.messages or ""), submit.note)))
        self.end: Done | ExpertdError | None = None
        self.is_led = True
        self.changed_at = time.monotonic()
        self._readers: list[asyncio.Future[None]] = []  # that wait

    @property
    def is_whole(self) -> bool:
        """Whether the events are here from the first on: not when another host resumed its request by us."""
        return not self.submit.generated

    @property
    def is_idle(self) -> bool:
        return not self.is_led or self.end is not None

    @property
    def token_ids(self) -> list[int]:
        made = (i for event in self.events if isinstance(event, Token) for i in event.token_ids)
        return [*self.submit.generated, *made]

    def add(self, event: Event) -> None:
        """Take what the leader says. Raises ClusterError when its Done counts other tokens than have come."""
        if isinstance(event, Started):
            if self.events:  # the next leader says it again
                return
        elif isinstance(event, Token):
            self.num_tokens += len(event.token_ids)
            self.num_bytes += TOKEN_BYTES + len(event.text)
            if event.logprobs:
                self.num_bytes += sum(CANDIDATE_BYTES * (1 + len(found.top)) for found in event.logprobs)
        else:
            if event.completion_tokens != self.num_tokens and event.finish_reason != "cancelled":
                counts = f"{self.num_tokens} tokens have come, of {event.completion_tokens}"
                raise ClusterError(f"request {self.request_id}: {counts}. This is a bug of expertd.")
            self.end = event
        self.events.append(event)

    def commit(self, number: int) -> None:
        """Let readers have the first `number` events."""
        self.num_committed = max(self.num_committed, number)
        self.tell()

    def fail(self, error: ExpertdError) -> None:
        """The answer ends here."""
        self.end = self.end or error
        self.tell()

    def tell(self) -> None:
        """Wake the readers: something changed."""
        self.changed_at = time.monotonic()
        readers, self._readers = self._readers, []
        for reader in readers:
            if not reader.done():
                reader.set_result(None)

    def news(self) -> asyncio.Future[None]:
        """To be awaited by one reader: the next change."""
        reader: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.append(reader)
        return reader

    def resumed(self) -> Submit:
        """The request as the next leader gets it.

        Its id is another each time: what a rank still says of it, after a Cancel, is not for the next one.
        """
        request_id = f"{self.request_id}~{secrets.token_hex(4)}"
        return replace(self.submit, request_id=request_id, generated=self.token_ids, resumed=True)


class Kept:
    """The transcripts that may be read again (Submit.keep), by request id; of those that are over, or that nobody
    leads, the ones that changed last."""

    def __init__(self) -> None:
        self._transcripts: dict[str, Transcript] = {}

    def all(self) -> list[Transcript]:
        return list(self._transcripts.values())

    def find(self, request_id: str) -> Transcript | None:
        found = self._transcripts.get(request_id)
        if found and found.is_idle and time.monotonic() - found.changed_at > MAX_KEPT_S:
            self.remove(request_id)
            return None
        return found

    def put(self, transcript: Transcript) -> None:
        """Keep a transcript, in the place of another one of that request."""
        self._transcripts[transcript.request_id] = transcript
        self._forget_old()

    def share(self, other: "Kept") -> None:
        """Keep what another one keeps, too."""
        self._transcripts = {t.request_id: t for t in [*other.all(), *self.all()]}

    def remove(self, request_id: str) -> None:
        self._transcripts.pop(request_id, None)

    def _forget_old(self) -> None:
        idle = sorted((t for t in self.all() if t.is_idle), key=lambda t: t.changed_at)
        num, num_bytes, now = len(idle), sum(t.num_bytes for t in idle), time.monotonic()
        for transcript in idle:
            if num <= MAX_KEPT and num_bytes <= MAX_KEPT_BYTES and now - transcript.changed_at <= MAX_KEPT_S:
                return
            self.remove(transcript.request_id)
            num, num_bytes = num - 1, num_bytes - transcript.num_bytes
