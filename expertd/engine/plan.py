"""A step's plan: what rank 0 decided, as a value and as the frame that the other ranks replay."""

from dataclasses import dataclass, field, fields

import msgspec

from expertd.errors import RemoteProtocolError
from expertd.split.cut import StepSplit


@dataclass(frozen=True)
class Plan:
    """Append tokens[i] to the sequence sequence_ids[i], for every i, under `split`.

    With `decode` each sequence gets one token, and the step gives the logits after it, [num_sequences, vocab]; with
    `logits` a prefill, then of one sequence, gives those after each of its tokens, [num_tokens, vocab]. Under
    `sequences`, homes[i] is the rank that alone computes sequence i; they ascend, and `spare` tokens of what they lack
    of the others' are read by all ranks.

    `started` names the sequences whose cache begins here, `released` those whose caches are no longer needed, `settled`
    those that are finished and whose caches are. Each fork (sequence, source, length) is a sequence that begins here
    with the first `length` tokens of the cache of another, the source. With `mark`, others may begin with what there is
    after the step. Each cut (sequence, length) takes tokens back that a draft had wrong.
    """

    sequence_ids: list[int]
    tokens: list[list[int]]
    decode: bool
    split: StepSplit
    started: list[int]
    released: list[int]
    settled: list[int] = field(default_factory=list)
    forks: list[tuple[int, int, int]] = field(default_factory=list)
    mark: bool = False
    cuts: list[tuple[int, int]] = field(default_factory=list)
    logits: bool = False
    homes: list[int] = field(default_factory=list)
    spare: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


@dataclass(frozen=True)
class WindowsPlan:
    """Read `windows`, all equally long, under `split` and without a cache."""

    windows: list[list[int]]
    split: StepSplit

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


@dataclass(frozen=True)
class Rows:
    """The keys and values of the next `num_tokens` pending tokens, from token `start` on, of a sequence whose home is
    rank 0: the others put them into their caches instead of reading the tokens (model/rows.py)."""

    rows_of: int
    start: int
    num_tokens: int
    arrays: list[tuple[str, list[int], bytes]]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


@dataclass(frozen=True)
class CatchUp:
    """Decode steps that rank 0 has taken alone, in order, for the others to do what they leave in the caches; then each
    rank reads what it lacks of the sequences `sequence_ids`, and carries out what is `following`: one plan, or none.

    `copied`: what the steps leave in the caches comes as `rows`, in the frames after this one."""

    steps: list[Plan]
    sequence_ids: list[int] = field(default_factory=list)
    following: list[Plan] = field(default_factory=list)
    copied: bool = False
    rows: list[Rows] = field(default_factory=list)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


@dataclass(frozen=True)
class Meeting:
    """Before an epoch's first step: the caches that rank 0 still has, each with the numbers of tokens to which it can
    be cut, and digests of so many tokens: hosts that lost each other may both have gone on with a sequence. Every rank
    answers which of these are its own as well. `apart`: rank 0 keeps what it alone has."""

    lengths: dict[int, list[int]]
    digests: dict[int, list[int]]
    apart: bool = False

    def __post_init__(self) -> None:
        if any(len(self.digests.get(i, ())) != len(ns) for i, ns in self.lengths.items()):
            raise ValueError("lengths without digests")

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


@dataclass(frozen=True)
class Lacking:
    """Tokens of a sequence, in pieces, that rank 0 alone has in its cache; its home is rank 0."""

    sequence_id: int
    tokens: list[list[int]]
    decode: list[bool]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


Told = Plan | WindowsPlan | CatchUp | Meeting | Lacking | Rows


def decode_plan(frame: bytes) -> Told:
    """Raises RemoteProtocolError when the bytes are no plan."""
    try:
        values = msgspec.msgpack.decode(frame)
        kind: type[Told] = next((kind for key, kind in _KINDS.items() if key in values), Plan)
        if unknown := values.keys() - {field.name for field in fields(kind)}:
            raise ValueError(f"unknown field {min(unknown)}")
        return msgspec.convert(values, kind)
    except (ValueError, TypeError, AttributeError) as e:
        raise RemoteProtocolError(f"rank 0 sent no plan: {e}") from e


# By a field that only they have.
_KINDS: dict[str, type[Told]] = {
    "lengths": Meeting,
    "sequence_id": Lacking,
    "rows_of": Rows,
    "steps": CatchUp,
    "windows": WindowsPlan,
}
