"""Beat 4 of a step, its second half: tokens that were chosen become texts and events.

To choose a token takes 2 us, to make its text and event 25 and more. So the tokens of one step are told while the other
ranks compute the next one: rank 0 chooses, plans, sends the plan, and then tells. Nothing in a plan depends on texts,
but for stop strings: a sequence that has some is told at once, before it can be in a plan again. An end by a token, by
length or by a grammar is known without the text.

A token that is not told yet counts as chosen: if the next step fails, it is told then. If this rank dies, nobody has
seen it, and the next leader chooses it again.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from expertd.engine.echo import logprobs_of
from expertd.engine.messages import Failed, Message, Token
from expertd.engine.sequence import Sequence
from expertd.engine.text import Tokenizer
from expertd.model.sampler import Row


@dataclass(frozen=True)
class Chosen:
    """A token that a sequence took, and the logits [vocab] by which it was chosen; `is_last` of its answer."""

    sequence: Sequence
    token_id: int
    row: Row
    is_last: bool


class Delivery:
    """Events in the order in which they came about; `tell` hands them to `send` and ends with `flush`."""

    def __init__(
        self, tokenizer: Tokenizer, send: Callable[[Message], None], flush: Callable[[], None]
    ) -> None:
        self._tokenizer, self._send, self._flush = tokenizer, send, flush
        self._untold: deque[Chosen | Message] = deque()
        self.told_s = 0.0  # what the last `tell` took

    def add(self, sequence: Sequence, token_id: int, row: Row) -> None:
        """Tell of a token, now if its text may end the answer."""
        chosen = Chosen(sequence, token_id, row, bool(sequence.finish_reason))
        if sequence.ends_by_text:
            self._send(self._event(chosen))
        else:
            self._untold.append(chosen)

    def close(self, sequence: Sequence, split: str, num_ranks: int) -> None:
        """Tell of the end of a request, after its tokens."""
        request_id, file = sequence.submit.request_id, sequence.submit.logits_file
        event: Message = sequence.done(split, num_ranks)
        if sequence.failure:
            reason = f"the answer can no longer follow its grammar: {sequence.failure}"
            event = Failed(request_id, reason)
        elif file and sequence.logits:
            try:
                with open(file, "wb") as opened:  # given a name, MLX appends a suffix
                    mx.save_safetensors(opened, {"logits": mx.stack(sequence.logits)})
            except (RuntimeError, OSError) as e:
                event = Failed(request_id, f"cannot write --logits {file}: {e}")
        self._untold.append(event)

    def tell(self) -> None:
        """Send all that is known."""
        began = time.monotonic()
        if self._untold:
            while self._untold:
                event = self._untold.popleft()
                self._send(self._event(event) if isinstance(event, Chosen) else event)
            self._flush()
        self.told_s = time.monotonic() - began

    def _event(self, chosen: Chosen) -> Token:
        submit = chosen.sequence.submit
        text, offset = chosen.sequence.say(chosen.token_id, chosen.is_last)
        found = []
        if submit.logprobs is not None:
            found = [logprobs_of(self._tokenizer, chosen.row, chosen.token_id, submit.logprobs, offset)]
        return Token(submit.request_id, [chosen.token_id], text, found)
