"""OpenAI's chat completions: messages, tools, reasoning; requests in, choices out."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from expertd.dialect import HARMONY, Dialect
from expertd.engine.messages import Done, Grammar, Logprobs, Started, Submit, Token
from expertd.server import tools as toolbox
from expertd.server.errors import ApiError
from expertd.server.harmony import HarmonySplitter
from expertd.server.parse import Strict, Text, short, unsupported
from expertd.server.parts import Call, Content, Part, Reasoning, Splitter
from expertd.server.schema import MaxTokens, Request, TopLogprobs, only
from expertd.server.tools import Tool
from expertd.server.wire import Answer, Choice, Json, shape_of

# What we pass to the template ourselves, and what would change more than the template's text.
RESERVED = {
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
}


def join_parts(content: object) -> object:
    """A message's content as one string; text parts are joined without anything in between."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise ValueError(f"part {i} is {short(kind or part)}; wanted a string or parts of type 'text'")
    return "".join(part["text"] for part in content)


Joined = Annotated[Text, BeforeValidator(join_parts, json_schema_input_type=Text | list[dict[str, Any]])]


def check_object(arguments: str) -> str:
    """A validator: a call's arguments are one JSON object."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"wanted a JSON object as text, found {short(arguments)}")
    return arguments


class CalledFunction(Strict):
    name: Text
    arguments: Annotated[Text, AfterValidator(check_object)]


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # streams have it, and some clients send back what they got


class Message(Strict):
    """One turn of a conversation, without images or sound."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Joined = ""
    name: Text | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: object) -> object:
        """Drop what clients echo from an earlier answer: "refusal": null, "annotations": [], ..."""
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v not in (None, [])}

    @model_validator(mode="after")
    def _what_a_role_has(self) -> Self:
        given = self.model_fields_set
        if "content" not in given and not self.tool_calls:
            raise ValueError("content: Field required")
        if (self.role == "tool") != ("tool_call_id" in given):
            raise ValueError("role 'tool' and tool_call_id need each other")
        for name in given & {"tool_calls", "reasoning_content", "reasoning"}:
            if self.role != "assistant":
                raise ValueError(f"{name}: only messages of role 'assistant' have it")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: there, a developer's message is a system message, and a call's
        arguments are no text."""
        message: dict[str, Any] = {
            "role": self.role.replace("developer", "system"),
            "content": self.content,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ],
        }
        return {k: v for k, v in message.items() if v or k == "content"}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    neutral: ClassVar = Request.neutral | {"echo": (False,), "include_reasoning": (True,)}

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0
    tools: list[Tool] = []
    tool_choice: toolbox.Choice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Text | None = None
    chat_template_kwargs: dict[str, Any] = {}
    thinking_token_budget: int | None = Field(None, ge=0, le=2**31)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs 'logprobs': true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self

    @property
    def choice_of_tools(self) -> "toolbox.Choice":
        return self.tool_choice or ("auto" if self.tools else "none")

    def to_submits(self, request_id: str, dialect: Dialect) -> list[Submit]:
        """The same request in the words of the engine. Raises ApiError for what the checkpoint cannot do."""
        max_tokens = self.max_completion_tokens or self.max_tokens
        logprobs = self.top_logprobs if self.logprobs else None
        return self.submits(request_id, [self.source(dialect)], max_tokens, logprobs)

    def source(self, dialect: Dialect) -> dict[str, Any]:
        """The prompt in the words of a Submit. Raises ApiError for what the checkpoint cannot do."""
        check_tools(self.choice_of_tools, self.tools, dialect)
        return {
            "messages": [m.for_template() for m in self.messages],
            "tools": [] if self.choice_of_tools == "none" else [_plain(tool) for tool in self.tools],
            "template_args": self._template_args(dialect),
            "max_reasoning": self._budget(dialect),
        }

    def grammars(self) -> list[Grammar]:
        """As Request.grammars; a forced call is one as well."""
        found = super().grammars()
        if found and self.choice_of_tools == "auto":
            message = f"{found[0].param}: not supported beside tools that may be called. Leave one out."
            raise ApiError(400, message, found[0].param, "unsupported_parameter")
        functions = [tool.function for tool in self.tools]
        if self.choice_of_tools == "auto":
            calls = toolbox.strict_calls(functions)
        else:
            calls = toolbox.forced(functions, self.choice_of_tools, self.parallel_tool_calls)
        return [*found, calls] if calls else found

    def _template_args(self, dialect: Dialect) -> dict[str, Any]:
        args = dict(self.chat_template_kwargs)
        for name in args:
            if name in RESERVED or name not in dialect.template:
                param = f"chat_template_kwargs.{name}"
                message = f"{param}: this model's chat template knows no {name}. Leave it out."
                raise ApiError(400, message, param, "unsupported_parameter")
        if self.reasoning_effort is not None:
            if "reasoning_effort" not in dialect.template:
                raise unsupported("reasoning_effort", self.reasoning_effort)
            args["reasoning_effort"] = self.reasoning_effort
        return args

    def _budget(self, dialect: Dialect) -> int | None:
        """How many tokens of reasoning there may be, by vLLM's name."""
        if self.thinking_token_budget is not None and not dialect.think_end:
            raise unsupported("thinking_token_budget", self.thinking_token_budget)
        return self.thinking_token_budget

    def splitter(self, dialect: Dialect) -> Splitter:
        """What divides the answer's text."""
        only_calls = only(self.grammars())
        forced = self.choice_of_tools not in ("none", "auto")
        parser = None
        if self.choice_of_tools == "auto":
            parser = toolbox.parser_of(dialect, [_plain(tool) for tool in self.tools])
        kind = HarmonySplitter if dialect.call_parser == HARMONY else Splitter
        return kind(dialect, parser, forced and only_calls is not None, self.parallel_tool_calls)

    def answer(self, head: Json, dialect: Dialect) -> Answer:
        choices = [ChatChoice(i, head["id"], self.logprobs, self.splitter(dialect)) for i in range(self.n)]
        return Answer(head, "chat.completion", "chat.completion.chunk", choices, self.n)


