"""Keys and values at 8 and 4 bits: smaller caches, nearly the same logits, the same bits alone and in company."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base

from expertd.checkpoint.sizes import cache_bytes
from expertd.engine.runner import SOLO
from expertd.errors import ConfigError
from expertd.model import model as module
from expertd.model.kv_bits import FUNCTION, widening
from expertd.model.model import Model
from expertd.model.together import Together
from tests.engine.test_recovery import load
from tests.tiny import make_tiny

PROMPT = [(7 * i * i + 3 * i + 11) % 250 for i in range(37)]


def logits_of(model: Model, chunks: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    """After the prompt, read in such chunks, and after two tokens more."""
    cache, at, rows = model.new_cache(), 0, []
    for chunk in chunks:
        rows.append(model.score(PROMPT[at : at + chunk], cache, SOLO))
        at += chunk
    rows += [model.decode([token], [cache], SOLO) for token in (3, 4)]
    return np.array(mx.concatenate(rows))


@pytest.mark.parametrize("kernels", ["native", "mlx"])
@pytest.mark.parametrize(("family", "bits"), [("qwen3_moe_heads_of_32", 8), ("qwen3_moe_heads_of_64", 4)])
def test_a_cache_is_smaller_and_the_logits_nearly_the_same(
    family: str, bits: int, kernels: str, tmp_path: Path
) -> None:
    folder = make_tiny(tmp_path / family, family, "bfloat16")
    wide, model = load(folder, kernels), load(folder, kernels, bits)
    assert model._together is Together and (not model.one_by_one or kernels == "mlx")
    found, wanted = logits_of(model, [37]), logits_of(wide, [37])
    error = (
        np.median(np.abs(found - wanted)) / np.abs(wanted).max()
    )  # a router may change its mind on a close call
    assert 0 < error < (0.01 if bits == 8 else 0.1)
    if kernels == "native":
        assert np.array_equal(found, logits_of(model, [20, 1, 13, 3]))
    sizes = {}
    for each in (model, wide):
        cache = each.new_cache()
        assert module.cache_bytes(cache) == 0
        each.prefill(PROMPT, cache, SOLO)
        sizes[each] = module.cache_bytes(cache)
    size = 64 if family.endswith("64") else 32
    assert sizes[model] / sizes[wide] == (bits + 32 / size) / 16
    config = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64}
    assert cache_bytes(config, 256, bits) / cache_bytes(config, 256) == (bits + 0.5) / 16


@pytest.mark.parametrize("kernels", ["native", "mlx"])
def test_sequences_decode_together_as_alone(kernels: str, tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / "tiny", "qwen3_moe_heads_of_32"), kernels, 8)
    prompts = (PROMPT[:5], PROMPT[:1], PROMPT[5:30])
    caches = [model.new_cache() for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        model.prefill(prompt, cache, SOLO)
    together = [model.decode([step, 2 * step, 3 * step], caches, SOLO).tolist() for step in range(1, 6)]
    for i, prompt in enumerate(prompts):
        cache = model.new_cache()
        model.prefill(prompt, cache, SOLO)
        alone = [model.decode([(i + 1) * step], [cache], SOLO)[0].tolist() for step in range(1, 6)]
        assert [rows[i] for rows in together] == alone


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt_oss", "--kv-bits 8: a gpt_oss cannot (it keeps RotatingKVCache and not"),
        ("qwen3_next", "--kv-bits 8: a qwen3_next cannot (it keeps ArraysCache and not"),
        ("deepseek_v3", "--kv-bits 8: a deepseek_v3 cannot (its attention does not take them so: "),
        ("qwen3_moe", "--kv-bits 8: a qwen3_moe cannot (its attention does not take them so: ValueError: "),
    ],
)
def test_a_family_that_cannot_is_refused_by_name(family: str, words: str, tmp_path: Path) -> None:
    """The last one for its heads of 16, which are less than a group."""
    with pytest.raises(ConfigError) as caught:
        load(make_tiny(tmp_path / family, family), "native", 8)
    assert words in str(caught.value) and str(caught.value).endswith("). Leave --kv-bits out.")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_attend_to_what_the_codes_stand_for(bits: int, dtype: mx.Dtype) -> None:
    seen: list[mx.array] = []

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        seen.extend((keys, values))
        return queries

    owner, name, attend = widening(attention)
    assert getattr(owner, name) is base.quantized_scaled_dot_product_attention
    pair = []
    for seed in (1, 2):
        rows = mx.random.normal((1, 2, 7, 64), key=mx.random.key(seed)).astype(dtype)
        pair.append([each[..., :5, :] for each in mx.quantize(rows, group_size=32, bits=bits)])
    attend(rows, *pair, scale=1.0, mask=None, group_size=32, bits=bits)
    for found, (codes, scales, biases) in zip(seen, pair, strict=True):
        wanted = mx.dequantize(codes, scales, biases, group_size=32, bits=bits)
        assert found.dtype == dtype and mx.array_equal(found, wanted)


def test_native_kernels_do_so(tmp_path: Path) -> None:
    """Their logits are those of mlx-lm's products but for the last bits; only their speed tells."""
    model = load(make_tiny(tmp_path / "tiny", "qwen3_moe_heads_of_32"), "native", 8)
    assert (base, FUNCTION) in [(owner, name) for owner, name, _ in model._functions]
