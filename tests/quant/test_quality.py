"""`expertd quality` from text to table: the same digits on any number of ranks, and one line for what is wrong."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expertd.checkpoint.inspect import CheckpointInfo, check_checkpoint
from expertd.checkpoint.locate import demo_folder
from expertd.errors import CheckpointError, ClusterError, ConfigError
from expertd.quant import picture, quality
from expertd.quant.convert import quantize_checkpoint
from expertd.quant.evaluate import LocalReader, Observed
from expertd.quant.group_reader import GroupReader
from expertd.quant.quality import Asked, Compared, compare, describe
from expertd.quant.settings import Settings
from tests.tiny import make_tiny, write_json

TEXT = "the quick brown fox jumps over the lazy dog; " * 40
NUM_WINDOWS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models of one shape, the first of them quantized, and a text."""
    base = tmp_path_factory.mktemp("quality")
    found = {
        n: make_tiny(base / n, "qwen3_moe", "bfloat16", seed) for seed, n in enumerate(("full", "other"))
    }
    quantize_checkpoint(found["full"], base / "small", Settings(effort="plain", trunk=(4,)))
    (base / "text.txt").write_text(TEXT)
    return {**found, "small": base / "small", "text": base / "text.txt"}


def ask(folders: dict[str, Path], *names: str, reference: str | None = "full", **options: Any) -> Asked:
    infos = [check_checkpoint(folders[name]) for name in names]
    beside = check_checkpoint(folders[reference]) if reference else None
    return Asked(infos, beside, **{"text": folders["text"], "num_windows": NUM_WINDOWS, **options})


@pytest.fixture(scope="module")
def compared(folders: dict[str, Path]) -> Compared:
    return compare(ask(folders, "small", "other"))


def digits(compared: Compared) -> str:
    """All but the time."""
    values = compared.to_json()
    for found in values["checkpoints"]:
        del found["seconds"]
    return json.dumps(values)


def test_a_checkpoint_beside_itself_has_lost_nothing(folders: dict[str, Path]) -> None:
    (found,) = compare(ask(folders, "full")).qualities
    assert found.divergence
    assert (found.divergence.mean_kl, found.divergence.top1_agreement) == (0, 1)
    assert found.divergence.ppl_ratio == 1 and found.perplexity == found.divergence.reference_perplexity
    assert {(x.relative_error, x.router_agreement) for x in found.layers} == {(0.0, 1.0)}


def test_a_quantized_one_has_lost_less_than_a_stranger(compared: Compared, folders: dict[str, Path]) -> None:
    small, other = compared.qualities
    assert small.divergence and other.divergence
    assert 0 < small.divergence.mean_kl < other.divergence.mean_kl
    assert small.num_bytes < other.num_bytes and small.num_parameters == other.num_parameters
    assert small.num_tokens == NUM_WINDOWS * 192
    assert compared.to_json()["reference"] == str(folders["full"])


def test_without_a_reference_there_is_a_perplexity(folders: dict[str, Path], compared: Compared) -> None:
    alone = compare(ask(folders, "small", reference=None))
    (found,) = alone.qualities
    assert found.divergence is None and found.perplexity == compared.qualities[0].perplexity
    assert [layer.bits_per_weight for layer in found.layers] == [
        layer.bits_per_weight for layer in compared.qualities[0].layers
    ]
    assert "KL" not in describe(alone) and f"{found.perplexity:.4f}" in describe(alone)


def test_the_table_says_what_the_json_says(compared: Compared) -> None:
    text = describe(compared)
    lines = {line[:20].strip(): line[20:].split() for line in text.splitlines()}
    small, other = compared.qualities
    assert small.divergence and other.divergence
    assert lines["mean KL (nats/token)"][0::3] == [
        f"{x.mean_kl:.5f}" for x in (small.divergence, other.divergence)
    ]
    assert lines["perplexity"] == [f"{small.perplexity:.4f}", f"{other.perplexity:.4f}"]
    assert text.startswith("text.txt: 3 windows of 192 tokens; reference full, perplexity ")
    assert "small, layer by layer" in text and "other, layer by layer" in text
    assert f"{small.layers[1].relative_error:.4f}" in text
    assert f"{small.layers[1].router_agreement:.2%}" in text


def test_names_of_folders_are_told_apart() -> None:
    def info(path: str) -> Any:
        return SimpleNamespace(folder=Path(path))

    assert quality.name_all([info("/x/a"), info("/x/b")]) == ["a", "b"]
    assert quality.name_all([info("/x/a"), info("/y/a")]) == ["/x/a", "/y/a"]


def test_progress_is_told(folders: dict[str, Path]) -> None:
    told: list[tuple[str, int, int]] = []
    compare(ask(folders, "other"), lambda *args: told.append(args))
    assert told == [(w, n, NUM_WINDOWS) for w in ("reference full", "other") for n in (0, NUM_WINDOWS)]


