"""What each rank does for test_exact.py: the same forward passes under every split, as digests of the logits."""

import hashlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from expertd.checkpoint.config import normalise_config, read_config
from expertd.config import ACTIVATION_BITS
from expertd.link.mailbox import Mailbox
from expertd.model.exchange import Link
from expertd.model.kernels import open_kernels
from expertd.model.model import Model
from expertd.split.cut import StepSplit

# Both prompts times top-k are beyond SwitchGLU's sort threshold.
PROMPT = [(7 * i * i + 3 * i + 11) % 250 for i in range(37)]
CHUNKS = {"one chunk": [37], "several": [20, 1, 13, 3]}
SHARES: dict[int, list[tuple[float, ...]]] = {
    1: [(1.0,)],
    2: [(0.5, 0.5), (0.7, 0.3), (0.0, 1.0)],
    3: [(1 / 3, 1 / 3, 1 / 3), (0.6, 0.1, 0.3)],
    4: [(0.25, 0.25, 0.25, 0.25)],
}
NUM_DECODED = 4


def run(mailbox: Mailbox, checkpoints: list[str], kernels: str = "native") -> dict[str, dict[str, str]]:
    """Digests by checkpoint and by "split shares chunks"; solo is computed beside the splits."""
    link = mailbox if mailbox.num_ranks > 1 else None
    return {folder: _all_splits(mailbox, link, Path(folder), CHUNKS, kernels) for folder in checkpoints}


def run_briefly(mailbox: Mailbox, checkpoint: str) -> dict[str, str]:
    """One case of each split, for where every exchange takes long."""
    model = _load(Path(checkpoint), mailbox.rank, "native")
    model.attach(mailbox)
    shares = SHARES[mailbox.num_ranks][0]
    splits = [StepSplit(name, (1.0,) if name == "solo" else shares) for name in _splits(model)]
    return {split.name: _digest(model, mailbox, split, [4, 3], num_decoded=1) for split in splits}


def run_over_mlx(mailbox: Mailbox, checkpoints: list[str]) -> dict[str, dict[str, str]]:
    """The same over MLX's ring, whose ranks meet through the mailbox."""
    from expertd.model.mlx_link import gather_over, open_ring

    link, chunks = open_ring(mailbox.rank, gather_over(mailbox)), {"several": CHUNKS["several"]}
    return {folder: _all_splits(mailbox, link, Path(folder), chunks, "native") for folder in checkpoints}


def _load(folder: Path, rank: int, kernels: str) -> Model:
    """Ranks may have unlike numbers of threads."""
    config = normalise_config(read_config(folder))
    return Model(folder, config, kernels=open_kernels(kernels, ACTIVATION_BITS, num_threads=1 + rank % 2))


def _splits(model: Model) -> list[str]:
    """Those that divide one sequence (tests/engine/test_wild.py has the other)."""
    return [name for name in model.splits if name != "sequences"]


def _all_splits(
    mailbox: Mailbox, link: Link | None, folder: Path, cases: dict[str, list[int]], kernels: str
) -> dict[str, str]:
    model = _load(folder, mailbox.rank, kernels)
    model.attach(link)
    digests = {}
    for name in _splits(model) if link else ["solo"]:
        shares = SHARES[mailbox.num_ranks] if name != "solo" else [(1.0,)]
        for fractions, label, chunks in _cases(shares, cases):
            digest = _digest(model, mailbox, StepSplit(name, fractions), chunks)
            digests[f"{name} {fractions} {label}"] = digest
    return digests


def _cases(
    shares: list[tuple[float, ...]], cases: dict[str, list[int]]
) -> Iterator[tuple[tuple[float, ...], str, list[int]]]:
    """Every share with chunks that differ, and the first also with those that do not."""
    for label, chunks in cases.items():
        for fractions in shares if label == "several" else shares[:1]:
            yield fractions, label, chunks


def _digest(
    model: Model, mailbox: Mailbox, split: StepSplit, chunks: list[int], num_decoded: int = NUM_DECODED
) -> str:
    """Logits of a prompt in chunks and of greedy decoding after it, all their bits."""
    cache: list[Any] = model.new_cache()
    sha, logits = hashlib.sha256(), None
    for start, size in zip(accumulate([0, *chunks[:-1]]), chunks, strict=True):
        logits = model.forward(PROMPT[start : start + size], cache, split).astype(mx.float32)
        mx.eval(logits)
        sha.update(np.array(logits).tobytes())
    assert logits is not None
    token = int(mx.argmax(logits[-1]).item())
    for _ in range(num_decoded):
        row = model.decode([token], [cache], split)[0]
        sha.update(np.array(row).tobytes())
        token = int(mx.argmax(row).item())
    mailbox.check()
    assert np.isfinite(np.array(row)).all()
    return sha.hexdigest()
