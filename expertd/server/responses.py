"""OpenAI's Responses, requests: what is asked, as a chat request, and what a stored one must remember."""

import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from expertd.dialect import Dialect
from expertd.engine.messages import Submit
from expertd.server.chat import ChatRequest, Joined, check_object
from expertd.server.parse import Body, Strict, Text, parse_values
from expertd.server.response_events import ResponseEvents
from expertd.server.schema import MaxTokens, TopLogprobs
from expertd.server.tools import ToolName
from expertd.server.wire import Json

INCLUDABLE = {"message.output_text.logprobs", "reasoning.encrypted_content"}
# What later requests of a conversation, and other hosts, must know of one.
NOTE_KIND = "response"


class InputMessage(Strict):
    """A turn; `id`, `status` and `phase` are those of an output that is sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Joined
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = None

    def add_to(self, messages: list[Json]) -> None:
        if self.role == "assistant":
            _assistant(messages)["content"] += self.content
        else:
            messages.append({"role": self.role, "content": self.content})


class FunctionCall(Strict):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Annotated[Text, AfterValidator(check_object)]
    id: Text | None = None
    status: Text | None = None

    def add_to(self, messages: list[Json]) -> None:
        function = {"name": self.name, "arguments": self.arguments}
        _assistant(messages).setdefault("tool_calls", []).append({"id": self.call_id, "function": function})


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: Text
    output: Joined
    id: Text | None = None
    status: Text | None = None

    def add_to(self, messages: list[Json]) -> None:
        messages.append({"role": "tool", "tool_call_id": self.call_id, "content": self.output})


class ReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(Strict):
    """Reasoning that is sent back; ours is in `content`, and never encrypted."""

    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[ReasoningText] = []
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    status: Text | None = None

    def add_to(self, messages: list[Json]) -> None:
        _assistant(messages)["reasoning_content"] = "".join(part.text for part in self.content or [])


def _assistant(messages: list[Json]) -> Json:
    """The assistant's turn at the end of a conversation, a new one if somebody else spoke last."""
    if not (messages and messages[-1]["role"] == "assistant"):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _kind(item: Any) -> str:
    return str(item.get("type", "message")) if isinstance(item, dict) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("type 'json_schema' and schema need each other")
        return self


class TextConfig(Strict):
    format: TextFormat | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    type: Literal["function"]
    name: ToolName


class ReasoningConfig(Strict):
    """There are no summaries: the reasoning itself is given."""

    effort: Text | None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(Strict):
    include_obfuscation: bool = False


class ResponsesRequest(Body):
    """POST /v1/responses."""

    neutral: ClassVar = {
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "truncation": ("disabled",),
    }
    harmless: ClassVar = frozenset(
        {
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "user",
        }
    )

    model: str
    input: Annotated[
        list[Item], BeforeValidator(_as_items, json_schema_input_type=Text | list[Item]), Field(min_length=1)
    ]
    instructions: Text | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool = True
    background: bool = False
    previous_response_id: Text | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_logprobs: TopLogprobs = 0
    include: list[str] = []
    text: TextConfig | None = None
    tools: list[FunctionTool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool = True
    reasoning: ReasoningConfig | None = None
    metadata: dict[Text, Text] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unknown := sorted(set(self.include) - INCLUDABLE):
            raise ValueError(f"include: {unknown[0]!r} is not known. Known: {', '.join(sorted(INCLUDABLE))}")
        if self.background and not self.store:
            raise ValueError("background needs 'store': true")
        return self

    @property
    def logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in self.include

    def to_chat(self, before: list[Json]) -> ChatRequest:
        """The same as a chat request, after what was said `before`. Raises ApiError for what that cannot say."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += before
        for item in self.input:
            item.add_to(messages)
        return parse_values(ChatRequest, {"model": self.model, "messages": messages} | self._options())

    def _options(self) -> Json:
        options: Json = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        if self.max_output_tokens:
            options["max_tokens"] = self.max_output_tokens
        if self.logprobs:
            options |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.tools:
            options["tools"] = [_chat_tool(tool) for tool in self.tools]
        if self.tool_choice:
            options["tool_choice"] = _chat_choice(self.tool_choice)
        if self.reasoning and self.reasoning.effort:
            options["reasoning_effort"] = self.reasoning.effort
        if self.text and self.text.format:
            options["response_format"] = _chat_format(self.text.format)
        return options

    def to_submit(self, base: Json, before: list[Json], dialect: Dialect) -> Submit:
        """The same in the words of the engine; a stored one carries the note from which any host tells its answer."""
        chat = self.to_chat(before)
        (submit,) = chat.to_submits(base["id"], dialect)
        if submit.grammar and submit.grammar.param == "response_format":
            submit = replace(submit, grammar=replace(submit.grammar, param="text"))
        if not self.store:
            return submit
        return replace(submit, keep=True, note=json.dumps(self.note(base, chat)))

    def note(self, base: Json, chat: ChatRequest) -> Json:
        """`asked` says how the text is divided; what was said is in the Submit itself."""
        asked = chat.model_dump(exclude_unset=True, exclude={"messages"}, by_alias=True)
        return {"kind": NOTE_KIND, "base": base, "asked": asked}

    def base(self, response_id: str, created_at: int, model_id: str) -> Json:
        """The response object without what the answer decides."""
        chosen = self.tool_choice or "auto"
        shape = self.text.format if self.text and self.text.format else TextFormat(type="text", schema=None)
        return {
            "id": response_id,
            "object": "response",
            "created_at": created_at,
            "model": model_id,
            "background": self.background,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": self.store,
            "temperature": self.temperature,
            "text": {"format": shape.model_dump(exclude_none=True, by_alias=True)},
            "tool_choice": chosen if isinstance(chosen, str) else chosen.model_dump(),
            "tools": [tool.model_dump() for tool in self.tools],
            "top_logprobs": self.top_logprobs,
            "top_p": self.top_p,
            "truncation": "disabled",
        }


def _chat_tool(tool: FunctionTool) -> Json:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _chat_choice(choice: str | NamedFunction) -> Any:
    return choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}


def _chat_format(shape: TextFormat) -> Json:
    if shape.schema_ is None:
        return {"type": shape.type}
    return {"type": "json_schema", "json_schema": {"name": shape.name or "", "schema": shape.schema_}}


def events_from_note(note: str, dialect: Dialect) -> ResponseEvents | None:
    """What builds the answer of a stored response, None if the note is not of one."""
    try:
        found = json.loads(note)
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("kind") != NOTE_KIND:
        return None
    messages = [{"role": "user", "content": ""}]
    chat = ChatRequest.model_validate({**found["asked"], "messages": messages})
    return ResponseEvents(found["base"], chat.splitter(dialect), chat.logprobs)


def said_before(submit: Submit, response: Json) -> list[Json]:
    """A stored response's conversation, its answer included, for the next one; its instructions end with it."""
    messages = [_as_request(m) for m in submit.messages or []]
    if response["instructions"]:
        messages = messages[1:]
    turn: Json = {"role": "assistant", "content": ""}
    for item in response["output"]:
        if item["type"] == "message":
            turn["content"] += "".join(part["text"] for part in item["content"])
        elif item["type"] == "reasoning":
            turn["reasoning_content"] = "".join(part["text"] for part in item["content"])
        else:
            function = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "function": function})
    return [*messages, turn]


def _as_request(message: Json) -> Json:
    """A message for the template as a request has it: there, arguments are text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {"id": c["id"], "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