# Ranks and splits.


def test_ranks_change_no_digit(folders: dict[str, Path], compared: Compared) -> None:
    again = compare(ask(folders, "small", num_ranks=2, split="tokens"))
    one = replace(compared, labels=compared.labels[:1], qualities=compared.qualities[:1])
    assert digits(again) == digits(one)
    assert describe(again) == describe(one)


def windows() -> Any:
    return np.array([[(7 * i * i + 3 * i + j) % 250 for i in range(40)] for j in range(2)], dtype=np.int32)


def same(found: Observed, wanted: Observed) -> None:
    np.testing.assert_array_equal(found.logits, wanted.logits, strict=True)
    for kind in ("hidden", "experts"):
        a, b = getattr(found, kind), getattr(wanted, kind)
        assert a.keys() == b.keys()
        for layer in a:
            np.testing.assert_array_equal(a[layer], b[layer], strict=True)


def test_stock_kernels_and_a_dense_layer_on_ranks(tmp_path: Path) -> None:
    """As the weights are, under `auto`; the first layer has no experts, and every rank the model's shared ones."""
    folder = make_tiny(tmp_path / "m", "deepseek_v3", "bfloat16")
    wanted = LocalReader(folder, wide=False).observe(windows())
    assert 0 not in wanted.experts and wanted.experts
    with GroupReader(folder, 2, "auto", wide=False, scratch=tmp_path) as reader:
        same(reader.observe(windows()), wanted)
        same(reader.observe(windows()[:1, :1]), LocalReader(folder, wide=False).observe(windows()[:1, :1]))
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.fault
def test_a_rank_that_dies_changes_no_digit(folders: dict[str, Path]) -> None:
    wanted = LocalReader(folders["small"], wide=True).observe(windows())
    with GroupReader(folders["small"], 2, "experts", wide=True) as reader:
        same(reader.observe(windows()), wanted)
        cluster = reader._opened.result()
        first, second = cluster.living
        os.kill(second.pid, signal.SIGKILL)
        same(reader.observe(windows()), wanted)
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(ClusterError):
            reader.observe(windows())


def test_a_rank_that_cannot_start_says_why(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m", "qwen3_moe")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"), GroupReader(folder, 1, "auto", wide=True):
        pytest.fail("it is damaged")


@pytest.mark.soak  # its short forms are above: each split on tiny models
def test_the_demo_on_ranks(tmp_path: Path) -> None:
    demo = check_checkpoint(demo_folder())
    found = {
        digits(compare(Asked([demo], demo, num_windows=1, num_ranks=ranks, split=split)))
        for ranks, split in ((1, "auto"), (2, "auto"), (2, "experts"))
    }
    assert len(found) == 1


# What is wrong.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"too short", "--text: has 9 tokens, wanted 579 for 3 windows of 192"),
        (b"caf\xe9", "byte 3 is no UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_text_that_is_none(
    data: bytes | None, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text"
    if data is not None:
        text.write_bytes(data)
    with pytest.raises(ConfigError) as e:
        compare(ask(folders, "small", text=text))
    assert words in str(e.value) and "\n" not in str(e.value)


def changed(folder: Path, **config: Any) -> CheckpointInfo:
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**values, **config})
    return check_checkpoint(folder)


def test_a_reference_of_another_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    stranger = changed(make_tiny(tmp_path / "m", "qwen3_moe"), vocab_size=300)
    with pytest.raises(ConfigError, match=r"its vocabulary has 257 entries, that of .*m has 300"):
        compare(replace(ask(folders, "small"), reference=stranger))


