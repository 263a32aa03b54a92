"""Sizes that a target's kernels take, held to a model before anything is traced for it."""

from dataclasses import dataclass

from moevlm.export.config import GatedDeltaConfig, ModelConfig
from moevlm.runtime.core.errors import FieldError


@dataclass(frozen=True)
class Sizes:
    """The sizes that the kernels of a target take; all by default.

    key_dim, value_dim: of a head. head_dim_multiple: of both. delta_dim, delta_dim_multiple: of a head of linear
    attention. convolution: tokens that it sees. expert_multiple: of the inner sizes of an expert's two matrices.
    """

    heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    head_dim_multiple: int = 1
    delta_dim: int | None = None
    delta_dim_multiple: int = 1
    convolution: int | None = None
    experts: int | None = None
    expert_multiple: int = 1

    def require(self, config: ModelConfig) -> None:
        """Raise FieldError for the first size of the model that is too large or no multiple, by its canonical name."""
        for attention in dict.fromkeys(layer.mixer.metadata() for layer in config.decoder.layers):
            _require("heads", attention.heads, self.heads)
            head_dim = "head_dim" if attention.window else "head_dim without a window"
            for dim, most in ((attention.key_dim, self.key_dim), (attention.value_dim, self.value_dim)):
                _require(head_dim, dim, most, self.head_dim_multiple)
        for mixer in dict.fromkeys(layer.mixer for layer in config.decoder.layers):
            if isinstance(mixer, GatedDeltaConfig):
                _require("value_heads", mixer.value_heads, self.heads)
                for field, dim in (("delta key_dim", mixer.key_dim), ("delta value_dim", mixer.value_dim)):
                    _require(field, dim, self.delta_dim, self.delta_dim_multiple)
                _require("kernel", mixer.kernel, self.convolution)
        for moe in dict.fromkeys(config.moe.values()):
            _require("hidden", config.decoder.hidden, multiple=self.expert_multiple)
            for width in (moe.width, *((moe.image_width,) if moe.image_width else ())):
                _require("width of experts", width, multiple=self.expert_multiple)
            _require("experts", moe.experts, self.experts)


ANY_SIZE = Sizes()


def _require(field: str, value: int, most: int | None = None, multiple: int = 1) -> None:
    allowed = [f"a multiple of {multiple}"] * (multiple > 1) + [f"up to {most}"] * (most is not None)
    if value % multiple or (most is not None and value > most):
        raise FieldError(field, value, ", ".join(allowed))
