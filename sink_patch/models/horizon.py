"""How far the RoPE positions of a stream run before its clock is set back."""

from __future__ import annotations

from sink_patch.errors import SinkArgumentError
from sink_patch.models.facts import ModelFacts


def horizon(facts: ModelFacts, window_length: int, num_sink_tokens: int) -> int:
    """The RoPE position (tokens) that the newest token must stay below; before it gets there, the clock is set back.

    It is the context that the model was trained on, so that nothing that depends on absolute position ever sets in.
    Where the window fills more than half of that, it is 2 W, if the model has positions beyond its context that turn
    like those before.

    Raises:
        SinkArgumentError: the window does not fit.
    """
    length, limit = facts.context.length, facts.context.limit
    if limit is None:
        return length if 2 * window_length <= length else 2 * window_length
    if not any(layer.adapter.turns for layer in facts.layers):
        largest = limit  # nothing turns, so nothing is rounded when the clock is set back
    else:
        # each time the clock is set back, a key is rounded once more: leave room for at most two times in its life
        largest = max(1, (2 * limit + num_sink_tokens) // 3)
    if window_length > largest:
        raise SinkArgumentError(
            f"window_length={window_length} does not fit {facts.model_class}: it may use {limit} positions, as "
            f"{facts.context.why_limited}. Use window_length={largest} or less."
        )
    return limit
