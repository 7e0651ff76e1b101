"""What requests of several APIs share: sampling, where an answer ends, what it must look like."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from expertd.engine.messages import Grammar, Submit
from expertd.sampling import MAX_LOGPROBS, Sampling
from expertd.server.errors import ApiError
from expertd.server.parse import Body, Strict, Text, TokenId, short

# OpenAI's bound.
MAX_CHOICES = 128


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _token_ids(bias: object) -> object:
    """JSON's keys are strings; here they must be token ids."""
    if not isinstance(bias, dict):
        return bias
    for name in bias:
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise ValueError(f"{short(name)} is no token id; wanted whole numbers as names")
    return {int(name): value for name, value in bias.items()}


Stop = Annotated[Text, Field(min_length=1)]
Stops = Annotated[
    list[Stop], BeforeValidator(_as_list, json_schema_input_type=Text | list[Text]), Field(max_length=4)
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[int, Bias], BeforeValidator(_token_ids, json_schema_input_type=dict[str, Bias])]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
MaxTokens = Annotated[int, Field(ge=1, le=2**31)]
Choices = Annotated[list[Text], Field(min_length=1)]


class JsonSchema(Strict):
    """A named schema. It is always followed to the letter, whatever `strict` says."""

    name: Text = ""
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema' and json_schema need each other")
        return self

    def grammar(self, param: str) -> Grammar | None:
        if self.json_schema:
            return Grammar("json_schema", json.dumps(self.json_schema.schema_), param)
        return any_object(param) if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`; exactly one of the five."""

    json_: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.json_object is False:
            raise ValueError("wanted exactly one of json, regex, choice, grammar and json_object")
        return self

    def to_grammar(self, param: str) -> Grammar:
        if self.json_ is not None:
            return schema_grammar(self.json_, param)
        if self.regex is not None:
            return Grammar("regex", self.regex, param)
        if self.choice is not None:
            return one_of(self.choice, param)
        return Grammar("lark", self.grammar, param) if self.grammar is not None else any_object(param)


def any_object(param: str) -> Grammar:
    """Any JSON object."""
    return Grammar("json_schema", '{"type": "object"}', param)


def schema_grammar(schema: dict[str, Any] | str, param: str) -> Grammar:
    """A JSON schema, as an object or as its text. Raises ApiError when the text is no JSON."""
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except (ValueError, RecursionError) as e:
            raise ApiError(400, f"{param}: not valid JSON: {e}.", param) from e
        return Grammar("json_schema", schema, param)
    return Grammar("json_schema", json.dumps(schema), param)


def one_of(choices: list[str], param: str) -> Grammar:
    """One of several texts; JSON writes them as Lark does."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(c) for c in choices), param)


class StreamOptions(Strict):
    """What a stream holds beside the text. We never pad events, so obfuscation is harmless."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(Body):
    """What OpenAI's chat and completion requests share.

    OpenAI's names first, then those of vLLM's server; expertd.sampling says what each does. `top_k` is 0 or -1 for all.
    """

    neutral: ClassVar = {
        "audio": (),
        "best_of": (1,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1, 1.0),
        "modalities": (["text"],),
        "skip_special_tokens": (True,),
        "store": (False,),
        "suffix": ("",),
        "use_beam_search": (False,),
        "verbosity": (),
        "web_search_options": (),
    }
    harmless: ClassVar = frozenset(
        {
            "metadata",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "user",
        }
    )

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: MaxTokens | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = []
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Biases = {}
    response_format: ResponseFormat | None = None
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    stop_token_ids: list[TokenId] = []
    min_tokens: int = Field(0, ge=0, le=2**31)
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs 'stream': true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def grammars(self) -> list[Grammar]:
        """What the answer must look like, by each parameter that says so."""
        found = [
            self.response_format and self.response_format.grammar("response_format"),
            self.structured_outputs and self.structured_outputs.to_grammar("structured_outputs"),
            self.guided_json is not None and schema_grammar(self.guided_json, "guided_json"),
            self.guided_regex is not None and Grammar("regex", self.guided_regex, "guided_regex"),
            self.guided_choice is not None and one_of(self.guided_choice, "guided_choice"),
            self.guided_grammar is not None and Grammar("lark", self.guided_grammar, "guided_grammar"),
        ]
        return [grammar for grammar in found if grammar]

    def submits(
        self, request_id: str, sources: list[dict[str, Any]], max_tokens: int | None, logprobs: int | None
    ) -> list[Submit]:
        """One request for each choice, `n` for each of `sources`, the prompts in the words of a Submit."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            message = (
                f"min_tokens: {self.min_tokens} is more than the {max_tokens} tokens that are asked for."
            )
            raise ApiError(400, message, "min_tokens")
        if len(sources) * self.n > MAX_CHOICES:
            message = f"n: {len(sources)} prompts times {self.n}, at most {MAX_CHOICES} choices are given."
            raise ApiError(400, message, "n")
        return [
            Submit(
                choice_id(request_id, i),
                sampling=self.sampling(i % self.n),
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                stop=self.stop,
                stop_ids=self.stop_token_ids,
                ignore_end=self.ignore_eos,
                logprobs=logprobs,
                grammar=only(self.grammars()),
                **sources[i // self.n],
            )
            for i in range(len(sources) * self.n)
        ]

    def sampling(self, choice: int) -> Sampling:
        """How choice number `choice` of a prompt is drawn: from a seed of its own, if there is one."""
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
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
        )


def choice_id(request_id: str, index: int) -> str:
    """The id of one choice's own request."""
    return f"{request_id}.{index}" if index else request_id


def only(grammars: list[Grammar]) -> Grammar | None:
    """The one grammar, or None. Raises ApiError when there are several."""
    if len(grammars) > 1:
        message = f"{grammars[1].param}: an answer cannot follow {grammars[0].param} as well. Leave one out."
        raise ApiError(400, message, grammars[1].param)
    return grammars[0] if grammars else None
