"""A loaded model as the engine sees it: tokens and a cache in, logits out, under the split of the step."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import make_prompt_cache

from expertd.errors import ConfigError
from expertd.model.adapter import StepState, Taps, Told, divide, fast_attention, load, tap
from expertd.model.caches import rotates
from expertd.model.exchange import Link
from expertd.model.kernels import Kernels
from expertd.model.kv_bits import FUNCTION, narrowed, require_narrow
from expertd.model.load import ExpertLoad
from expertd.model.replay import Recorder, Tapes
from expertd.model.swap import native_functions, replaced
from expertd.model.tiles import one_thread_a_product
from expertd.model.together import Padded, Together, ragged_attention
from expertd.split.cut import StepSplit

Cache = list[Any]

# Kernels may differ with the number of rows (MLX's on a GPU do): a wrong cache is off by far more than that.
TOGETHER_TOLERANCE = 0.02
NUM_TRIED = 40
# With keys and values as arrays, and as codes.
ATTENTION = ((mx.fast, "scaled_dot_product_attention"), (base, FUNCTION))

_log = logging.getLogger(__name__)


class Model:
    """One rank's copy of the whole model; it is alone until `attach` gives it a link to others."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        wide: bool = False,
        kernels: Kernels | None = None,
        told: Told | None = None,
        kv_bits: int = 0,
    ) -> None:
        """`wide` is for evaluation: float32 weights, and experts in tiles. `kernels` None: MLX's. See adapter.load.

        Raises ConfigError when the family cannot keep keys and values at `kv_bits` (0: as they are computed).
        """
        start = time.monotonic()
        self._state = StepState()
        self._model = load(folder, config, wide, kernels, told)
        self._functions = native_functions(kernels) if kernels and not wide else []
        self._append_attention = kernels.append_attention if kernels and not wide else None
        self.splits = [*divide(self._model, self._state), "sequences"]
        self._taps: Taps | None = None
        self._together: type[Together] | None = None
        self._tapes = Tapes(self._record)
        self._replayed: set[bool] = set()  # whether steps of one sequence (False) and of several (True) are
        self._no_logits = mx.zeros((0, 0))  # [0, vocab], of the model's type, from the first decode step on
        self.one_by_one = False  # whether a token's bits depend on how many were computed with it
        self.read_s = math.inf  # what reading a token took when this was tried, if it was
        self.expert_load = ExpertLoad()
        self._kv_bits = kv_bits
        if kv_bits:
            layers, kind = make_prompt_cache(self._model), str(config.get("model_type"))
            require_narrow(kind, kv_bits, layers, lambda: self._try_reading(NUM_TRIED))
        if not wide:
            self._together = self._choose_together()
            self.one_by_one = self._try_one_by_one()
            self._choose_replayed()
        self.load_s = time.monotonic() - start

    def require(self, split: str) -> None:
        """Raise ConfigError when the family cannot do a split."""
        if split not in ("auto", *self.splits):
            raise ConfigError(
                f"--split {split}: this model's family supports {', '.join(self.splits)}. "
                "Choose one of these or `auto`."
            )

    def attach(self, link: Link | None) -> None:
        """Meet the other ranks over `link` from now on, or nobody (None).

        Caches that an earlier link filled must be evaluated first (SequenceCache.evaluate): their graph may call it.
        """
        self._state.link = link
        self._tapes.clear()

    def new_cache(self) -> Cache:
        """An empty cache for one sequence, of the kinds that the family's layers need."""
        return narrowed(make_prompt_cache(self._model), self._kv_bits)

    def forward(self, tokens: list[int], cache: Cache, split: StepSplit) -> mx.array:
        """Build the graph of one step: logits [num_tokens, vocab] for tokens appended to the cache's."""
        self._state.begin(split)
        with replaced(self._functions):
            logits: mx.array = self._model(mx.array([tokens]), cache=cache)[0]
        return logits

    def prefill(self, tokens: list[int], cache: Cache, split: StepSplit) -> None:
        """Append tokens to the cache; the logits are never computed."""
        self.forward(tokens, cache, split)
        mx.eval([layer.state for layer in cache])

    def score(self, tokens: list[int], cache: Cache, split: StepSplit) -> mx.array:
        """As `prefill`, and gives the evaluated float32 logits [num_tokens, vocab] of the positions after the tokens.

        Every rank computes them: the last layer's exchange, which `prefill` leaves out, is part of them.
        """
        logits = self.forward(tokens, cache, split).astype(mx.float32)
        mx.eval(logits, [layer.state for layer in cache])
        return logits

    def decode(
        self, tokens: list[int], caches: list[Cache], split: StepSplit, counts: list[int] | None = None
    ) -> mx.array:
        """Append one token to each of several sequences; gives the evaluated float32 logits [num_sequences, vocab] of
        the positions after them.

        Under `sequences` the tokens and caches are this rank's alone, maybe none, and `counts` are every rank's number
        of them; all ranks get all logits, in the ranks' order.
        """
        if not self.expert_load.due():
            return self._decode(tokens, caches, split, counts)
        self._state.choices = {}
        try:
            logits = self._decode(tokens, caches, split, counts)
            self.expert_load.add(self._state.choices)
        finally:
            self._state.choices = None
        return logits

    def _decode(
        self, tokens: list[int], caches: list[Cache], split: StepSplit, counts: list[int] | None
    ) -> mx.array:
        replayed = self._replay(tokens, caches, split) if (len(tokens) > 1) in self._replayed else None
        if not tokens:
            logits = self._no_logits
        elif replayed is not None:
            logits = replayed
        elif len(tokens) > 1 and self._together:
            logits = self._forward_together(tokens, caches, split, self._together)
        else:
            rows = []
            for token, cache in zip(tokens, caches, strict=True):
                rows.append(self.forward([token], cache, split))
                mx.eval(
                    rows[-1]
                )  # one after the other on every rank: the next one's exchanges may not overtake
            logits = mx.concatenate(rows)
        self._no_logits = mx.zeros((0, logits.shape[1]), logits.dtype)
        if counts:
            self._state.begin(split)
            logits = self._state.exchange(logits, counts)
        logits = logits.astype(mx.float32)
        mx.eval(logits)
        return logits

    def _forward_together(
        self, tokens: list[int], caches: list[Cache], split: StepSplit, kind: type[Together]
    ) -> mx.array:
        self._state.begin(split)
        layers = self._side_by_side(caches, kind)
        with replaced(self._functions), ragged_attention(*ATTENTION):
            logits: mx.array = self._model(mx.array(tokens)[:, None], cache=layers)[:, 0]
        return logits

    def _side_by_side(self, caches: list[Cache], kind: type[Together]) -> list[Together]:
        return [kind(list(of_layer), self._append_attention) for of_layer in zip(*caches, strict=True)]

    def _replay(self, tokens: list[int], caches: list[Cache], split: StepSplit) -> mx.array | None:
        """The graph of logits [num_sequences, vocab], built without Python; None if it cannot be."""
        if not tokens or self._state.choices is not None:
            return None
        return self._tapes.build(tokens, self._side_by_side(caches, Together), split)

    def _record(self, recorder: Recorder, split: StepSplit) -> mx.array:
        self._state.begin(split)
        with replaced(self._functions), ragged_attention(*ATTENTION), recorder.attention(*ATTENTION):
            logits: mx.array = self._model(recorder.tokens[:, None], cache=recorder.layers)[:, 0]
        return logits

    def _choose_together(self) -> type[Together] | None:
        """How this family's sequences decode together; None, and a line in the log, if one after the other.

        Tried, not looked up: two short sequences, of unlike lengths, apart and together.
        """
        wanted, reasons = self._try_decoding(None), []
        largest: Any = mx.abs(wanted).max().item()
        for kind in (Together, Padded):
            try:
                error: Any = mx.abs(self._try_decoding(kind) - wanted).max().item()
            except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as e:
                reasons.append(f"{type(e).__name__}: {str(e).splitlines()[0]}")
                continue
            if error <= TOGETHER_TOLERANCE * largest:
                return kind
            reasons.append(f"logits differ by {error:.3g}")
        _log.warning("this model decodes one sequence after the other (%s)", "; ".join(reasons))
        return None

    def _try_decoding(self, kind: type[Together] | None) -> mx.array:
        solo, caches = StepSplit("solo", (1.0,)), []
        for prompt in ([1, 2, 3], [2]):
            caches.append(self.new_cache())
            self.prefill(prompt, caches[-1], solo)
        self._together = kind
        return self.decode([3, 1], caches, solo)

    def _choose_replayed(self) -> None:
        """Find out whether steps can be built from tapes: those of several sequences, and those of one.

        Tried, not looked up: they must give the bits that they give without; a line in the log, if not.
        """
        if self._together is not Together:
            return
        wanted = self._try_steps()
        self._replayed = {False, True}
        one, two, again = (
            mx.array_equal(*pair).item() for pair in zip(wanted, self._try_steps(), strict=True)
        )
        self._replayed = ({False} if one and again else set()) | ({True} if two else set())
        if len(self._replayed) < 2:
            _log.info("steps built from tapes give other logits: of one %s, of two %s", one and again, two)
        self._tapes.clear()

    def _try_steps(self) -> list[mx.array]:
        """Logits of one sequence, of two, and of one again."""
        solo, caches = StepSplit("solo", (1.0,)), [self.new_cache(), self.new_cache()]
        for prompt, cache in zip(([1, 2, 3], [2]), caches, strict=True):
            self.prefill(prompt, cache, solo)
        return [self._decode([3, 1][:num], caches[:num], solo, None) for num in (1, 2, 1)]

    def _try_one_by_one(self) -> bool:
        """Whether tokens decoded one by one leave other bits than the same tokens in a chunk.

        Tried, not looked up: NUM_TRIED tokens read at once, and their last ones alone. With top-k 2 or more these
        many are beyond SORT_FROM, from where on MLX takes other kernels.
        """
        if any(map(rotates, self.new_cache())):
            return True
        return not mx.array_equal(self._try_reading(NUM_TRIED), self._try_reading(NUM_TRIED - 3)).item()

    def _try_reading(self, num_prefilled: int) -> mx.array:
        """Logits after NUM_TRIED tokens and one more, of which the first `num_prefilled` are read in one chunk."""
        cache, solo = self.new_cache(), StepSplit("solo", (1.0,))
        start = time.monotonic()
        self.prefill(list(range(num_prefilled)), cache, solo)
        self.read_s = (time.monotonic() - start) / num_prefilled
        return [self.decode([token], [cache], solo) for token in range(num_prefilled, NUM_TRIED + 1)][-1]

    def observe(self, tokens: mx.array, split: StepSplit) -> tuple[mx.array, Taps]:
        """One pass over whole windows [num_windows, num_tokens] without a cache, for evaluation.

        Gives float32 logits [num_windows, num_tokens, vocab] and what passed through the layers, the same on every
        rank; all evaluated.
        """
        if self._taps is None:
            self._taps = tap(self._model)
        self._state.begin(split)
        with fast_attention(), replaced(self._functions), one_thread_a_product():
            logits = self._model(tokens).astype(mx.float32)
        mx.eval(logits, self._taps.hidden, self._taps.experts)
        if split.name == "tokens":
            self._gather_choices(self._taps, tokens.shape)
        return logits, self._taps

    def _gather_choices(self, taps: Taps, shape: Sequence[int]) -> None:
        """Under `tokens` a rank's routers see its own tokens alone: swap what they chose, layer by layer."""
        counts, own = self._state.cut(math.prod(shape))
        for layer, ids in sorted(taps.experts.items()):
            mine = ids.reshape(-1, ids.shape[-1])[
                : own.stop - own.start
            ]  # a rank without tokens computed one
            every = self._state.exchange(mine, counts)
            mx.eval(every)  # the next exchange may not overtake it
            taps.experts[layer] = every.reshape(*shape, -1)


def cache_bytes(cache: Cache) -> int:
    """What a sequence's cache takes, as it is allocated."""
    return sum(layer.nbytes for layer in cache)
