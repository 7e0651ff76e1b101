"""`expertd quality` as it is typed: table, JSON, picture, report, and one line for what is wrong."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from expertd.cli import cli, quality
from expertd.errors import CheckpointError, ConfigError
from expertd.quant.convert import quantize_checkpoint
from expertd.quant.settings import Settings
from tests.tiny import make_tiny

TEXT = "the quick brown fox jumps over the lazy dog; " * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("quality")
    make_tiny(base / "full", "mixtral", "bfloat16")
    quantize_checkpoint(base / "full", base / "small", Settings(effort="plain", trunk=(4,)))
    (base / "text.txt").write_text(TEXT)
    return base


@pytest.fixture(autouse=True)
def same_handler() -> Iterator[None]:
    """The command takes SIGTERM for itself, as its process is its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["quality", *map(str, args)])


def test_table_json_picture_and_report(folder: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "q.json", "--plot", tmp_path / "q.svg", "--report")
    result = run(
        folder / "small",
        "--reference",
        folder / "full",
        "--text",
        folder / "text.txt",
        "--windows",
        2,
        *files,
    )
    assert result.exit_code == 0, result.output
    assert result.output.startswith("text.txt: 2 windows of 192 tokens; reference full, perplexity ")
    values: dict[str, Any] = json.loads((tmp_path / "q.json").read_text())
    assert values["num_windows"] == 2 and values["window_tokens"] == 192
    (found,) = values["checkpoints"]
    assert f"{found['divergence']['mean_kl']:.5f}" in result.output
    assert [layer["index"] for layer in found["layers"]] == list(range(len(found["layers"])))
    assert (tmp_path / "q.svg").read_text().startswith("<?xml")
    assert result.output.splitlines()[-1] == f"report: {folder / 'small' / 'report.html'}"
    assert f"{found['divergence']['mean_kl']:.5g}" in (folder / "small" / "report.html").read_text()


def test_progress_goes_to_standard_error_if_that_is_a_terminal(folder: Path) -> None:
    result = run(folder / "small", "--text", folder / "text.txt", "--windows", 1)
    assert result.exit_code == 0 and result.stderr == ""


def test_a_text_for_calibration_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.quant.quality.warnings_of", lambda asked: [f"--text {asked.text}: flatters"])
    result = run(folder / "small", "--text", folder / "text.txt", "--windows", 1)
    assert result.stderr == f"expertd: --text {folder / 'text.txt'}: flatters\n"


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["{}/none"], CheckpointError, "no such folder"),
        (["{}/text.txt"], CheckpointError, "found a file, wanted the folder of a checkpoint"),
        (["{}/small", "--reference", "{}/none"], CheckpointError, "no such folder"),
        (["{}/small", "--text", "{}/text.txt"], ConfigError, "wanted 23160 for 120 windows of 192"),
        (
            ["{}/small", "--json", "/no/such/q.json"],
            ConfigError,
            "--json /no/such/q.json: no folder /no/such",
        ),
        (["{}/small", "--plot", "q.pdf"], ConfigError, "--plot q.pdf: wanted a name that ends in"),
        (["{}/full", "--report"], ConfigError, "--report: "),
        (["{}/small", "--windows", "0"], SystemExit, "0 is not in the range"),
        (["{}/small", "--ranks", "5"], SystemExit, "5 is not in the range 1<=x<=4"),
        (["{}/small", "--split", "heads"], SystemExit, "'heads' is not one of"),
        ([], SystemExit, "Missing argument 'A...'"),
    ],
)
def test_mistakes_are_one_line(args: list[str], error: type[Exception], words: str, folder: Path) -> None:
    result = run(*(arg.format(folder) for arg in args))
    assert result.exit_code != 0 and isinstance(result.exception, error)
    said = result.output if error is SystemExit else str(result.exception)
    assert words in said
    assert error is SystemExit or "\n" not in said


def test_sigterm_ends_it_tidily() -> None:
    with pytest.raises(SystemExit) as e:
        quality._terminated()
    assert e.value.code == 143
