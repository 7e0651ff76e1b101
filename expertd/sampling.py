"""What a request may ask of the choice of its next token; model/sampler.py carries it out. Imports no MLX."""

from dataclasses import dataclass

# OpenAI's bound on top_logprobs, and vLLM's default bound.
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits. Each default changes nothing, and then costs nothing.

    The server and the command line check the ranges. The values act in this order, which is vLLM's
    (vllm/v1/sample/sampler.py):

    1. `logit_bias`, (token id, bias) pairs, bias -100 to 100: added to that token's logit (OpenAI).
    2. `repetition_penalty`, 0.1 to 10: logits of tokens that the prompt or the answer holds are divided by it where
       positive and multiplied where negative (CTRL, Keskar et al. 2019, as Hugging Face and vLLM define it).
    3. `frequency_penalty`, -2 to 2, times how often the answer holds a token, and `presence_penalty`, -2 to 2, once
       if it holds it at all, are subtracted from its logit (OpenAI).
    4. `temperature`, 0 to 2, divides the logits; below 1e-5 the largest is taken, and the rest of the list is idle.
    5. `min_p`, 0 to 1: only tokens at least that share as likely as the likeliest one remain (Nguyen et al. 2024).
    6. `top_k`, 0 for all: of these, the k likeliest remain.
    7. `top_p`, above 0 up to 1: of these, the smallest set whose share of their probability reaches it remains
       (nucleus sampling, Holtzman et al. 2019).

    Of equally likely tokens the one with the lower id goes first. `seed`, 0 to 2**63 - 1, makes the choice
    repeatable; None is an arbitrary one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on the sequence's own tokens."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
