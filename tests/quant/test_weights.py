import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from expertd.errors import CheckpointError
from expertd.model.classes import build_model, model_classes
from expertd.quant.weights import SourceWeights
from tests import tiny
from tests.quant.narrow import (
    FarSource,
    NearSource,
    Tensors,
    config_of,
    open_weights,
    read_tensors,
    rewrite,
    write_sparse,
)
from tests.tiny import FAMILIES, make_tiny, write_json

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "src", "qwen3_moe", "bfloat16")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_oss_mxfp4"])
def test_values_are_those_that_mlx_lm_loads(family: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "src", family, "bfloat16")
    weights = open_weights(folder)
    model = load_model(folder, model_config=config_of(folder), get_model_classes=model_classes)[0]
    expected = dict(tree_flatten(model.parameters()))
    assert weights.names == tuple(expected)
    assert weights.num_parameters == sum(array.size for array in expected.values())
    for name in reversed(weights.names):
        array = weights.take([name])[name]
        assert (array.shape, array.dtype) == (weights.shape(name), weights.dtype(name))
        assert array.dtype == expected[name].dtype and mx.array_equal(array, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_layer_stand_together(family: str, tmp_path: Path) -> None:
    names = open_weights(make_tiny(tmp_path / "src", family)).names
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    inside = [name.startswith("model.layers.") for name in names]
    assert sum(a != b for a, b in pairwise(inside)) == 2
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "lm_head.weight"


def test_expert_names(src: Path) -> None:
    weights = open_weights(src)
    assert weights.expert_names == {
        f"model.layers.{i}.mlp.switch_mlp.{p}_proj.weight" for i in range(2) for p in ("gate", "up", "down")
    }


def test_needs_of_stacked_experts(src: Path) -> None:
    weights = open_weights(src)
    assert weights.needs("model.layers.1.mlp.switch_mlp.up_proj.weight") == tuple(
        f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(8)
    )
    assert weights.needs("model.norm.weight") == ("model.norm.weight",)


def test_needs_of_more_tensors_than_mlx_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "EXPERTS", 180)
    weights = open_weights(make_tiny(tmp_path / "src", "qwen3_moe", "bfloat16"))
    needed = [tensor for name in weights.names for tensor in weights.needs(name)]
    assert len(needed) == len(set(needed)) == 21 + 2 * 3 * 180


def test_needs_of_a_split_tensor(tmp_path: Path) -> None:
    weights = open_weights(make_tiny(tmp_path / "src", "deepseek_v3", "bfloat16"))
    for half in ("embed_q", "unembed_out"):
        attn = "model.layers.2.self_attn"
        assert weights.needs(f"{attn}.{half}.weight") == (f"{attn}.kv_b_proj.weight",)


def test_needs_of_packed_tensors(tmp_path: Path) -> None:
    weights = open_weights(make_tiny(tmp_path / "src", "gpt_oss_mxfp4", "bfloat16"))
    experts = "model.layers.0.mlp.experts"
    for half in ("gate", "up"):
        assert weights.needs(f"{experts}.{half}_proj.weight") == (
            f"{experts}.gate_up_proj_blocks",
            f"{experts}.gate_up_proj_scales",
        )


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "gpt_oss_mxfp4", "qwen3_next"])
def test_remote_tensors_are_fetched_first_and_released_last(family: str, tmp_path: Path) -> None:
    """The far source has zeros where nothing is fetched, so a wrong dependency shows as a wrong value."""
    folder = make_tiny(tmp_path / "src", family, "bfloat16")
    near, far = open_weights(folder), FarSource(folder, tmp_path / "far")
    weights = open_weights(far.folder, far)
    assert far.fetched == []
    expected = near.take(near.names)
    for name in weights.names:
        assert mx.array_equal(weights.take([name])[name], expected[name]), name
    used = {tensor for name in near.names for tensor in near.needs(name)}
    assert set(far.fetched) == used and sorted(far.released) == sorted(used)  # each released once


