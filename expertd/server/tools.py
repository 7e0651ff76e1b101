"""Tools: how clients describe them, how a call is forced, and who reads a call that a model wrote its own way."""

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from expertd.dialect import HARMONY, Dialect
from expertd.engine.messages import Grammar
from expertd.errors import ConfigError
from expertd.server.errors import ApiError
from expertd.server.parse import Strict, Text
from expertd.server.parts import Parser

# A forced answer is a list of calls; without a bound it may never end.
MAX_CALLS = 8
_PARSERS = "expertd_mlx_lm_tool_parsers"

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Strict):
    """A function that the model may call; `parameters` is the JSON schema of an object."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: ToolName


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


Choice = Literal["none", "auto", "required"] | NamedTool


def forced(tools: list[Function], choice: "Choice | str", parallel: bool) -> Grammar | None:
    """The grammar of an answer that is nothing but calls of the tools that `choice` wants; None for "auto" and "none".

    It is JSON, [{"name": ..., "arguments": {...}}, ...], whatever the model's own way of writing calls is: parts.py
    reads it as it comes. Raises ApiError for a tool that is not there.
    """
    if choice in ("none", "auto"):
        return None
    wanted = tools
    if isinstance(choice, NamedTool):
        wanted = [tool for tool in tools if tool.name == choice.function.name]
    if not wanted:
        name = choice.function.name if isinstance(choice, NamedTool) else choice
        raise ApiError(400, f"tool_choice: {name!r}, but no such tool is in tools. Add it.", "tool_choice")
    alone = isinstance(choice, NamedTool) or not parallel
    schema = {
        "type": "array",
        "items": _calls_schema(wanted),
        "minItems": 1,
        "maxItems": 1 if alone else MAX_CALLS,
    }
    return Grammar("json_schema", json.dumps(schema | _definitions(wanted)), "tools")


def strict_calls(tools: list[Function]) -> Grammar | None:
    """The grammar of free text in which every call keeps to its tool's schema; None if no tool is strict.

    For models that write calls in JSON between marks. What comes before a call ends with its first mark.
    """
    if not any(tool.strict for tool in tools):
        return None
    schema = _calls_schema(tools) | _definitions(tools) | {"x-guidance": {"whitespace_pattern": "[ ]?"}}
    rules = (
        "start: (before call)* after",
        r'before[suffix="<tool_call>"]: /(.|\n)*/',
        'call: SPACE json SPACE "</tool_call>"',
        r"SPACE: /[ \n]{0,2}/",
        f"json: %json {json.dumps(schema)}",
        r"after: /(.|\n)*/",
    )
    return Grammar("lark", "\n".join(rules), "tools")


def _calls_schema(tools: list[Function]) -> dict[str, Any]:
    calls = [_call_schema(tool) for tool in tools]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _call_schema(tool: Function) -> dict[str, Any]:
    arguments = {k: v for k, v in (tool.parameters or {}).items() if k not in ("$defs", "definitions")}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {**arguments, "type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _definitions(tools: list[Function]) -> dict[str, Any]:
    """What the tools' schemas refer to as "#/$defs/...", which only works from the root. Raises ApiError when two tools
    mean different things by one name."""
    found: dict[str, Any] = {}
    for tool in tools:
        if "definitions" in (tool.parameters or {}):
            message = f"tools: {tool.name}: write $defs for definitions where a call must keep to its schema."
            raise ApiError(400, message, "tools")
        for name, value in (tool.parameters or {}).get("$defs", {}).items():
            if found.setdefault(name, value) != value:
                message = f"tools: two tools define $defs/{name} differently. Rename one."
                raise ApiError(400, message, "tools")
    return {"$defs": found} if found else {}


def parser_of(dialect: Dialect, tools: list[dict[str, Any]]) -> Parser | None:
    """What reads the calls that a model writes in its own words, None if it has none."""
    if dialect.call_parser in ("", HARMONY):
        return _no_calls if dialect.call_parser else None
    parse = _load_parser(dialect.call_parser)
    return lambda text: parse(text, tools)


def _no_calls(text: str) -> list[Any]:
    """For a format that server/harmony.py reads by itself."""
    return []


@functools.cache
def _load_parser(name: str) -> Callable[[str, Any], Any]:
    """A parser of mlx-lm, from its file: importing mlx_lm itself would import MLX, which the supervisor never does."""
    if _PARSERS not in sys.modules:
        found = importlib.util.find_spec("mlx_lm")
        if found is None or not found.submodule_search_locations:
            raise ConfigError("mlx-lm is not installed. Install expertd again.")
        folder = Path(found.submodule_search_locations[0]) / "tool_parsers"
        spec = importlib.util.spec_from_file_location(
            _PARSERS, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        package = sys.modules[_PARSERS] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    parse: Callable[[str, Any], Any] = importlib.import_module(f"{_PARSERS}.{name}").parse_tool_call
    return parse
