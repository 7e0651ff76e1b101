"""How a checkpoint marks what is not plain answer in its text; model/dialect.py finds it. Imports no MLX."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """The marks around reasoning and tool calls, "" where a checkpoint has none.

    `call_parser` names the parser of mlx-lm that reads what is between `call_start` and `call_end` (an empty
    `call_end`: the rest of the text). `template` lists the names that the chat template knows; "tools"
    is among them if it has tools.
    """

    think_start: str = ""
    think_end: str = ""
    call_start: str = ""
    call_end: str = ""
    call_parser: str = ""
    template: list[str] = field(default_factory=list)

    @property
    def marks(self) -> list[str]:
        return [mark for mark in (self.think_start, self.think_end, self.call_start, self.call_end) if mark]
