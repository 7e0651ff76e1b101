"""llama.cpp's side of rival_speed.py: a process that holds a model and times what it is asked on its standard input.

    python llama_side.py MODEL.gguf NUM_THREADS CORES VOCABULARY

It runs in a virtual environment of its own, which has llama-cpp-python and none of expertd, so it imports nothing else.
Each line of the input is {"kind": "decode" or "prefill", "tokens": n}; each line of the output has "tokens_per_s". The
first line of the output, once the model is there, has llama.cpp's own words on the processor.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any

import numpy as np

MAX_TOKENS = 2048
PROMPT_TOKENS = 4  # before the decoding that is timed


def main() -> None:
    path, num_threads, cores, vocabulary = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    import llama_cpp

    side = Side(llama_cpp, path, num_threads, vocabulary)
    say({"system": llama_cpp.llama_print_system_info().decode(), "version": llama_cpp.__version__})
    for line in sys.stdin:
        ask = json.loads(line)
        say({"tokens_per_s": getattr(side, ask["kind"])(ask["tokens"])})


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class Side:
    """The model and its context. Fails with SystemExit when llama.cpp cannot load it or gives no numbers."""

    def __init__(self, llama_cpp: Any, path: str, num_threads: int, vocabulary: int) -> None:
        self._cpp, self._vocabulary = llama_cpp, vocabulary
        # Kept: ctypes frees a callback with its last reference.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = MAX_TOKENS  # computed 512 at a time, its default
        settings.n_threads = settings.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")

    def _forward(self, tokens: list[int]) -> int:
        """Append tokens; the likeliest next one."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        code = self._cpp.llama_decode(self._context, self._cpp.llama_batch_get_one(array, len(tokens)))
        if code:
            sys.exit(f"llama_decode failed with code {code}")
        logits = self._cpp.llama_get_logits_ith(self._context, -1)
        row = np.ctypeslib.as_array(logits, shape=(self._vocabulary,))
        best = int(row.argmax())
        if not np.isfinite(row[best]):
            sys.exit("llama.cpp's logits are not numbers")
        return best

    def _clear(self) -> None:
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)

    def prefill(self, tokens: int) -> float:
        """Tokens per second of a prompt."""
        self._clear()
        prompt = [(7 * number) % self._vocabulary for number in range(1, tokens + 1)]
        begin = time.perf_counter()
        self._forward(prompt)
        return tokens / (time.perf_counter() - begin)

    def decode(self, tokens: int) -> float:
        """Tokens per second of those after the first, greedy, each chosen from the logits before it."""
        self._clear()
        token = self._forward(list(range(1, PROMPT_TOKENS + 1)))
        begin = time.perf_counter()
        for _ in range(tokens - 1):
            token = self._forward([token])
        return (tokens - 1) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
