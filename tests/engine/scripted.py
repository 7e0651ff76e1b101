"""An engine without a model: a runner that answers by script, and everything around it."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from expertd.dialect import Dialect
from expertd.engine.engine import Engine
from expertd.engine.kv_budget import KvBudget
from expertd.engine.messages import Done, Message, Stats, Submit, Token
from expertd.engine.plan import Plan, WindowsPlan
from expertd.engine.prefix import Prefixes
from expertd.engine.runner import Runner
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError, LinkDown
from expertd.sampling import Sampling

END = 256
VOCAB = 257
CONTEXT = 64
SAMPLING = {f.name for f in fields(Sampling)}


class ByteTokenizer:
    """One token per byte, and the end."""

    end_ids = frozenset({END})
    dialect = Dialect()

    def grammar_after(self, ids: list[int]) -> list[int]:
        return []

    def opens_reasoning(self, ids: list[int]) -> bool:
        return False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
        if not messages:
            raise ConfigError("messages: none")
        return [i for m in messages for i in self.encode(f"{m['role']}:{m['content']}\n")]

    def decode(self, ids: list[int], marks: bool = False) -> str:
        return bytes(i for i in ids if i != END).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == END else bytes([token_id])


class ScriptedCache(list[int]):
    """A sequence's tokens, with a SequenceCache's face."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        super().__init__(tokens)
        self.num_read = len(self)

    @property
    def tokens(self) -> list[int]:
        return list(self)

    @property
    def num_bytes(self) -> int:
        return len(self)

    known, pending, uneven, forgets, home = tokens, (), False, True, None

    def lengths(self) -> list[int]:
        return [len(self)] if self else []

    def can_cut(self, length: int) -> bool:
        return 0 < length <= len(self)


class ScriptedRunner:
    """Keeps tokens for caches and answers each prompt with its script; checks what every plan promises.

    A prompt without a script has logits that all of its tokens decide, as a model's do.
    """

    def __init__(self, scripts: dict[str, list[int]], caches: dict[int, ScriptedCache]) -> None:
        self.plans: list[Plan] = []
        self.waited_s = 0.0
        self.caches = caches
        self.num_meetings = 0
        self.scripts = scripts
        self.before_step: Callable[[Plan], None] = lambda plan: None
        self.before_windows: Callable[[WindowsPlan], None] = lambda plan: None

    def meet(self, apart: bool = False, chunk: int = 0) -> dict[int, int]:
        assert not self.plans
        self.num_meetings += 1
        return {i: len(tokens) for i, tokens in self.caches.items()}

    def lead(self, plan: Plan, meanwhile: Callable[[], None]) -> mx.array | None:
        self.before_step(plan)
        meanwhile()
        assert self.num_meetings == 1
        self.plans.append(plan)
        for sequence_id, source, length in plan.forks:
            assert sequence_id not in self.caches and 0 < length <= len(self.caches[source])
            self.caches[sequence_id] = ScriptedCache(self.caches[source][:length])
        assert all(sequence_id in self.caches for sequence_id in plan.settled)
        for sequence_id in plan.released:
            del self.caches[sequence_id]
        assert plan.started == [i for i in plan.sequence_ids if i not in self.caches]
        assert len(set(plan.sequence_ids)) == len(plan.sequence_ids) == len(plan.tokens)
        assert len(plan.tokens) == 1 or not plan.logits
        if plan.logits:
            assert not plan.decode
            before, tokens = self.caches.get(plan.sequence_ids[0], []), plan.tokens[0]
            rows = [self._logits(before + tokens[: i + 1]) for i in range(len(tokens))]
        for sequence_id, tokens in zip(plan.sequence_ids, plan.tokens, strict=True):
            assert tokens and len(tokens) <= (1 if plan.decode else CONTEXT)
            cache = self.caches.setdefault(sequence_id, ScriptedCache())
            cache.num_read += len(tokens) if cache.num_read == len(cache) and not plan.decode else 0
            cache.extend(tokens)
        if plan.logits:
            return mx.stack(rows)
        return mx.stack([self._logits(self.caches[i]) for i in plan.sequence_ids]) if plan.decode else None

    def report(self) -> Stats:
        return Stats()

    def save(self, sequence_id: int) -> None:
        assert sequence_id in self.caches

    def can_cut(self, sequence_id: int) -> bool:
        return True

    def cut(self, sequence_id: int, length: int) -> None:
        del self.caches[sequence_id][length:]

    def num_behind(self, sequence_ids: list[int]) -> int:
        return 0

    def lead_windows(self, plan: WindowsPlan) -> tuple[mx.array, Any]:
        self.before_windows(plan)
        tokens = mx.array(plan.windows)
        ids = mx.zeros((*tokens.shape, 2), dtype=mx.uint32)
        return tokens[..., None] * mx.ones(VOCAB), SimpleNamespace(
            hidden={0: tokens[..., None].astype(mx.bfloat16), 1: tokens[..., None] + 0.5}, experts={1: ids}
        )

    def _logits(self, tokens: list[int]) -> mx.array:
        text = bytes(t for t in tokens if t != END)
        prompt = next((p for p in self.scripts if text.startswith(p.encode())), None)
        if prompt is None:
            return mx.array(logits_after(tokens))
        script, at = self.scripts[prompt], len(tokens) - len(prompt.encode())
        chosen = script[at] if at < len(script) else END  # after a draft that is longer than the answer
        return mx.where(mx.arange(VOCAB) == chosen, 5.0, 0.0)