def test_a_reference_of_another_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    stranger = make_tiny(tmp_path / "m", "qwen3_moe")
    tokenizer = json.loads((stranger / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    write_json(stranger / "tokenizer.json", tokenizer)
    with pytest.raises(ConfigError, match="its tokenizer makes other tokens"):
        compare(replace(ask(folders, "small"), reference=check_checkpoint(stranger)))


def test_a_reference_of_another_shape(folders: dict[str, Path], tmp_path: Path) -> None:
    stranger = check_checkpoint(make_tiny(tmp_path / "m", "mixtral"))
    with pytest.raises(
        ConfigError, match="--reference: its vocabulary, layers or experts are not the model's"
    ):
        compare(replace(ask(folders, "small"), reference=stranger))


def test_no_window_is_longer_than_a_context(folders: dict[str, Path], tmp_path: Path) -> None:
    short = changed(make_tiny(tmp_path / "m", "qwen3_moe"), max_position_embeddings=16)
    assert quality.common_windows(replace(ask(folders, "small"), reference=short)).shape == (3, 17)


def with_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    memory = SimpleNamespace(available=int(num_bytes))
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)


def test_memory_is_counted_before_anything_is_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(folders, "small")
    assert quality.choose_arithmetic(asked)
    size = 4 * quality.count_parameters(asked.checkpoints[0])
    logits = 3 * 8 * 192 * 257 * 4
    with_memory(monkeypatch, 1.3 * size + logits)
    assert quality.choose_arithmetic(asked)
    with pytest.raises(ConfigError, match=r"memory: .*full on 2 ranks needs .* is free. Use fewer --ranks"):
        quality.choose_arithmetic(replace(asked, num_ranks=2))
    with_memory(monkeypatch, 1000)
    with pytest.raises(ConfigError, match=r"memory: .*full needs"):
        compare(asked)


def test_one_that_does_not_fit_as_float32_decides_for_all(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "fits_wide", lambda info: info.folder.name != "full")
    assert not quality.choose_arithmetic(ask(folders, "small"))
    assert quality.choose_arithmetic(ask(folders, "small", reference=None))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[malloc] Unable to allocate 9 bytes.")])
def test_running_out_of_memory_is_one_line(
    error: Exception, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, tokens: Any) -> None:
        raise error

    monkeypatch.setattr(LocalReader, "observe", fail)
    with pytest.raises(ConfigError, match="memory: ran out of it"):
        compare(ask(folders, "small"))


def test_other_failures_stay_what_they_are(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, tokens: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(LocalReader, "observe", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        compare(ask(folders, "small"))


def test_ranks_and_splits_are_checked_first(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="--ranks 9"):
        ask(folders, "small", num_ranks=9)
    with pytest.raises(ConfigError, match="--split heads"):
        ask(folders, "small", split="heads")


def test_a_text_for_calibration_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    assert quality.warnings_of(ask(folders, "small")) == []
    known = demo_folder() / "calibration.txt"
    copy = tmp_path / "copy.txt"
    copy.write_bytes(known.read_bytes())
    for text in (known, copy):
        (warning,) = quality.warnings_of(ask(folders, "small", text=text))
        assert warning.startswith(f"--text {text}: is the text that checkpoints are calibrated on")
    made = make_tiny(tmp_path / "m", "qwen3_moe")
    write_json(made / "quantization_manifest.json", {"settings": {"calibrate": "text.txt"}})
    (warning,) = quality.warnings_of(Asked([check_checkpoint(made)], text=folders["text"]))
    assert f"{made} was calibrated on a text of that name" in warning


# The report.


def test_the_report_gets_the_quality(folders: dict[str, Path], compared: Compared) -> None:
    info = check_checkpoint(folders["small"])
    quality.check_report(info)
    before = (folders["small"] / "report.html").read_text()
    assert "mean_kl" not in before
    after = quality.update_report(info.folder, compared, compared.qualities[0]).read_text()
    assert compared.qualities[0].divergence
    assert "mean_kl" in after and f"{compared.qualities[0].divergence.mean_kl:.5g}" in after
    assert str(folders["full"]) not in after


def test_there_is_no_report_without_a_manifest(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--report: .*quantization_manifest.json is absent or lacks"):
        quality.check_report(check_checkpoint(folders["full"]))
    made = make_tiny(tmp_path / "m", "qwen3_moe")
    write_json(made / "quantization_manifest.json", {"settings": {}})
    with pytest.raises(ConfigError, match=r"lacks 'blocks'"):
        quality.check_report(check_checkpoint(made))


# The picture.


@pytest.fixture
def svg(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "picture.svg"


def test_the_same_figures_give_the_same_picture(compared: Compared, svg: Path) -> None:
    picture.draw(compared, svg)
    first = svg.read_bytes()
    picture.draw(compared, svg)
    assert svg.read_bytes() == first
    assert first.count(b'<g id="axes_') == 3 and b"<dc:date>" not in first
    alone = replace(compared, labels=("small",), qualities=compared.qualities[:1])
    picture.draw(alone, svg)
    assert svg.read_bytes().count(b'<g id="axes_') == 2
    bare = replace(alone, qualities=(replace(alone.qualities[0], divergence=None),))
    picture.draw(bare, svg)
    assert svg.read_bytes().count(b'<g id="axes_') == 1


def test_a_picture_may_be_a_png(compared: Compared, tmp_path: Path) -> None:
    picture.draw(compared, tmp_path / "p.PNG")
    assert (tmp_path / "p.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be(svg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--plot x.pdf: wanted a name that ends in .svg or .png"):
        picture.check_picture(Path("x.pdf"))
    with pytest.raises(ConfigError, match=r"--plot /no/such/x\.svg: no folder /no/such"):
        picture.check_picture(Path("/no/such/x.svg"))
    picture.check_picture(svg)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'expertd\[plot\]'"):
        picture.check_picture(svg)
