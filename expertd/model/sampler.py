"""From logits to a token id, on rank 0 only."""

import mlx.core as mx


def sample(logits: mx.array, temperature: float, top_p: float, seed: int, position: int) -> int:
    """Choose a token id from float32 logits [vocab].

    Temperature 0 takes the largest. Otherwise the choice depends on (seed, position) alone, so that a seeded
    request gives the same tokens whatever else the engine does. `top_p` keeps the smallest set of tokens
    whose probabilities reach it (Holtzman et al., 2019).
    """
    if temperature == 0:
        return _id(mx.argmax(logits))
    scaled = logits / temperature
    if top_p < 1:
        scaled = _keep_nucleus(scaled, top_p)
    key = mx.random.key((seed * 1_000_003 + position) % (1 << 63))
    return _id(mx.random.categorical(scaled, key=key))


def _id(chosen: mx.array) -> int:
    token_id = chosen.item()
    assert isinstance(token_id, int)
    return token_id


def _keep_nucleus(logits: mx.array, top_p: float) -> mx.array:
    order = mx.argsort(-logits)
    probs = mx.softmax(logits)[order]
    before = mx.cumsum(probs) - probs  # the mass of the tokens that are likelier
    kept = mx.where(before < top_p, logits[order], -mx.inf)
    return kept[mx.argsort(order)]
