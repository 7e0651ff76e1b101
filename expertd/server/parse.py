"""JSON in, a typed request out, or an error that names the parameter.

A parameter that would change the answer and that we do not implement is refused by name, unless it has the
value that changes nothing. One that cannot change the answer is accepted. Any other name is refused, with
the nearest known one. So whatever gets a 200 was honoured in full.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from expertd.server.errors import ApiError

# JSON schemas of large APIs have some 30 levels.
MAX_DEPTH = 64


def check_text(text: str) -> str:
    """A validator: JSON may hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid unicode: it holds half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(check_text)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """A part of a request: no type is converted into another, no unknown name passes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Body(Strict):
    """A whole request. `neutral` gives, per parameter that is not implemented, the values that change nothing (absent
    and null are always fine); `harmless` lists those that cannot change the answer."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset()


B = TypeVar("B", bound=Body)


def parse_request(cls: type[B], body: bytes) -> B:
    """Read a request. Raises ApiError (400) that names the parameter and what was wanted."""
    return parse_values(cls, {k: v for k, v in _parse_object(body).items() if v is not None})


def parse_values(cls: type[B], values: dict[str, Any]) -> B:
    """As parse_request, of an object that was parsed; it loses what changes nothing."""
    for name in sorted(set(values) - _names(cls)):
        _check_unimplemented(name, values.pop(name), cls)
    try:
        return cls.model_validate(values)
    except ValidationError as e:
        _refuse(e)


def _names(cls: type[Body]) -> set[str]:
    return {field.alias or name for name, field in cls.model_fields.items()}


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"The body is not valid JSON: {e}.") from e
    if not isinstance(values, dict):
        raise ApiError(400, f"The body is {short(values)}; wanted a JSON object.")
    _check_depth(values)
    return values


def _check_depth(values: dict[str, Any]) -> None:
    """Raises ApiError (400) for what only a hostile client nests so deeply; what comes later walks it by recursion."""
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        inside = (v.values() if isinstance(v, dict) else v for v in level)
        level = [part for parts in inside for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise ApiError(400, f"The body is nested more than {MAX_DEPTH} levels deep. Flatten it.")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_unimplemented(name: str, value: object, cls: type[Body]) -> None:
    if name in cls.harmless:
        return
    if name not in cls.neutral:
        near = difflib.get_close_matches(name[:80], _names(cls), n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(_names(cls)))}."
        raise ApiError(400, f"{name}: unknown parameter. {advice}", name, "unknown_parameter")
    # The types too must be equal: in Python, 0 == False and 1 == True.
    if not any(type(value) is type(neutral) and value == neutral for neutral in cls.neutral[name]):
        raise unsupported(name, value)


def unsupported(name: str, value: object) -> ApiError:
    """The error for a parameter, or a value of one, that expertd does not implement."""
    message = f"{name}: {short(value)} is not supported by expertd. Leave {name} out."
    return ApiError(400, message, name, "unsupported_parameter")


def _refuse(invalid: ValidationError) -> NoReturn:
    error = invalid.errors(include_url=False)[0]
    param = _dotted(error["loc"])
    what = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):
        message = f"{param}: {what}." if param else f"{what}."
    else:
        message = f"{param}: {what}, found {short(error['input'])}."
    raise ApiError(400, message, param or None) from None


def _dotted(loc: tuple[int | str, ...]) -> str:
    parts = (f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    return "".join(parts).removeprefix(".")


def short(value: object) -> str:
    """A value as an error shows it."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
