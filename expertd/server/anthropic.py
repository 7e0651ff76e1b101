"""Anthropic's Messages, requests: what is asked, as a chat request."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from expertd.dialect import Dialect
from expertd.engine.messages import Submit
from expertd.server.chat import ChatRequest
from expertd.server.errors import ApiError
from expertd.server.parse import Body, Strict, Text, parse_values, short
from expertd.server.schema import MaxTokens, Stop
from expertd.server.tools import ToolName
from expertd.server.wire import Json


class Block(Strict):
    """`cache_control` is accepted: what is cached changes no answer."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: Text
    citations: None = None


class ThinkingBlock(Block):
    """`signature` is ours, and empty."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


def _join_texts(content: object) -> object:
    if not isinstance(content, list):
        return content
    for i, block in enumerate(content):
        if not (
            isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)
        ):
            kind = block.get("type", block) if isinstance(block, dict) else block
            raise ValueError(f"block {i} is {short(kind)}; wanted a string or blocks of type 'text'")
    return "".join(block["text"] for block in content)


Joined = Annotated[Text, BeforeValidator(_join_texts, json_schema_input_type=Text | list[TextBlock])]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: Joined = ""
    is_error: bool = False


def _as_blocks(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _kind(block: Any) -> str:
    return str(block.get("type")) if isinstance(block, dict) else "text"


Blocks = Annotated[
    list[
        Annotated[
            Annotated[TextBlock, Tag("text")]
            | Annotated[ThinkingBlock, Tag("thinking")]
            | Annotated[ToolUseBlock, Tag("tool_use")]
            | Annotated[ToolResultBlock, Tag("tool_result")],
            Discriminator(_kind),
        ]
    ],
    BeforeValidator(_as_blocks, json_schema_input_type=Text | list[dict[str, Any]]),
]


class Message(Strict):
    role: Literal["user", "assistant"]
    content: Blocks

    @model_validator(mode="after")
    def _blocks_of_a_role(self) -> Self:
        wrong = {"user": (ThinkingBlock, ToolUseBlock), "assistant": (ToolResultBlock,)}[self.role]
        for block in self.content:
            if isinstance(block, wrong):
                raise ValueError(f"content: a message of role {self.role!r} has no {block.type}")
        return self

    def for_chat(self) -> list[Json]:
        """As chat messages: there, each tool's result is a message of its own, and comes first."""
        text = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        if self.role == "user":
            results = [
                {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.content}
                for block in self.content
                if isinstance(block, ToolResultBlock)
            ]
            return [*results, {"role": "user", "content": text}] if text or not results else results
        message: Json = {"role": "assistant", "content": text}
        if thoughts := "".join(b.thinking for b in self.content if isinstance(b, ThinkingBlock)):
            message["reasoning_content"] = thoughts
        if calls := [_call(block) for block in self.content if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = calls
        return [message]


def _call(block: ToolUseBlock) -> Json:
    return {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input)}}


class Tool(Block):
    type: Literal["custom"] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _name_where_needed(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("type 'tool' and name need each other")
        return self


class Thinking(Strict):
    """Whether the chat template asks for reasoning, and how many tokens that may have; then it is ended."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, le=2**31)


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Text | None = None
    format: OutputFormat | None = None


class CountRequest(Body):
    """POST /v1/messages/count_tokens."""

    neutral: ClassVar = {
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
    }
    harmless: ClassVar = frozenset(
        {"cache_control", "inference_geo", "metadata", "service_tier", "user_profile_id", "workspace_id"}
    )

    model: str
    messages: list[Message] = Field(min_length=1)
    system: Joined | None = None
    tools: list[Tool] = []
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def to_chat(self, dialect: Dialect) -> ChatRequest:
        """The same as a chat request. Raises ApiError for what that cannot say."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [m for message in self.messages for m in message.for_chat()]
        return parse_values(ChatRequest, {"model": self.model, "messages": messages} | self.options(dialect))

    def options(self, dialect: Dialect) -> Json:
        options: Json = {}
        if self.tools:
            options["tools"] = [_chat_tool(tool) for tool in self.tools]
        if self.tool_choice:
            options["tool_choice"] = _chat_choice(self.tool_choice)
            options["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.thinking:
            options["chat_template_kwargs"] = self._thinking_args(dialect)
            if self.thinking.budget_tokens:
                options["thinking_token_budget"] = self.thinking.budget_tokens
        if self.output_config and self.output_config.format:
            schema = {"name": "output", "schema": self.output_config.format.schema_}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.output_config and self.output_config.effort:
            options["reasoning_effort"] = self.output_config.effort
        return options

    def _thinking_args(self, dialect: Dialect) -> Json:
        assert self.thinking
        wanted = self.thinking.type != "disabled"
        known = [name for name in ("enable_thinking", "thinking") if name in dialect.template]
        if wanted and not dialect.think_start:
            message = f"thinking: this model does not think, found type {self.thinking.type!r}. Leave it out."
            raise ApiError(400, message, "thinking", "unsupported_parameter")
        if not wanted and dialect.think_start and not known:
            message = "thinking: this model's chat template cannot switch it off. Leave it out."
            raise ApiError(400, message, "thinking", "unsupported_parameter")
        return {known[0]: wanted} if known else {}


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: MaxTokens
    stop_sequences: list[Stop] = Field([], max_length=4)
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=1)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)

    def options(self, dialect: Dialect) -> Json:
        own = {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        return super().options(dialect) | own

    def to_submit(self, message_id: str, dialect: Dialect) -> tuple[Submit, ChatRequest]:
        """The same in the words of the engine, and as a chat request."""
        chat = self.to_chat(dialect)
        return chat.to_submits(message_id, dialect)[0], chat


def _chat_tool(tool: Tool) -> Json:
    function: Json = {"name": tool.name, "description": tool.description, "strict": tool.strict}
    function["parameters"] = tool.input_schema
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _chat_choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type
