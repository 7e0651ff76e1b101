"""Our loading of each family against transformers' logits, which tests/golden/make_golden.py wrote."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from expertd.checkpoint.config import normalise_config, read_config
from expertd.model.classes import model_classes
from expertd.model.kernels import open_kernels
from expertd.model.swap import native_functions, replaced, use_native_kernels
from tests.tiny import make_tiny

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(("generation", "kernels"), [(4, "native"), (5, "native"), (4, "mlx"), (5, "mlx")])
def test_logits_equal_transformers(golden: Path, generation: int, kernels: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, golden.stem, generation=generation)
    config = normalise_config(read_config(folder))
    model, _ = load_model(folder, model_config=config, get_model_classes=model_classes)
    expected = mx.load(str(golden))
    functions = []
    if native := open_kernels(kernels, 16, num_threads=1):
        use_native_kernels(model, native)
        functions = native_functions(native)

    with replaced(functions):
        at_once = model(expected["tokens"][None])[0]
        cache = make_prompt_cache(model)
        one_by_one = mx.stack([model(token[None, None], cache=cache)[0, 0] for token in expected["tokens"]])

    assert mx.abs(at_once - expected["logits"]).max().item() < 1e-4
    assert mx.abs(one_by_one - expected["logits"]).max().item() < 1e-4


def test_every_golden_family_is_there() -> None:
    assert {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"} <= {path.stem for path in GOLDEN}
