import json
from pathlib import Path

import pytest

from expertd.checkpoint.inspect import INDEX, check_checkpoint, describe_quantization
from expertd.errors import CheckpointError
from tests.tiny import FAMILIES, make_tiny, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "tiny", "qwen3_moe")


def refuse(folder: Path, message: str) -> None:
    """Check that the folder is refused in one line that matches `message`."""
    with pytest.raises(CheckpointError, match=message) as caught:
        check_checkpoint(folder)
    assert len(str(caught.value).splitlines()) == 1


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("generation", [4, 5])
def test_every_tiny_family_passes(family: str, generation: int, tmp_path: Path) -> None:
    info = check_checkpoint(make_tiny(tmp_path, family, "bfloat16", generation=generation))
    assert (info.num_experts, info.context_length) == (8, 512)
    assert info.quantization == ("mxfp4" if family == "gpt_oss_mxfp4" else None)
    assert 0 < info.total_bytes < (tmp_path / "model.safetensors").stat().st_size


def test_truncated_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(folder, r"model\.safetensors: truncated: tensor .* ends at byte .* download it again")


def test_no_folder_and_no_shards(folder: Path) -> None:
    refuse(folder / "nowhere", "no such folder")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refuse(folder, r"no model\*\.safetensors in it")


def test_shard_of_the_index_is_absent(folder: Path) -> None:
    write_json(folder / INDEX, {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
    refuse(folder, "model-00002-of-00002.safetensors: named in .* but absent")


def test_tensor_of_the_index_is_absent(folder: Path) -> None:
    write_json(folder / INDEX, {"weight_map": {"no.such.weight": "model.safetensors"}})
    refuse(folder, r"model\.safetensors: lacks tensor 'no\.such\.weight'")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", 7, None])
def test_index_cannot_leave_the_folder(name: object, folder: Path) -> None:
    write_json(folder / INDEX, {"weight_map": {"lm_head.weight": name}})
    refuse(folder, "wanted a .safetensors file beside it")


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}])
def test_index_without_map(index: dict[str, object], folder: Path) -> None:
    write_json(folder / INDEX, index)
    refuse(folder, "has no weight_map")


def test_damaged_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")
    refuse(folder, "not JSON")


def test_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refuse(folder, "no tokenizer")
    (folder / "vocab.json").touch()
    refuse(folder, "no tokenizer")
    (folder / "merges.txt").touch()
    assert check_checkpoint(folder).num_experts == 8


@pytest.mark.parametrize("top_k", [0, 9, None, "4"])
def test_impossible_top_k(top_k: object, folder: Path) -> None:
    change_config(folder, num_experts_per_tok=top_k)
    refuse(folder, "experts per token of 8")


def test_context_length_of_silent_configs(folder: Path) -> None:
    change_config(folder, max_position_embeddings=-5)
    assert check_checkpoint(folder).context_length == 4096


def test_quantization_in_words() -> None:
    mixed = {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
        "a": {"bits": 2, "group_size": 64},
        "b": {"bits": 4},
    }
    assert describe_quantization({"quantization": mixed}) == "affine 2/4 bits, groups of 64"
    assert (
        describe_quantization({"quantization": {"bits": 4, "group_size": 32}})
        == "affine 4 bits, groups of 32"
    )
    assert describe_quantization({"quantization_config": {"quant_method": "fp8"}}) == "fp8"
    assert describe_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4}}) == "gptq"
    assert describe_quantization({}) is None
