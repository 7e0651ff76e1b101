"""A step's plan: what rank 0 decided, as a value and as the frame that the other ranks replay."""

from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

from expertd.errors import RemoteProtocolError
from expertd.split.cut import StepSplit


@dataclass(frozen=True)
class Plan:
    """Append tokens[i] to the sequence sequence_ids[i], for every i, under `split`.

    A prefill has one sequence and any number of tokens. With `decode` each sequence gets one token, and the step
    gives the logits after it, [num_sequences, vocab]; with `logits` a prefill gives those after each of its tokens,
    [num_tokens, vocab]. Under `sequences`, homes[i] is the rank that alone computes sequence i; they ascend, a prefill
    has one sequence of each rank at most, and `spare` tokens of what they lack of the others' are read by all ranks.

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
        frame: bytes = msgpack.packb(asdict(self))
        return frame


@dataclass(frozen=True)
class WindowsPlan:
    """Read `windows`, all equally long, under `split` and without a cache."""

    windows: list[list[int]]
    split: StepSplit

    def encode(self) -> bytes:
        frame: bytes = msgpack.packb(asdict(self))
        return frame


@dataclass(frozen=True)
class CatchUp:
    """Decode steps that rank 0 has taken alone, in order, for the others to do what they leave in the caches; then each
    rank reads what it lacks of the sequences `sequence_ids`."""

    steps: list[Plan]
    sequence_ids: list[int] = field(default_factory=list)

    def encode(self) -> bytes:
        frame: bytes = msgpack.packb(asdict(self))
        return frame


@dataclass(frozen=True)
class Meeting:
    """Before an epoch's first step: the caches that rank 0 still has, each with the numbers of tokens to which it can
    be cut, and digests of so many tokens: hosts that lost each other may both have gone on with a sequence. Every rank
    answers which of these are its own as well. `apart`: rank 0 keeps what it alone has."""

    lengths: dict[int, list[int]]
    digests: dict[int, list[int]]
    apart: bool = False

    def encode(self) -> bytes:
        frame: bytes = msgpack.packb(asdict(self))
        return frame


@dataclass(frozen=True)
class Lacking:
    """Tokens of a sequence, in pieces, that rank 0 alone has in its cache; its home is rank 0."""

    sequence_id: int
    tokens: list[list[int]]
    decode: list[bool]

    def encode(self) -> bytes:
        frame: bytes = msgpack.packb(asdict(self))
        return frame


def decode_plan(frame: bytes) -> Plan | WindowsPlan | CatchUp | Meeting | Lacking:
    """Raises RemoteProtocolError when the bytes are no plan."""
    try:
        values = msgpack.unpackb(frame, strict_map_key=False)
        if "lengths" in values:
            meeting = Meeting(**values)
            lengths, digests = _numbers(meeting.lengths), _numbers(meeting.digests)
            if [(i, len(ns)) for i, ns in lengths.items()] != [(i, len(ns)) for i, ns in digests.items()]:
                raise ValueError("lengths without digests")
            return Meeting(lengths, digests, bool(meeting.apart))
        if "sequence_id" in values:
            return Lacking(**values)
        if "steps" in values:
            told = CatchUp(**values)
            return CatchUp([Plan(**_typed(step)) for step in told.steps], told.sequence_ids)
        return WindowsPlan(**_typed(values)) if "windows" in values else Plan(**_typed(values))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise RemoteProtocolError(f"rank 0 sent no plan: {e}") from e


def _numbers(lists: Any) -> dict[int, list[int]]:
    return {int(i): [int(n) for n in numbers] for i, numbers in lists.items()}


def _typed(values: Any) -> dict[str, Any]:
    split, forks = values["split"], values.get("forks", ())
    typed: dict[str, Any] = {"split": StepSplit(split["name"], tuple(split["fractions"]))}
    if forks:
        typed["forks"] = [(sequence_id, source, length) for sequence_id, source, length in forks]
    return {**values, **typed}
