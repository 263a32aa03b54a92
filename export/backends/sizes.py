"""Sizes that a target's kernels take, held to a model before anything is traced for it."""

from dataclasses import dataclass

from moevlm.export.config import GatedDeltaConfig, ModelConfig
from moevlm.runtime.core.errors import BuildError


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

    def require(self, config: ModelConfig, target: str) -> None:
        """Raise BuildError for the first size of the model that is too large or no multiple, by its field."""
        for attention in dict.fromkeys(layer.mixer.metadata() for layer in config.decoder.layers):
            _require(target, "text_config.num_attention_heads", attention.heads, self.heads)
            for dim, most in ((attention.key_dim, self.key_dim), (attention.value_dim, self.value_dim)):
                _require(target, "text_config.head_dim", dim, most, self.head_dim_multiple)
        for mixer in dict.fromkeys(layer.mixer for layer in config.decoder.layers):
            if isinstance(mixer, GatedDeltaConfig):
                _require(target, "text_config.linear_num_value_heads", mixer.value_heads, self.heads)
                for side, dim in (("key", mixer.key_dim), ("value", mixer.value_dim)):
                    field = f"text_config.linear_{side}_head_dim"
                    _require(target, field, dim, self.delta_dim, self.delta_dim_multiple)
                _require(target, "text_config.linear_conv_kernel_dim", mixer.kernel, self.convolution)
        for moe in dict.fromkeys(config.moe.values()):
            _require(target, "text_config.hidden_size", config.decoder.hidden, multiple=self.expert_multiple)
            _require(target, "text_config.moe_intermediate_size", moe.width, multiple=self.expert_multiple)
            _require(target, "the number of experts", moe.experts, self.experts)


ANY_SIZE = Sizes()


def _require(target: str, field: str, value: int, most: int | None = None, multiple: int = 1) -> None:
    allowed = [f"a multiple of {multiple}"] * (multiple > 1) + [f"up to {most}"] * (most is not None)
    if value % multiple or (most is not None and value > most):
        raise BuildError(f"{target} cannot run this model: {field} = {value} (allowed: {', '.join(allowed)})")
