"""What an answer may tell of its prompt: the tokens, their text, and how likely each was after those before it."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from expertd.engine.messages import Candidate, Logprobs, Prompt
from expertd.engine.text import Detokenizer, Tokenizer
from expertd.errors import ConfigError
from expertd.model.sampler import Row, logprobs

# The logits of a chunk are in memory at once, as float32: 64 rows of a vocabulary of 152,064 are 39 MB.
CHUNK = 64
# The prompt's candidates travel in one frame, about 45 bytes each: 45 MB of its 64 MiB.
MAX_CANDIDATES = 1 << 20


@dataclass
class Echo:
    """A prompt's log-probabilities as its chunks are read; `num_top` None asks for none."""

    tokenizer: Tokenizer
    ids: list[int]
    num_top: int | None
    found: list[Logprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_top is None:
            return
        if (num := len(self.ids) * (1 + self.num_top)) > MAX_CANDIDATES:
            raise ConfigError(
                f"logprobs: with echo, {len(self.ids)} prompt tokens and their {self.num_top} likeliest are {num} "
                f"values, at most {MAX_CANDIDATES} are given. Ask for fewer, or shorten the prompt."
            )
        self.offsets = _offsets(self.tokenizer, self.ids)

    @property
    def wanting(self) -> bool:
        """Whether the logits after some of the tokens are still to come."""
        return self.num_top is not None and len(self.found) < len(self.ids) - 1

    def take(self, at: int, logits: mx.array) -> None:
        """Take the logits [num_tokens, vocab] after the tokens from `at` on; an interruption may bring them again."""
        del self.found[at:]
        for row, following in zip(np.asarray(logits), range(at + 1, len(self.ids)), strict=False):
            offset = self.offsets[following]
            self.found.append(
                logprobs_of(self.tokenizer, row, self.ids[following], self.num_top or 0, offset)
            )

    def prompt(self) -> Prompt:
        return Prompt(self.ids, self.tokenizer.decode(self.ids), self.found)


def _offsets(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The number of characters before each token."""
    detokenizer, offsets, num_chars = Detokenizer(tokenizer), [], 0
    for token_id in ids:
        offsets.append(num_chars)
        num_chars += len(detokenizer.add(token_id))
    return offsets


def logprobs_of(tokenizer: Tokenizer, row: Row, token_id: int, num_top: int, offset: int) -> Logprobs:
    """How likely a token and the `num_top` likeliest are by the logits of `row`, as a message has it."""
    logprob, top = logprobs(row, token_id, num_top)
    data = tokenizer.token_bytes
    return Logprobs(
        Candidate(token_id, data(token_id), logprob), [Candidate(i, data(i), p) for i, p in top], offset
    )
