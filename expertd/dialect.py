"""How a checkpoint marks what is not plain answer in its text; model/dialect.py finds it. Imports no MLX."""

from dataclasses import dataclass, field

# The format of gpt-oss (server/harmony.py), which mlx-lm does not parse.
HARMONY = "harmony"


@dataclass(frozen=True)
class Dialect:
    """The marks around reasoning and tool calls, "" where a checkpoint has none.

    `call_parser` names the parser of mlx-lm that reads what is between `call_start` and `call_end` (an empty
    `call_end`: the rest of the text), or is HARMONY. `template` lists the names that the chat template knows; "tools"
    is among them if it has tools. `shown` are more special tokens that the text must show, `ends` more that end an
    answer. `answer_start` is what an answer's grammar begins after, wherever that comes.
    """

    think_start: str = ""
    think_end: str = ""
    call_start: str = ""
    call_end: str = ""
    call_parser: str = ""
    template: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    answer_start: str = ""

    @property
    def marks(self) -> list[str]:
        marks = (self.think_start, self.think_end, self.call_start, self.call_end, *self.shown)
        return [mark for mark in marks if mark]
