"""What the sequences of an engine keep between steps, for the manifest."""

import msgspec

from moevlm.runtime.core.states import PagedKV, StateSpec


def kept(states: tuple[StateSpec, ...], kv_cache: str) -> tuple[StateSpec, ...]:
    """The model's states in an engine. kv_cache: dtype of keys and values; recurrent states stay float32."""
    return tuple(
        msgspec.structs.replace(state, dtype=kv_cache) if isinstance(state, PagedKV) else state for state in states
    )
