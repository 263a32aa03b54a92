"""What the sequences of an engine keep between steps, for the manifest."""

import msgspec

from moevlm.runtime.core import defaults
from moevlm.runtime.core.states import PagedKV, StateSpec


def kept(states: tuple[StateSpec, ...], kv_cache: str) -> tuple[StateSpec, ...]:
    """The model's states in an engine. kv_cache: see `cache_dtype`; recurrent states stay float32."""
    return tuple(
        msgspec.structs.replace(state, dtype=cache_dtype(kv_cache, state.value_in_key))
        if isinstance(state, PagedKV)
        else state
        for state in states
    )


def cache_dtype(kv_cache: str, latent: bool) -> str:
    """The dtype of a layer's cache. kv_cache: as asked for, or "auto". latent: of latents (MLA), not keys and values.

    Auto keeps latents in float32. In int8 they share a scale with the rotated part of the key, which may be far larger.
    """
    if kv_cache != defaults.KV_CACHE:
        return kv_cache
    return "float32" if latent else "int8"