def check_tools(choice: "toolbox.Choice", tools: list[Tool], dialect: Dialect) -> None:
    """Raise ApiError where a model is to call tools by itself and knows none, or to keep to their schemas."""
    if choice != "auto":
        return
    if not ("tools" in dialect.template and dialect.call_parser):
        message = "tools: this model's chat template knows no tools. Force a call by tool_choice, or leave tools out."
        raise ApiError(400, message, "tools", "unsupported_parameter")
    for i, tool in enumerate(tools):
        if tool.function.strict and dialect.call_parser != "json_tools":
            param = f"tools[{i}].function.strict"
            message = (
                f"{param}: this model writes no JSON calls; force one by tool_choice, or leave strict out."
            )
            raise ApiError(400, message, param, "unsupported_parameter")


def _plain(tool: Tool) -> dict[str, Any]:
    return tool.model_dump(exclude_none=True)


def call_id(request_id: str, choice: int, index: int) -> str:
    """The id of a tool call: the same on every host that tells of the same answer."""
    return "call_" + hashlib.sha256(f"{request_id}.{choice}.{index}".encode()).hexdigest()[:24]


class ChatChoice(Choice):
    def __init__(self, index: int, request_id: str, logprobs: bool, splitter: Splitter) -> None:
        super().__init__(index)
        self._request_id, self._wants_logprobs, self._splitter = request_id, logprobs, splitter
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[Json] = []
        self._shown: list[Json] = []
        self.reasoning_tokens = 0

    def whole(self) -> Json:
        """The choice of a whole answer."""
        assert self.done
        text = "".join(self._content)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            calls = [{k: v for k, v in call.items() if k != "index"} for call in self._calls]
            message |= {"content": text or None, "tool_calls": calls}
        message |= _reasoned("".join(self._reasoning))
        logprobs = {"content": self._shown, "refusal": None} if self._shown else None
        return self._piece({"message": message}, logprobs, self._reason(self.done))

    def _opening(self, started: Started) -> list[Json]:
        return [self._piece({"delta": {"role": "assistant", "content": ""}}, None, None)]

    def _text(self, token: Token) -> list[Json]:
        before = self._splitter.reasoning
        deltas = [self._delta(part) for part in self._splitter.feed(token.text)]
        if before or self._splitter.reasoning:
            self.reasoning_tokens += len(token.token_ids)
        return [self._piece({"delta": delta}, self._logprobs(), None) for delta in deltas]

    def _closing(self, done: Done) -> list[Json]:
        deltas = [self._delta(part) for part in self._splitter.finish()]
        pieces = [self._piece({"delta": delta}, self._logprobs(), None) for delta in deltas]
        return [*pieces, self._piece({"delta": {}}, self._logprobs(), self._reason(done))]

    def _reason(self, done: Done) -> str:
        return "tool_calls" if self._calls and done.finish_reason == "stop" else done.finish_reason

    def _delta(self, part: Part) -> Json:
        if isinstance(part, Content):
            self._content.append(part.text)
            return {"content": part.text}
        if isinstance(part, Reasoning):
            self._reasoning.append(part.text)
            return _reasoned(part.text)
        if isinstance(part, Call):
            return {"tool_calls": [self._call(part)]}
        self._calls[part.index]["function"]["arguments"] += part.text
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}

    def _call(self, call: Call) -> Json:
        shown: Json = {
            "index": call.index,
            "id": call_id(self._request_id, self.index, call.index),
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
        self._calls.append({**shown, "function": dict(shown["function"])})
        return shown

    def _logprobs(self) -> Json | None:
        if not self._wants_logprobs:
            return None
        content = [_with_top(found) for found in self._take_logprobs()]
        self._shown += content
        return {"content": content, "refusal": None} if content else None


def _with_top(found: Logprobs) -> Json:
    return {**shape_of(found.chosen), "top_logprobs": [shape_of(c) for c in found.top]}


def _reasoned(text: str) -> Json:
    """Reasoning by both names that clients look for: DeepSeek's, and OpenRouter's and vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text} if text else {}
