"""JSON in, Submit out: the requests of OpenAI's API as far as expertd can honour them.

A parameter that would change the answer and that we do not implement is refused by name, unless it has the
value that changes nothing. One that cannot change the answer is accepted. Any other name is refused, with
the nearest known one. So whatever gets a 200 was honoured in full.
"""

import difflib
import json
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from expertd.engine.messages import Submit
from expertd.sampling import MAX_LOGPROBS, Sampling
from expertd.server.errors import ApiError

# OpenAI's own default for /v1/completions; chat answers run to the end of the context.
COMPLETION_TOKENS = 16

# Per unsupported parameter, the values that change nothing (absent and null are always fine).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "n": (1,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
}


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid unicode: it holds half of a surrogate pair") from None
    return text


def _join_parts(content: object) -> object:
    """A message's content as one string; text parts are joined without anything in between."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {i} is {_short(kind or part)}; wanted a string or parts of type 'text'")
    return "".join(part["text"] for part in content)


def _one_prompt(prompt: object) -> object:
    if not isinstance(prompt, list):
        return prompt
    if len(prompt) != 1 or not isinstance(prompt[0], str):
        raise ValueError("wanted one string; lists of prompts and token ids are not supported")
    return prompt[0]


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _token_ids(bias: object) -> object:
    """JSON's keys are strings; here they must be token ids."""
    if not isinstance(bias, dict):
        return bias
    for name in bias:
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise ValueError(f"{_short(name)} is no token id; wanted whole numbers as names")
    return {int(name): value for name, value in bias.items()}


Text = Annotated[str, AfterValidator(_check_text)]
Stop = Annotated[Text, Field(min_length=1)]
Stops = Annotated[list[Stop], BeforeValidator(_as_list), Field(max_length=4)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[int, Bias], BeforeValidator(_token_ids)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Message(_Strict):
    """One turn of a conversation, without tools, images or sound."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_join_parts)]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: object) -> object:
        """Drop what clients echo from an earlier answer: "refusal": null, "tool_calls": [], ..."""
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v not in (None, [])}

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: there, a developer's message is a system message."""
        named = {"name": self.name} if self.name else {}
        return {"role": self.role.replace("developer", "system"), "content": self.content, **named}


class StreamOptions(_Strict):
    """What a stream holds beside the text. We never pad events, so obfuscation is harmless."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(_Strict):
    """What chat and completion requests share.

    OpenAI's names first, then those of vLLM's server; expertd.sampling says what each does. `top_k` is 0 or -1 for all.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = []
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Biases = {}
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    stop_token_ids: list[TokenId] = []
    min_tokens: int = Field(0, ge=0, le=2**31)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs 'stream': true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _submit(self, request_id: str, max_tokens: int | None, logprobs: int | None, **source: Any) -> Submit:
        if max_tokens is not None and self.min_tokens > max_tokens:
            message = (
                f"min_tokens: {self.min_tokens} is more than the {max_tokens} tokens that are asked for."
            )
            raise ApiError(400, message, "min_tokens")
        return Submit(
            request_id,
            sampling=self._sampling(),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_ids=self.stop_token_ids,
            ignore_end=self.ignore_eos,
            logprobs=logprobs,
            **source,
        )

    def _sampling(self) -> Sampling:
        # top_p 0 keeps only the likeliest token, which is what temperature 0 says.
        greedy = self.top_p == 0
        return Sampling(
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            seed=None if self.seed is None else self.seed % 2**63,
        )


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs 'logprobs': true")
        return self

    def to_submit(self, request_id: str) -> Submit:
        """The same request in the words of the engine."""
        messages = [m.for_template() for m in self.messages]
        max_tokens = self.max_completion_tokens or self.max_tokens
        logprobs = self.top_logprobs if self.logprobs else None
        return self._submit(request_id, max_tokens, logprobs, messages=messages)


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Annotated[Text, BeforeValidator(_one_prompt)]
    logprobs: TopLogprobs | None = None

    def to_submit(self, request_id: str) -> Submit:
        """The same request in the words of the engine."""
        return self._submit(
            request_id, self.max_tokens or COMPLETION_TOKENS, self.logprobs, prompt=self.prompt
        )


R = TypeVar("R", bound=Request)


def parse_request(cls: type[R], body: bytes) -> R:
    """Read a request. Raises ApiError (400) that names the parameter and what was wanted."""
    values = {k: v for k, v in _parse_object(body).items() if v is not None}
    for name in sorted(set(values) - set(cls.model_fields)):
        _check_unimplemented(name, values.pop(name), cls)
    try:
        return cls.model_validate(values)
    except ValidationError as e:
        _refuse(e)


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"The body is not valid JSON: {e}.") from e
    if not isinstance(values, dict):
        raise ApiError(400, f"The body is {_short(values)}; wanted a JSON object.")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_unimplemented(name: str, value: object, cls: type[Request]) -> None:
    if name in HARMLESS:
        return
    if name not in NEUTRAL:
        near = difflib.get_close_matches(name, cls.model_fields, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(cls.model_fields)}."
        raise ApiError(400, f"{name}: unknown parameter. {advice}", name, "unknown_parameter")
    # The types too must be equal: in Python, 0 == False and 1 == True.
    if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
        message = f"{name}: {_short(value)} is not supported by expertd. Leave {name} out."
        raise ApiError(400, message, name, "unsupported_parameter")


def _refuse(invalid: ValidationError) -> NoReturn:
    error = invalid.errors(include_url=False)[0]
    param = _dotted(error["loc"])
    what = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):
        message = f"{param}: {what}." if param else f"{what}."
    else:
        message = f"{param}: {what}, found {_short(error['input'])}."
    raise ApiError(400, message, param or None) from None


def _dotted(loc: tuple[int | str, ...]) -> str:
    parts = (f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    return "".join(parts).removeprefix(".")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
