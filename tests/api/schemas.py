"""50 schemas in the style of public tests (JSONSchemaBench, the JSON Schema Test Suite), all of them bounded."""

from typing import Any

TEXT = {"type": "string", "maxLength": 8}
WORD = {"type": "string", "pattern": "^[a-z]{1,6}$"}
SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
FLAG = {"type": "boolean"}


def record(**properties: Any) -> dict[str, Any]:
    """An object that has all of its properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def several(items: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SIMPLE: list[tuple[str, Any]] = [
    ("a text", TEXT),
    ("an empty text at least", {"type": "string", "minLength": 2, "maxLength": 5}),
    ("a word", WORD),
    ("a flag", FLAG),
    ("nothing", {"type": "null"}),
    ("a small number", SMALL),
    ("a negative number", {"type": "integer", "minimum": -5, "maximum": -1}),
    ("an exclusive range", {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 7}),
    ("a constant", {"const": "yes"}),
    ("a constant object", {"const": {"a": 1}}),
    ("words to choose from", {"enum": ["red", "green", "blue"]}),
    ("values of many types", {"enum": [1, "one", None, True]}),
    ("one of two types", {"type": ["boolean", "null"]}),
    ("any of", {"anyOf": [SMALL, WORD]}),
    ("a date", {"type": "string", "format": "date"}),
    ("a time", {"type": "string", "format": "time"}),
    ("a uuid", {"type": "string", "format": "uuid"}),
    ("an address", {"type": "string", "format": "ipv4"}),
    ("a hex colour", {"type": "string", "pattern": "^#[0-9a-f]{6}$"}),
    ("a phone number", {"type": "string", "pattern": "^\\+[0-9]{2}( [0-9]{3}){2}$"}),
]
ARRAYS: list[tuple[str, Any]] = [
    ("flags", several(FLAG)),
    ("an empty list", several(TEXT, 0)),
    ("exactly two", several(SMALL, 2, 2)),
    ("lists of lists", several(several(SMALL, 2), 2)),
    ("texts and numbers", several({"anyOf": [TEXT, SMALL]})),
    ("a tuple", {"type": "array", "prefixItems": [WORD, SMALL], "items": False, "minItems": 2}),
    ("records", several(record(id=SMALL, name=TEXT), 2, 1)),
    ("choices", several({"enum": ["a", "b"]}, 4, 2)),
]
OBJECTS: list[tuple[str, Any]] = [
    ("an empty record", record()),
    ("one property", record(a=TEXT)),
    (
        "optional ones",
        {"type": "object", "properties": {"a": SMALL, "b": FLAG}, "additionalProperties": False},
    ),
    ("required and optional", {**record(a=SMALL, b=WORD), "required": ["b"]}),
    (
        "a person",
        record(name=TEXT, age=SMALL, email={"type": "string", "pattern": "^[a-z]{1,5}@[a-z]{1,5}\\.com$"}),
    ),
    ("a nested record", record(a=record(b=record(c=FLAG)))),
    ("a list inside", record(tags=several(WORD), count=SMALL)),
    ("nothing or something", record(a={"anyOf": [{"type": "null"}, TEXT]})),
    (
        "a kind that decides",
        {"anyOf": [record(kind={"const": "x"}, n=SMALL), record(kind={"const": "y"}, t=TEXT)]},
    ),
    ("names with spaces", record(**{"first name": WORD, "a-b": SMALL, "ä": FLAG})),
    ("a quotation mark in a name", record(**{'a"b': FLAG})),
    ("many properties", record(**{f"p{i}": FLAG for i in range(12)})),
    ("a definition", {**record(a={"$ref": "#/$defs/w"}, b={"$ref": "#/$defs/w"}), "$defs": {"w": WORD}}),
    (
        "a tree of bounded depth",
        {
            "$ref": "#/$defs/two",
            "$defs": {
                "leaf": record(v=SMALL),
                "one": record(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
                "two": record(left={"$ref": "#/$defs/one"}, right={"$ref": "#/$defs/leaf"}),
            },
        },
    ),
    (
        "an order",
        record(id={"type": "string", "format": "uuid"}, items=several(record(sku=WORD, n=SMALL), 2, 1)),
    ),
    (
        "a point",
        {
            "type": "object",
            "properties": {"x": SMALL, "y": SMALL},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    ),
    ("a title and a description", {**record(a=FLAG), "title": "T", "description": "D"}),
    (
        "a weather report",
        record(city=TEXT, celsius=SMALL, sky={"enum": ["clear", "rain"]}, wind=record(speed=SMALL)),
    ),
    ("a call", record(name={"const": "f"}, arguments=record(path=TEXT, recursive=FLAG))),
    ("steps", record(steps=several(record(say=TEXT), 3, 1), final=SMALL)),
    (
        "a rating",
        record(
            score={"type": "integer", "minimum": 1, "maximum": 5}, why={"type": "string", "maxLength": 20}
        ),
    ),
    ("a list that may be none", record(a={"type": ["array", "null"], "items": FLAG, "maxItems": 2})),
]
SCHEMAS = SIMPLE + ARRAYS + OBJECTS