def logits_after(tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    random = np.random.RandomState(zlib.crc32(repr(tokens).encode()))
    return (random.standard_normal(VOCAB) * 2).astype(np.float32)


class Bench:
    """An engine with everything around it, and its events by request."""

    def __init__(
        self,
        split: str = "experts",
        shares: tuple[float, ...] = (1.0,),
        prefill_chunk: int = 512,
        max_streams: int = 16,
        max_waiting: int = 256,
        one_by_one: bool = False,
        prefix_tokens: int = 0,
        kv: KvBudget = KvBudget(),  # noqa: B008 (frozen)
    ) -> None:
        self.scripts: dict[str, list[int]] = {}
        self.events: list[Message] = []
        self.engine = Engine(
            tokenizer=cast(Tokenizer, ByteTokenizer()),
            context_length=CONTEXT,
            splits=["solo", "experts", "tokens"],
            prefill_chunk=prefill_chunk,
            send=self.events.append,
            vocab_size=VOCAB,
            max_streams=max_streams,
            max_waiting=max_waiting,
            kv=kv,
            prefixes=Prefixes(prefix_tokens, prefill_chunk, one_by_one, min_tokens=1),
        )
        self.begin(split, shares)

    def begin(
        self,
        split: str = "experts",
        shares: tuple[float, ...] = (1.0,),
        held: dict[int, int] | None = None,
    ) -> None:
        """A new epoch; of the last one's caches all ranks have the beginnings of these lengths."""
        caches = {i: ScriptedCache(self.runner.caches[i][:n]) for i, n in (held or {}).items()}
        self.runner = ScriptedRunner(self.scripts, caches)
        self.engine.begin(cast(Runner, self.runner), split, shares)

    def ask(self, request_id: str, prompt: str, reply: str | list[int] | None = None, **options: Any) -> None:
        if reply is not None:
            self.scripts[prompt] = [*reply.encode(), END] if isinstance(reply, str) else reply
        sampling = Sampling(**{name: options.pop(name) for name in SAMPLING & options.keys()})
        self.engine.take(Submit(request_id, prompt=prompt, sampling=sampling, **options))

    def finish(self, max_steps: int = 300) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            num_plans, num_events = len(self.runner.plans), len(self.events)
            self.engine.step()
            if (len(self.runner.plans), len(self.events)) == (num_plans, num_events):
                return
        raise AssertionError("the engine does not come to an end")

    def of(self, request_id: str) -> list[Any]:
        return [e for e in self.events if getattr(e, "request_id", None) == request_id]

    def text(self, request_id: str) -> str:
        return "".join(e.text for e in self.of(request_id) if isinstance(e, Token))

    def ids(self, request_id: str) -> list[int]:
        return [i for e in self.of(request_id) if isinstance(e, Token) for i in e.token_ids]

    def done(self, request_id: str) -> Done:
        assert isinstance(self.of(request_id)[-1], Done)
        return cast(Done, self.of(request_id)[-1])


def shape(plan: Plan) -> tuple[int, int, bool, bool, str]:
    (sequence_id,) = plan.sequence_ids
    return sequence_id, plan.num_tokens, bool(plan.started), plan.decode, plan.split.name


def sequences(plans: list[Plan]) -> set[int]:
    return {i for plan in plans for i in plan.sequence_ids}


def break_from(bench: Bench, num_plans: int) -> None:
    """Let every step fail from the present epoch's plan number `num_plans` on."""

    def before_step(plan: Plan) -> None:
        if len(bench.runner.plans) >= num_plans:
            raise LinkDown("rank 0, exchange 1 with rank 1: it is dead")

    bench.runner.before_step = before_step


def break_off(bench: Bench, num_plans: int) -> None:
    """Step until that failure."""
    break_from(bench, num_plans)
    with pytest.raises(LinkDown):
        bench.finish()
