"""Counting without answering: /tokenize and /detokenize, in vLLM's shapes. The tokenizer is the rank's."""

from contextlib import aclosing
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from expertd.cluster.supervisor import Cluster
from expertd.dialect import Dialect
from expertd.engine.messages import Prompt, Started, Submit
from expertd.errors import ClusterError
from expertd.server.chat import ChatRequest, Message
from expertd.server.parse import Body, Text, TokenId
from expertd.server.tools import Tool
from expertd.server.wire import Json


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages for the chat template. Special tokens are the tokenizer's to add."""

    neutral: ClassVar = {
        "add_generation_prompt": (True,),
        "add_special_tokens": (True,),
        "continue_final_message": (False,),
        "return_token_strs": (False,),
    }

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] = []
    tools: list[Tool] = []
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("wanted exactly one of prompt and messages")
        return self

    def to_submit(self, request_id: str, dialect: Dialect) -> Submit:
        """A request that reads no prompt and gives no token."""
        if self.prompt is not None:
            return Submit(request_id, prompt=self.prompt, echo=True, max_tokens=0)
        names = ("messages", "tools", "chat_template_kwargs")
        chat = ChatRequest.model_validate({"model": "", **{name: getattr(self, name) for name in names}})
        return Submit(request_id, echo=True, max_tokens=0, **chat.source(dialect))

    def answer(self, prompt: Prompt, context_length: int) -> Json:
        count = len(prompt.token_ids)
        return {
            "count": count,
            "max_model_len": context_length,
            "tokens": prompt.token_ids,
            "token_strs": None,
        }


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId] = Field(min_length=1)

    def to_submit(self, request_id: str) -> Submit:
        return Submit(request_id, prompt_ids=self.tokens, echo=True, max_tokens=0)


async def counted(cluster: Cluster, submit: Submit) -> Prompt:
    """The prompt of a request, as the model would read it. Raises what Cluster.generate raises."""
    async with aclosing(cluster.generate(submit)) as events:
        async for event in events:
            if isinstance(event, Started) and event.prompt:
                return event.prompt
    raise ClusterError("the prompt did not come back. This is a bug of expertd.")
