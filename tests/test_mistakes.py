"""A user's mistakes, through the real command line: one line that says what to do, exit code 2, nothing left."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.tiny import make_tiny


def expertd(*args: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "expertd", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_refused(process: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("expertd: ")
    assert all(word in line for word in words), line
    assert process.stdout == ""
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "tiny", "mixtral")


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def truncate(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])


def lose_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_dtype(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"F99"', 1))


def lose_tensor(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes().replace(b'"lm_head.weight"', b'"lm_heat.weight"', 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["truncated"]),
        (lose_shard, ["model-00002-of-00002.safetensors"]),
        (spoil_dtype, ["F99"]),
        (lose_tensor, ["lm_heat"]),
        (lambda f: edit_config(f, model_type="llama7"), ["llama7", "unknown"]),
        (lambda f: edit_config(f, num_local_experts=None), ["no experts"]),
        (lambda f: edit_config(f, model_file="evil.py"), ["evil.py"]),
        (lambda f: (f / "config.json").write_text("{"), ["not JSON"]),
        (lambda f: (f / "config.json").unlink(), ["no such file"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer"]),
        (shutil.rmtree, ["tiny"]),
    ],
)
def test_damaged_checkpoints(tiny: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    damage(tiny)
    assert_refused(expertd("run", tiny, "hello", "--ranks", 2), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ranks", 5], ["--ranks 5", "1 to 4"]),
        (["--ranks", 0], ["--ranks 0"]),
        (["--ranks", 2, "--shares", "1"], ["--shares"]),
        (["--shares", "a,b"], ["--shares"]),
        (["--prefill-chunk", 0], ["--prefill-chunk"]),
        (["--logits", "/no/such/folder/x"], ["/no/such/folder"]),
    ],
)
def test_wrong_flags(tiny: Path, flags: list[object], words: list[str]) -> None:
    assert_refused(expertd("run", tiny, "hello", *flags), *words)


def test_prompt_longer_than_the_context(tiny: Path) -> None:
    assert_refused(expertd("run", tiny, "a" * 5000, "--ranks", 2), "5000", "context")


def test_more_ranks_than_chosen_experts(tiny: Path) -> None:
    """Mixtral's top 2 on four ranks: two of them have no rows, and the answer is the same."""
    answers = [
        expertd("run", tiny, "hello", "--max-tokens", 4, "--json", "--ranks", ranks, "--split", split)
        for ranks, split in ((1, "solo"), (4, "experts"))
    ]
    assert [a.returncode for a in answers] == [0, 0], answers[1].stderr
    one, four = (json.loads(a.stdout) for a in answers)
    assert one["token_ids"] == four["token_ids"]


def test_port_in_use(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(expertd("serve", tiny, "--port", port), str(port), "in use")


def test_quantize_refuses(tiny: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert_refused(expertd("quantize", tiny, full), "full", "not an empty folder")
    assert_refused(expertd("quantize", tiny, tmp_path / "new", "--experts-bits", 7), "experts-bits", "7")
    assert not (tmp_path / "new").exists()
