"""The benchmark of conversions: its checkpoints, and that it sees what it is there to see."""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from expertd.bench import convert
from expertd.bench.synthetic import Sizes, make_checkpoint
from expertd.checkpoint.inspect import check_checkpoint
from expertd.errors import ClusterError
from expertd.model.classes import build_model

SIZES = Sizes(num_layers=2, num_experts=8, hidden=64, intermediate=32, vocabulary=64)


def test_made_up_checkpoint(tmp_path: Path) -> None:
    info = check_checkpoint(make_checkpoint(tmp_path / "a", SIZES, planted_bytes=1 << 40))
    assert (info.family, info.num_experts, info.total_bytes) == ("qwen3_moe", 8, SIZES.num_bytes)
    model = build_model(info.config)
    (path,) = info.folder.glob("*.safetensors")
    weights = model.sanitize(mx.load(str(path)))
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    assert {name: array.shape for name, array in weights.items()} == shapes
    assert all(mx.isfinite(array).all().item() for array in weights.values())
    experts = weights["model.layers.1.mlp.switch_mlp.up_proj.weight"].astype(mx.float32)
    assert 0.015 < experts.std().item() < 0.025 and mx.abs(experts[0] - experts[1]).min().item() < 0.1
    assert not mx.array_equal(experts[0], experts[1])
    sparse = make_checkpoint(tmp_path / "b", SIZES, planted_bytes=1024)
    (name,) = (path.name for path in sparse.glob("*.safetensors"))
    assert (sparse / name).stat().st_size == (tmp_path / "a" / name).stat().st_size
    assert (sparse / name).read_bytes() == (make_checkpoint(tmp_path / "c", SIZES, 1024) / name).read_bytes()
    planted = mx.load(str(sparse / name))["model.layers.0.mlp.experts.3.up_proj.weight"]  # type: ignore[index]
    assert planted.flatten()[:512].any().item() and not planted.flatten()[512:].any().item()


def test_soak_is_as_large_as_it_says() -> None:
    assert 20e9 < convert.SOAK.num_bytes < 21e9
    assert convert.SOAK.layer_bytes * convert.SOAK.num_layers < convert.SOAK.num_bytes


def test_processes_are_measured_and_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print(len(bytes(b'x' * (100 << 20)))); import sys; sys.exit(3)"]
    usage = convert._run(command, tmp_path)
    own_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * convert.RSS_UNIT_BYTES
    assert (
        usage.code == 3 and 100 << 20 < usage.peak_bytes < max(400 << 20, own_bytes + 1) and usage.wall_s > 0
    )
    assert "ended with code 3: 104857600" in convert._what_failed(command, usage, tmp_path)
    killed = convert._run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, kill_after_s=0.05)
    assert killed.code == -9 and killed.wall_s < 30


def test_differences_are_seen(tmp_path: Path) -> None:
    for name in ("a", "report.html"):
        (tmp_path / name).write_text("x")
    wanted = convert._hashes(tmp_path)
    assert wanted.keys() == {"a"}
    convert._compare(convert._hashes(tmp_path), wanted)
    (tmp_path / "b").touch()
    with pytest.raises(ClusterError, match="after kills b differ"):
        convert._compare(convert._hashes(tmp_path), wanted)


def test_loadable_remains_are_seen(tmp_path: Path) -> None:
    work = tmp_path / "dst.partial"
    convert._refuse_loadable(work)
    make_checkpoint(work / "checkpoint", SIZES, 0)
    with pytest.raises(ClusterError, match="checkpoint of a killed run can be loaded"):
        convert._refuse_loadable(work)
    (work / "checkpoint" / "config.json").unlink()
    convert._refuse_loadable(work)


def test_table() -> None:
    usage = convert.Usage(0, 10.0, 8.0, 3 << 30)
    rows = {"expertd": convert._row([usage, replace(usage, wall_s=12.0)], 22 * 10**9)}
    assert rows["expertd"]["source_gb_per_s"] == 2.0 and json.dumps(rows)
    text = convert._table(rows, 1.1)
    assert "10.00..12.00" in text and "1.10 times as long" in text
