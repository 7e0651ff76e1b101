import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.checkpoint.locate import find_checkpoint
from expertd.errors import CheckpointError
from tests.checkpoint.fake_hub import COMMIT, Hub, fake_hub
from tests.tiny import make_tiny

# huggingface_hub reads its environment when it is imported, hence a process of its own.
ASK = """
import json, sys
from expertd.checkpoint.locate import find_checkpoint
from expertd.errors import CheckpointError
answers = []
for name in sys.argv[1:]:
    try:
        answers.append(str(find_checkpoint(name)))
    except CheckpointError as error:
        answers.append("error: " + str(error))
assert not any(name.split(".")[0] == "mlx" for name in sys.modules)
print(json.dumps(answers))
"""


def ask(endpoint: str, cache: Path, *names: str, **environment: str) -> list[str]:
    """find_checkpoint's answers for `names` against the hub at `endpoint`."""
    defaults = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    command = [sys.executable, "-c", ASK, *names]
    done = subprocess.run(
        command, env=os.environ | defaults | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    good = make_tiny(tmp_path_factory.mktemp("hub"), "qwen3_moe")
    (good / "modeling_evil.py").write_text("raise SystemExit")
    (good / "pytorch_model.bin").write_bytes(b"pickle")
    (good / "original").mkdir()
    for name in ("model.safetensors", "config.json"):
        (good / "original" / name).write_bytes(b"the same weights again, for another engine")
    empty = tmp_path_factory.mktemp("empty")
    (empty / "README.md").write_text("no model")
    with fake_hub({"org/good": good, "org/empty": empty}) as url:
        yield url


def test_hub_id_downloads_the_wanted_files_only(hub: str, tmp_path: Path) -> None:
    (folder,) = ask(hub, tmp_path, "org/good")
    assert folder.endswith(COMMIT)
    names = {path.name for path in Path(folder).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"modeling_evil.py", "pytorch_model.bin", "original"}
    assert set(Hub.requested) == names


def test_second_time_needs_no_download(hub: str, tmp_path: Path) -> None:
    first = ask(hub, tmp_path, "org/good")
    Hub.requested.clear()
    assert ask(hub, tmp_path, "org/good") == first
    assert ask(hub, tmp_path, "org/good", HF_HUB_OFFLINE="1") == first
    assert Hub.requested == []


def test_refusals_are_one_line(hub: str, tmp_path: Path) -> None:
    missing, gated, broken, empty = ask(hub, tmp_path, "org/missing", "org/gated", "org/broken", "org/empty")
    assert "no such folder or public hub repository" in missing
    assert "gated" in gated and "hf auth login" in gated
    assert "org/broken" in broken
    assert "no config.json" in empty
    assert all(
        "\n" not in answer and answer.startswith("error: org/") for answer in (missing, gated, broken, empty)
    )


def test_no_network(tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9"  # the discard port: nothing listens
    (answer,) = ask(dead, tmp_path, "org/good")
    assert answer.startswith("error: org/good:") and "does not answer" in answer and "\n" not in answer
    (answer,) = ask(dead, tmp_path, "org/good", HF_HUB_OFFLINE="1")
    assert answer.startswith("error: org/good:") and "\n" not in answer


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("org/model") == tmp_path / "org" / "model"
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c", "../up/there", "org/", "./x/y", ""])
def test_no_such_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        find_checkpoint(name)


def test_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        find_checkpoint(str(tmp_path / "file"))


def test_demo_is_package_data_or_a_clear_error() -> None:
    try:
        assert find_checkpoint("demo").name == "demo"
    except CheckpointError as error:
        assert "no demo model" in str(error)
