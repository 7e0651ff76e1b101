"""The product as a user runs it: real ranks, the real demo model, through the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

PROMPT = "Once upon a time there was a little fox who"


def run_demo(folder: Path, *options: str) -> tuple[dict[str, Any], bytes]:
    """`expertd run demo` with --json and --logits: its object, and the logits' bytes."""
    logits = folder / "logits"  # no suffix: the file is named as the user named it
    command = [sys.executable, "-m", "expertd", "run", "demo", PROMPT, "--max-tokens", "6", "--json"]
    process = subprocess.run(
        [*command, "--logits", str(logits), *options], capture_output=True, text=True, timeout=120, cwd=folder
    )
    assert process.returncode == 0, process.stderr
    rows = load_file(logits)["logits"]
    assert rows.dtype.name == "float32"
    assert rows.shape == (6, 4096)
    return json.loads(process.stdout.splitlines()[-1]), rows.tobytes()


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    return run_demo(tmp_path_factory.mktemp("solo"), "--prefill-chunk", "4")


@pytest.mark.parametrize(
    ("options", "split"),
    [
        (["--ranks", "2", "--split", "experts"], "experts"),
        (["--ranks", "2", "--split", "tokens", "--shares", "2,1"], "tokens"),
        (["--ranks", "3", "--split", "experts", "--shares", "1,0,5"], "experts"),
        pytest.param(
            ["--ranks", "2", "--split", "experts", "--link", "mlx"], "experts", marks=pytest.mark.slow
        ),
    ],
)
def test_ranks_give_the_same_tokens_and_bits(
    solo: tuple[dict[str, Any], bytes], tmp_path: Path, options: list[str], split: str
) -> None:
    answer, logits = run_demo(tmp_path, "--prefill-chunk", "4", *options)
    assert logits == solo[1]
    same = ("token_ids", "text", "prompt_tokens")
    assert {k: answer[k] for k in same} == {k: solo[0][k] for k in same}
    assert answer["split"] == split
    assert answer["ranks"] == int(options[1])
    assert answer["decode_tokens_per_s"] > 0
    assert answer["prefill_tokens_per_s"] > 0
