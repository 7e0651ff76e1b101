"""Where drafts of what follows come from: what stood there before (speculate.py), else a small model on this rank.

The small model guesses greedily, and only on rank 0; a check does not care who guessed. Its cache holds a beginning of
one stream's tokens and is cut to what that has in common with the tokens that are asked about, so nothing has to be
told to it: a wrong guess, another stream, a new epoch or a new leader only mean that it has to read more. It reads one
chunk of what it lacks beside a step, and guesses when it has all of it.

What it costs is measured and counts as the check does: time for each token that it guesses, and for what it has to
read first, divided by the tokens that the answer may still have. The share of right guesses is one figure for all
streams, for a draft fits a model well or badly. Where guessing does not pay, it is tried again from time to time: the
planner's TRIAL_BUDGET of the time is put aside for that.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

from expertd.checkpoint.config import text_config
from expertd.checkpoint.inspect import check_draft
from expertd.engine.messages import Drafted
from expertd.engine.planner import TRIAL_BUDGET, WINDOW
from expertd.engine.prefix import num_common
from expertd.engine.sequence import Sequence
from expertd.engine.speculate import LENGTHS, MIN_GAIN, WEIGHT, pick_length, promise
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError
from expertd.model.draft import DraftModel
from expertd.model.kernels import Kernels

# What drafts of the same family get right in plain text; one that does not is found out within eight checks.
START_RATE = 0.8
# More than this is read before guessing, not with it: a check takes back at most seven tokens, or adds eight.
WITH_GUESS = 16
# After so many checks comes a plain step, or nobody would know any longer what it takes: at a moment when the machine
# was busy elsewhere it took 172 ms instead of 7, and a draft that was right once in four seemed to pay for ever.
MAX_IN_A_ROW = 16

CostS = Callable[[int], float | None]


class Drafter:
    """A draft model and its cache, which follows one stream at a time."""

    def __init__(self, model: DraftModel, context_length: int, chunk: int) -> None:
        self.rate = START_RATE
        self._model, self._context_length, self._chunk = model, context_length, chunk
        self._cache = model.new_cache()
        self._read_s: deque[float] = deque(maxlen=WINDOW)  # for each token
        self._guess_s: deque[float] = deque(maxlen=WINDOW)
        self._savings_s = 0.0

    def draft(self, tokens: list[int], room: int, cost_s: CostS) -> list[int]:
        """At most `room` tokens that may follow, if to guess and check them is expected to pay, or has to be tried.

        cost_s(n) is what a step of n tokens takes.
        """
        if room < 1 or len(tokens) + LENGTHS[-1] > self._context_length:
            return []
        self._follow(tokens)
        length = self._pick_length(len(tokens) - len(self._cache.tokens), room, cost_s)
        if not length or not self._read(tokens):
            return []
        began, length = time.monotonic(), min(length, room)
        found = self._model.guess(tokens[len(self._cache.tokens) :], self._cache, length)
        self._guess_s.append((time.monotonic() - began) / length)
        return found

    def judge(self, num_right: int, num_judged: int) -> None:
        """Learn that of `num_judged` tokens of a draft the first `num_right` were right, and maybe one wrong."""
        for i in range(num_judged):
            self.rate += WEIGHT * ((i < num_right) - self.rate)

    def _follow(self, tokens: list[int]) -> None:
        """Keep of the cache what is a beginning of all tokens but the last, whose logits are wanted."""
        common = num_common(self._cache.tokens, tokens[:-1])
        if common:
            self._cache.cut(common)
        elif self._cache.tokens:
            self._cache = self._model.new_cache()

    def _read(self, tokens: list[int]) -> bool:
        """Read a chunk if much is lacking; gives whether little is lacking now. Its wrong ids are nobody's business."""
        start = len(self._cache.tokens)
        lacking = tokens[start:]
        if max(lacking) >= self._model.num_tokens:
            return False
        if len(lacking) <= WITH_GUESS:
            return True
        began, piece = time.monotonic(), lacking[: min(self._chunk, len(lacking) - 1)]
        self._model.read(piece, self._cache)
        seconds = time.monotonic() - began
        self._read_s.append(seconds / len(piece))
        self._savings_s = max(0.0, self._savings_s - seconds)
        return len(lacking) - len(piece) <= WITH_GUESS

    def _pick_length(self, num_lacking: int, room: int, cost_s: CostS) -> int:
        guess_s = median(self._guess_s or [0.0])
        behind_s = median(self._read_s or [0.0]) * num_lacking if num_lacking > WITH_GUESS else 0.0
        if length := pick_length(self.rate, cost_s, guess_s, behind_s / room):
            self._savings_s = 0.0
            return length
        if not (alone_s := cost_s(1)):
            return 0
        length = LENGTHS[0]
        check_s = cost_s(length + 1) or (length + 1) * alone_s
        excess_s = MIN_GAIN * (check_s + guess_s * length) - promise(self.rate, length) * alone_s
        self._savings_s += TRIAL_BUDGET * alone_s
        if self._savings_s < excess_s + behind_s:
            return 0
        if not behind_s:
            self._savings_s -= excess_s
        return length


