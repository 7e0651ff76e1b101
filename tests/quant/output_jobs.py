"""A conversion for test_output.py that imports no MLX, and a process that forks one whenever it is told to.

python output_jobs.py WORKPLACE     on each line of standard input NAME: convert to WORKPLACE/NAME in a child,
                                    print its process id, then how it ended
"""

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from expertd.quant.output import Output, TensorPlan, Unit

SIZES = (
    "decoder_sparse_step head_dim hidden_size intermediate_size max_position_embeddings moe_intermediate_size "
    "num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_theta vocab_size "
    "norm_topk_prob tie_word_embeddings"
)
CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    **dict.fromkeys(SIZES.split(), 1),
}
FINGERPRINT = {"settings": {"experts_bits": 2, "trunk": [4, 16]}, "source": "abc"}
NUM_UNITS, NUM_REWRITTEN, SHARD_BYTES = 120, 12, 5_000_000


def unit(number: int, rows: int = 1000) -> Unit:
    """Three tensors of some 170 bytes a row, their sizes not all alike."""
    rows += number % 7
    return Unit(
        f"model.layers.{number}",
        (
            TensorPlan(f"model.layers.{number}.weight", "U32", (rows, 36)),
            TensorPlan(f"model.layers.{number}.scales", "BF16", (rows, 6)),
            TensorPlan(f"model.layers.{number}.biases", "BF16", (rows, 6)),
        ),
    )


def content(unit: Unit, seed: int = 0) -> dict[str, bytes]:
    """Bytes for the unit; codes are the same for every `seed`, as a distillation leaves them."""
    return {
        t.name: np.random.default_rng((*t.name.encode(), 0 if t.dtype == "U32" else seed)).bytes(t.num_bytes)
        for t in unit.tensors
    }


def make_texts(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    (folder / "evil.py").write_text("")
    return folder


def convert(dst: Path, texts: Path, seed: int = 0) -> None:
    """Write every unit from three threads in an order of `seed`, some of them twice."""
    units = [unit(i) for i in range(NUM_UNITS)]
    again = units[::10][:NUM_REWRITTEN]
    with Output(dst, units, FINGERPRINT, 12345, SHARD_BYTES) as out, ThreadPoolExecutor(3) as pool:
        missing = [u for u in units if u not in out and u.name not in out]
        random.Random(seed).shuffle(missing)
        list(pool.map(lambda u: out.write(u.name, content(u), {"error": len(u.name)}), missing))
        for u in again:
            if "distilled" not in out.notes[u.name]:
                assert out.read(u.name)[u.tensors[0].name].tobytes() == content(u)[u.tensors[0].name]
                out.write(u.name, content(u, seed=1), {"distilled": True})
        out.finish(CONFIG, texts, {"units": out.notes})


def main() -> None:
    workplace = Path(sys.argv[1])
    for number, line in enumerate(sys.stdin):
        if not (pid := os.fork()):
            convert(workplace / line.strip(), workplace / "texts", number)
            os._exit(0)
        say(pid)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def say(number: Any) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
