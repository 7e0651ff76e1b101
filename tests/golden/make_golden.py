"""Make the golden logits again: Hugging Face transformers on the checkpoints of tests/tiny.py.

Needs torch and transformers (the `train` extra), a minute, and nothing else:

    python -m tests.golden.make_golden

Each file holds `tokens` int32 [num_tokens] and `logits` float32 [num_tokens, vocab], computed in float32 with
eager attention on the CPU, in one pass over all tokens.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILIES, VOCAB, make_tiny

HERE = Path(__file__).parent
NUM_TOKENS = 24


def tokens() -> np.ndarray:
    """A fixed walk over the vocabulary."""
    return (np.arange(NUM_TOKENS, dtype=np.int32) * 97 + 13) % VOCAB


def reference_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Transformers' logits [num_tokens, vocab] for token ids [num_tokens]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


def main() -> None:
    torch.set_num_threads(1)
    for family in FAMILIES:
        if family == "gpt_oss_mxfp4":  # transformers needs triton kernels for it
            continue
        with tempfile.TemporaryDirectory() as folder:
            logits = reference_logits(make_tiny(Path(folder), family), tokens())
        save_file({"tokens": tokens(), "logits": logits}, HERE / f"{family}.safetensors")
        print(f"{family}: logits {logits.shape}, standard deviation {logits.std():.3f}")


if __name__ == "__main__":
    main()
