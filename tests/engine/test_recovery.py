"""Streams whose steps fail go on as if nothing had been, to the last bit of their logits, in every family."""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from expertd.checkpoint.inspect import check_checkpoint
from expertd.config import ACTIVATION_BITS
from expertd.engine.engine import Engine
from expertd.engine.messages import Message, Submit, Token
from expertd.engine.prefix import Prefixes
from expertd.engine.runner import MASK_BYTES, Caches, Runner
from expertd.engine.text import Tokenizer
from expertd.errors import LinkDown
from expertd.link.mailbox import Mailbox
from expertd.model.cache_files import CacheFiles
from expertd.model.kernels import open_kernels
from expertd.model.model import Model
from tests.engine.scripted import ByteTokenizer
from tests.tiny import make_tiny

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "minimax", "qwen3_next")
PROMPTS = ("a prompt that is longer than the window of any family", "short", "x")
NUM_TOKENS = 20
CHUNK = 16


class FlakyLink:
    """Two ranks, of which the other one is played: it breaks every so many steps, and then has what `remains` says."""

    rank, num_ranks, slot_bytes = 0, 2, 0

    def __init__(self, num_steps: int, remains: str) -> None:
        self._steps_left, self._remains = num_steps, remains

    def send_frame(self, frame: bytes) -> None: ...

    def check(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise LinkDown("rank 1 died")

    def exchange(self, mine: bytes, sizes: list[int]) -> bytes:
        assert sizes == [len(mine)] * 2
        masks = [int.from_bytes(mine[i : i + MASK_BYTES], "little") for i in range(0, len(mine), MASK_BYTES)]
        theirs = {
            "everything": masks,
            "nothing": [0] * len(masks),
            "a step less": [mask & ~1 for mask in masks],
            "some": [mask if i else 0 for i, mask in enumerate(masks)],
        }[self._remains]
        return mine + b"".join(mask.to_bytes(MASK_BYTES, "little") for mask in theirs)


def load(folder: Path, kernels: str, kv_bits: int = 0) -> Model:
    info = check_checkpoint(folder)
    native = open_kernels(kernels, ACTIVATION_BITS, num_threads=2)
    return Model(info.folder, info.config, kernels=native, kv_bits=kv_bits)


class Served:
    """A model behind an engine; `steps` are what each epoch lasts, and what of its caches is left to the next."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder, self.plans = model, folder, 0
        folder.mkdir(parents=True)
        self.events: list[Message] = []
        splits = [
            s for s in model.splits if s != "sequences"
        ]  # or the first rank would keep what the other lacks
        self.engine = Engine(
            cast(Tokenizer, ByteTokenizer()), 512, splits, CHUNK, self.events.append, 257, max_streams=3
        )
        self.engine.prefixes = Prefixes(0, CHUNK, model.one_by_one)
        self.caches: Caches = {}
        self.files: CacheFiles | None = None

    def ask(self, name: str, prompt: str, **options: Any) -> None:
        file = str(self.folder / f"{name}.safetensors")
        options = {"max_tokens": NUM_TOKENS, "ignore_end": True, "logits_file": file} | options
        self.engine.take(Submit(name, prompt=prompt, **options))

    def live(self, num_steps: int = 10**6, remains: str = "everything") -> bool:
        """One epoch, in which step number num_steps fails; gives whether all was done before."""
        link = FlakyLink(num_steps, remains)
        self.engine.begin(
            Runner(self.model, cast(Mailbox, link), self.caches, self.files), "solo", (0.5, 0.5)
        )
        try:
            while not self.engine.idle:
                self.engine.step()
                self.plans += 1
        except LinkDown:
            return False
        return True

    def logits(self, name: str) -> np.ndarray[Any, Any]:
        return np.array(
            cast(dict[str, mx.array], mx.load(str(self.folder / f"{name}.safetensors")))["logits"]
        )

    def ids(self, name: str) -> list[int]:
        return [i for e in self.events if isinstance(e, Token) and e.request_id == name for i in e.token_ids]


@pytest.mark.parametrize("kernels", ["native", "mlx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streams_go_on_to_the_last_bit(family: str, kernels: str, tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / family, family), kernels)
    calm, broken = Served(model, tmp_path / "calm"), Served(model, tmp_path / "broken")
    for served in (calm, broken):
        for prompt in PROMPTS:
            served.ask(prompt[:1], prompt)
    assert calm.live()
    assert model.one_by_one or family not in ("deepseek_v3", "gpt_oss")
    kinds = ["everything", "a step less", "some", "everything", "nothing", "a step less"]
    steps = [2, 3, 9, 6, 8, 5]
    for num_steps, kind in zip(steps, kinds, strict=True):
        assert not broken.live(num_steps, kind)
    assert broken.live(remains="everything")
    for prompt in PROMPTS:
        assert broken.ids(prompt[:1]) == calm.ids(prompt[:1])
        assert np.array_equal(broken.logits(prompt[:1]), calm.logits(prompt[:1])), prompt
    assert len({tuple(row) for row in calm.logits("a").tolist()}) == NUM_TOKENS
