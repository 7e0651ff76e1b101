"""OpenAI's text completions: prompts as text or token ids, echoed on request."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from expertd.engine.messages import Candidate, Done, Logprobs, Prompt, Started, Submit, Token
from expertd.server.parse import check_text
from expertd.server.schema import MAX_CHOICES, Request, TopLogprobs
from expertd.server.wire import Answer, Choice, Json

# OpenAI's own default for /v1/completions.
COMPLETION_TOKENS = 16


Prompts = str | list[str] | list[int] | list[list[int]]


def _as_prompts(prompt: object) -> object:
    """A text, a list of token ids, or a list of either, as a list of prompts."""
    if isinstance(prompt, str):
        return [check_text(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(_is_token_id(part) for part in prompt):
            return [prompt]
        if len(prompt) > MAX_CHOICES:
            raise ValueError(f"{len(prompt)} prompts, at most {MAX_CHOICES} are taken")
        if all(isinstance(part, str) for part in prompt):
            return [check_text(part) for part in prompt]
        if all(isinstance(part, list) and part and all(map(_is_token_id, part)) for part in prompt):
            return prompt
    raise ValueError("wanted a text, a list of texts, a list of token ids, or a list of lists of token ids")


def _is_token_id(part: object) -> bool:
    return type(part) is int and 0 <= part < 2**31


class CompletionRequest(Request):
    """POST /v1/completions."""

    neutral: ClassVar = Request.neutral | {
        "parallel_tool_calls": (True,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "reasoning_effort": (),
    }

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts, json_schema_input_type=Prompts)]
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    logprobs: TopLogprobs | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _nothing_is_no_answer(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs 'echo': true")
        return self

    def to_submits(self, request_id: str) -> list[Submit]:
        """The same request in the words of the engine."""
        max_tokens = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        sources = [self._source(prompt) for prompt in self.prompt]
        return self.submits(request_id, sources, max_tokens, self.logprobs)

    def _source(self, prompt: str | list[int]) -> dict[str, Any]:
        source: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}
        if self.echo:
            source |= {"echo": True, "prompt_logprobs": self.logprobs}
        return source

    def answer(self, head: Json) -> Answer:
        choices = [TextChoice(i) for i in range(len(self.prompt) * self.n)]
        return Answer(head, "text_completion", "text_completion", choices, self.n)


class TextChoice(Choice):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._texts: list[str] = []
        self._shown: list[Json] = []
        self._prompt_chars = 0

    def whole(self) -> Json:
        """The choice of a whole answer."""
        assert self.done
        logprobs = {name: [x for s in self._shown for x in s[name]] for name in _NAMES}
        content = {"text": "".join(self._texts)}
        return self._piece(content, logprobs if self._shown else None, self.done.finish_reason)

    def _opening(self, started: Started) -> list[Json]:
        if not started.prompt:
            return []
        prompt = started.prompt
        self._prompt_chars = len(prompt.text)
        return [self._show(prompt.text, _of_prompt(prompt) if prompt.logprobs else None, None)]

    def _text(self, token: Token) -> list[Json]:
        return [self._show(token.text, self._logprobs(), None)] if token.text else []

    def _closing(self, done: Done) -> list[Json]:
        return [self._show("", self._logprobs(), done.finish_reason)]

    def _show(self, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        self._texts.append(text)
        if logprobs:
            self._shown.append(logprobs)
        return self._piece({"text": text}, logprobs, finish_reason)

    def _logprobs(self) -> Json | None:
        found = self._take_logprobs()
        return _shape(found, self._prompt_chars) if found else None


_NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def _shape(logprobs: list[Logprobs], first_char: int) -> Json:
    return {
        "tokens": [_named(found.chosen) for found in logprobs],
        "token_logprobs": [found.chosen.logprob for found in logprobs],
        "top_logprobs": [_by_name([*found.top, found.chosen]) for found in logprobs],
        "text_offset": [first_char + found.text_offset for found in logprobs],
    }


def _of_prompt(prompt: Prompt) -> Json:
    """The same of a prompt, whose first token follows nothing and has no probability."""
    rest = _shape(prompt.logprobs, 0)
    first_text = prompt.text[: prompt.logprobs[0].text_offset]
    first = {"tokens": first_text, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
    return {name: [first[name], *rest[name]] for name in _NAMES}


def _named(candidate: Candidate) -> str:
    """A token's name in completions: "bytes:" marks one that is no UTF-8 by itself."""
    whole = candidate.text.encode() == candidate.data
    return candidate.text if whole else "bytes:" + candidate.text


def _by_name(candidates: list[Candidate]) -> dict[str, float]:
    """Likeliest first; of tokens with the same text, such as a word and a special token, the likelier one."""
    found: dict[str, float] = {}
    for candidate in candidates:
        found.setdefault(_named(candidate), candidate.logprob)
    return found