def test_a_shared_tensor_is_released_after_its_last_use(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "src", "gpt_oss", "bfloat16")
    source = NearSource(folder)
    weights = open_weights(folder, source)
    shared = "model.layers.1.mlp.experts.gate_up_proj"
    for half, released in (("up", False), ("gate", True)):
        weights.take([f"model.layers.1.mlp.experts.{half}_proj.weight"])
        assert (shared in source.released) == released


def test_each_name_can_be_taken_once(src: Path) -> None:
    weights = open_weights(src)
    weights.take(weights.names[:3])
    with pytest.raises(KeyError):
        weights.take(weights.names[2:4])


def test_nothing_is_computed_before(src: Path) -> None:
    before = mx.get_active_memory()
    weights = open_weights(src)
    assert mx.get_active_memory() - before < 1000
    assert weights.shape("lm_head.weight") == (257, 64)


def test_family_that_reads_early_needs_a_local_folder(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(src)
    model = build_model(config)
    sanitize: Callable[[dict[str, mx.array]], dict[str, mx.array]] = model.sanitize

    def reading(self: Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        mx.eval(weights["model.norm.weight"])
        return sanitize(weights)

    monkeypatch.setattr(type(model), "sanitize", reading)
    SourceWeights(model, NearSource(src), config)
    with pytest.raises(CheckpointError, match=r"reads tensor 'model\.norm\.weight' of this family"):
        SourceWeights(model, FarSource(src, tmp_path / "far"), config)


def refused(folder: Path, tensors: Tensors, message: str) -> None:
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.fixture
def tensors(src: Path) -> Tensors:
    return read_tensors(src / "model.safetensors")


def test_missing_tensor(src: Path, tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    refused(src, tensors, "lacks tensor 'model.layers.1.self_attn.q_norm.weight'")


def test_missing_expert(src: Path, tensors: Tensors) -> None:
    del tensors[EXPERT]
    refused(src, tensors, f"KeyError: '{EXPERT}'")


def test_superfluous_tensor(src: Path, tensors: Tensors) -> None:
    tensors["model.extra.weight"] = ("F32", np.ones(3, np.float32))
    refused(src, tensors, "tensor 'model.extra.weight' is none of the model's")


def test_wrong_shape(src: Path, tensors: Tensors) -> None:
    code, values = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = (code, values[:63])
    refused(src, tensors, "tensor 'model.norm.weight' has shape [63], wanted [64]")


def test_wrong_shape_of_one_expert(src: Path, tensors: Tensors) -> None:
    code, values = tensors[EXPERT]
    tensors[EXPERT] = (code, values[:63])
    refused(src, tensors, f"tensor {EXPERT!r} has shape [63, 64], wanted [64, 64] as for the other experts")


def test_integers(src: Path, tensors: Tensors) -> None:
    tensors["model.norm.weight"] = ("I32", np.ones(64, np.int32))
    refused(src, tensors, "tensor 'model.norm.weight' holds mlx.core.int32, wanted floats")


PEAK = """
import math, resource, sys
from pathlib import Path
from tests.quant.narrow import open_weights
weights = open_weights(Path(sys.argv[1]))
largest = max(2 * math.prod(weights.shape(name)) for name in weights.names)
total = 0
for name in weights.names:
    total += weights.take([name])[name].nbytes
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.platform == "linux":  # where ru_maxrss is in KiB and counts what the parent had at its fork
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(largest, total, peak)
"""


def test_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve expert tensors of 34 MB, in a sparse file."""
    folder = make_tiny(tmp_path / "src", "qwen3_next")
    monkeypatch.setattr(tiny, "HIDDEN", 1024)
    monkeypatch.setattr(tiny, "INTER", 2048)
    monkeypatch.setattr(
        tiny.Weights, "draw", lambda self, *shape, scale: np.broadcast_to(np.float32(0), shape)
    )
    parameters = tiny.Weights(0)
    config = FAMILIES["qwen3_next"](parameters)
    write_json(folder / "config.json", config)
    write_sparse(folder / "model.safetensors", {name: a.shape for name, a in parameters.tensors.items()})
    command = [sys.executable, "-c", PEAK, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    largest, total, peak = map(int, done.stdout.split())
    print(largest, total, peak)
    assert largest == 8 * 1024 * 2048 * 2 and total > 400e6 and peak < 2 * largest + 300e6
