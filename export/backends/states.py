"""What the sequences of an engine keep between steps, for the manifest."""

from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.states import PagedKV, StateSpec


def kept(model: ModelMetadata, dtype: str) -> tuple[StateSpec, ...]:
    """Keys and values of all layers. dtype: of their values."""
    return tuple(
        PagedKV(
            layer=i,
            kv_heads=layer.kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            window=layer.window,
            dtype=dtype,
        )
        for i, layer in enumerate(model.layers)
        if layer.heads
    )
