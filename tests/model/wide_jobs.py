"""What each rank does for test_wide.py: a model as evaluation loads it, under every split."""

import hashlib
from pathlib import Path

import mlx.core as mx
import numpy as np

from expertd.checkpoint.config import normalise_config, read_config
from expertd.link.mailbox import Mailbox
from expertd.model.model import Model
from expertd.split.cut import StepSplit

SHARES: dict[int, list[tuple[float, ...]]] = {1: [(1.0,)], 2: [(0.5, 0.5), (0.7, 0.3), (0.0, 1.0)]}
TOKENS = np.random.RandomState(5).randint(0, 250, (3, 21))


def run(mailbox: Mailbox, checkpoints: list[str]) -> dict[str, dict[str, str]]:
    """Digests of all logits, by checkpoint and by "split shares"."""
    return {folder: _digests(mailbox, Path(folder)) for folder in checkpoints}


def _digests(mailbox: Mailbox, folder: Path) -> dict[str, str]:
    model = Model(folder, normalise_config(read_config(folder)), wide=True)
    model.attach(mailbox if mailbox.num_ranks > 1 else None)
    found = {}
    splits = [name for name in model.splits if name != "sequences"]  # windows are no sequences
    for name in splits if mailbox.num_ranks > 1 else ["solo"]:
        for shares in SHARES[mailbox.num_ranks] if name != "solo" else [(1.0,)]:
            logits, _ = model.observe(mx.array(TOKENS), StepSplit(name, shares))
            mailbox.check()
            found[f"{name} {shares}"] = hashlib.sha256(np.array(logits).tobytes()).hexdigest()
    return found