class Drafts:
    """Both sources, and how much of what they gave was right."""

    def __init__(self, drafter: Drafter | None = None) -> None:
        self._drafter = drafter
        self._source = ""  # of the draft that is being checked
        self._num_in_a_row = 0
        self._proposed: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()

    def draft(self, sequence: Sequence, cost_s: CostS) -> list[int]:
        """Tokens that may follow a sequence's last one, if to check them is expected to pay."""
        found = self._find(sequence, cost_s) if self._num_in_a_row < MAX_IN_A_ROW else []
        self._num_in_a_row = self._num_in_a_row + 1 if found else 0
        return found

    def _find(self, sequence: Sequence, cost_s: CostS) -> list[int]:
        room = sequence.max_tokens - len(sequence.generated) - 1
        if guesses := sequence.guesses:
            length = min(pick_length(guesses.rate, cost_s), room)
            if found := guesses.draft(length):
                self._source = "lookup"
                return found
        self._source = "model"
        return self._drafter.draft(sequence.tokens, room, cost_s) if self._drafter else []

    def checked(self, draft: list[int], chosen: list[int]) -> None:
        """Learn what was chosen where `draft` was checked: at most one token that is not the draft's, the last."""
        pairs = list(zip(draft, chosen, strict=False))
        num_right = sum(guess == token for guess, token in pairs)
        self._proposed[self._source] += len(draft)
        self._accepted[self._source] += num_right
        if self._drafter and self._source == "model":
            self._drafter.judge(num_right, len(pairs))

    def take(self) -> list[Drafted]:
        """What was checked since the last time."""
        found = [Drafted(source, n, self._accepted[source]) for source, n in sorted(self._proposed.items())]
        self._proposed.clear()
        self._accepted.clear()
        return found


def open_drafter(
    folder: Path, tokenizer: Tokenizer, vocab_size: int, chunk: int, kernels: Kernels | None
) -> Drafter:
    """Load a draft for a model with this tokenizer and so many logits, which reads prompts in chunks of `chunk` tokens.

    Raises ConfigError when its vocabulary is another one or its caches cannot be cut, CheckpointError when it is none.
    """
    info = check_draft(folder)
    own = Tokenizer(folder, info.config)
    _require_same_vocabulary(folder, own.inner.get_vocab(), tokenizer.inner.get_vocab())
    num_tokens = min(vocab_size, int(text_config(info.config).get("vocab_size") or own.size))
    return Drafter(DraftModel(folder, info.config, num_tokens, kernels), info.context_length, chunk)


def _require_same_vocabulary(folder: Path, found: dict[str, int], wanted: dict[str, int]) -> None:
    if found == wanted:
        return
    differing = sorted(t for t in found.keys() | wanted.keys() if found.get(t) != wanted.get(t))
    token = differing[0]
    there, here = (str(vocabulary.get(token, "missing")) for vocabulary in (found, wanted))
    raise ConfigError(
        f"--draft-model {folder}: its vocabulary is not the model's: {len(differing)} of {len(wanted)} tokens differ, "
        f"such as {token[:40]!r} ({there} in the draft, {here} in the model). Choose a small model of the same family, "
        "or leave --draft-model out."
    )
