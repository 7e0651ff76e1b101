"""Finds a checkpoint's dialect, as mlx-lm knows it: from its vocabulary, its settings and its chat template."""

import importlib
import re
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mlx_lm.tokenizer_utils import TokenizerWrapper, _infer_tool_parser

from expertd.dialect import HARMONY, Dialect

HARMONY_TOKENS = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"]
HARMONY_ENDS = ["<|call|>", "<|return|>"]
# A statement that transformers adds to Jinja's.
GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


def find_dialect(tokenizer: Any) -> Dialect:
    """The dialect of a tokenizer of transformers. Of several chat templates the default one counts."""
    if tokenizer.get_vocab().keys() >= {*HARMONY_TOKENS, *HARMONY_ENDS}:
        return Dialect(
            think_start="<|channel|>analysis<|message|>",
            think_end="<|end|>",
            call_parser=HARMONY,
            template=_names(tokenizer.chat_template),
            shown=HARMONY_TOKENS,
            ends=HARMONY_ENDS,
            answer_start="<|channel|>final<|message|>",
        )
    wrapped = TokenizerWrapper(tokenizer)
    marks: dict[str, Any] = {"think_start": wrapped.think_start or "", "think_end": wrapped.think_end or ""}
    parser = tokenizer.init_kwargs.get("tool_parser_type") or _infer_tool_parser(tokenizer)
    if parser:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
        marks |= {
            "call_start": module.tool_call_start,
            "call_end": module.tool_call_end,
            "call_parser": parser,
        }
    return Dialect(**marks, template=_names(tokenizer.chat_template))


def _names(template: Any) -> list[str]:
    """The names that a chat template expects to be given, sorted."""
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return []
    template = GENERATION.sub("", template)
    try:
        parsed = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:  # whoever uses it will be told
        return []
    return sorted(meta.find_undeclared_variables(parsed))
