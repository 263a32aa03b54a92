"""How the tokens of a sequence see each other in a layer: one config per kind of mixer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from moevlm.plugins.ops.spec import AttentionSpec, GatedDeltaSpec
from moevlm.runtime.core.errors import FieldError
from moevlm.runtime.core.manifest import LayerMetadata
from moevlm.runtime.core.states import PagedKV, Recurrent, StateSpec


class MixerConfig(ABC):
    """How the tokens of a sequence see each other in one layer; its module is registered in `modules.mixers`."""

    @abstractmethod
    def states(self, layer: int) -> tuple[StateSpec, ...]:
        """What a sequence keeps of layer `layer` between steps, in the order of the module's states."""

    @property
    def words(self) -> str:
        """Its name for people, as `families.about` has it; none here."""
        return ""

    def metadata(self) -> LayerMetadata:
        """The manifest's shapes of attention; none here."""
        return LayerMetadata(mixer=self.words)

    def rotations(self) -> Mapping[int, int]:
        """How many dimensions of a head it rotates, by rope group; none here."""
        return {}

    @property
    def scales_queries(self) -> bool:
        """Whether queries are multiplied by a factor of their places, `DecoderConfig.query_scale`."""
        return False


@dataclass(frozen=True)
class GQAConfig(MixerConfig):
    """Grouped-query attention with rotary embedding on the first rotary_dim dimensions of each head, or none (0).

    rope: the rope group; of no use without rotation. value_dim: of a value's head; 0 for head_dim.
    qk_norm: an RMS norm of each query and key. value_norm: one of each value, without a gain.
    value_is_key: a value is its key before norm and rotation, and has no projection (Gemma 4).
    bidirectional_images: a query of an image also sees the tokens of its image that follow it.
    query_scale: queries are multiplied by a factor of their places, see `DecoderConfig`; without norms of them.
    output_gate: what a head returns is multiplied by the sigmoid of another projection, as wide as the queries' one.
    window, chunk, softcap, sinks, scale: as in `plugins.ops.spec.AttentionSpec`; sinks is a parameter of each head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    rope: int = 0
    value_dim: int = 0
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    scale: float = 0.0
    value_norm: bool = False
    value_is_key: bool = False
    bidirectional_images: bool = False
    output_gate: bool = False
    query_scale: bool = False
    chunk: int = 0

    def __post_init__(self) -> None:
        self.spec(0.0)
        if self.value_is_key and self.value_dim not in (0, self.head_dim):
            raise FieldError("value_dim", self.value_dim, f"0 or head_dim = {self.head_dim}, as a value is its key")
        if self.query_scale and self.qk_norm:  # the norm, inside the op, would undo it
            raise FieldError("query_scale", True, "false with norms of queries and keys")
        if self.rotary_dim > self.head_dim:
            raise FieldError("rotary_dim", self.rotary_dim, f"even, 0 to head_dim = {self.head_dim}")

    def spec(self, epsilon: float) -> AttentionSpec:
        """The op's attributes. epsilon: of the norms."""
        return AttentionSpec(
            self.heads,
            self.kv_heads,
            self.rotary_dim,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            epsilon=epsilon,
            value_is_key=self.value_is_key,
            value_norm=self.value_norm,
            chunk=self.chunk,
        )

    def states(self, layer: int) -> tuple[StateSpec, ...]:
        return (
            PagedKV(
                layer=layer,
                kv_heads=self.kv_heads,
                key_dim=self.head_dim,
                value_dim=self.value_dim or self.head_dim,
                window=self.window,
                chunk=self.chunk,
            ),
        )

    def metadata(self) -> LayerMetadata:
        return LayerMetadata(
            heads=self.heads,
            kv_heads=self.kv_heads,
            key_dim=self.head_dim,
            value_dim=self.value_dim or self.head_dim,
            window=self.window,
            chunk=self.chunk,
            bidirectional_images=self.bidirectional_images,
            mixer=self.words,
        )

    @property
    def words(self) -> str:
        with_ = ["q/k norms"] * self.qk_norm + ["sinks"] * self.sinks
        facts = ["gated GQA" if self.output_gate else "GQA"] + [f"with {' and '.join(with_)}"] * bool(with_)
        return " ".join(facts) + ", values from keys" * self.value_is_key

    def rotations(self) -> Mapping[int, int]:
        return {self.rope: self.rotary_dim} if self.rotary_dim else {}

    @property
    def scales_queries(self) -> bool:
        return self.query_scale


@dataclass(frozen=True)
class MLAConfig(MixerConfig):
    """Multi-head latent attention (DeepSeek-V2): a token keeps one latent and one rotated key for all heads.

    q_rank: of the queries' latent; 0 for queries made at once. kv_rank: of the latent of keys and values.
    nope_dim, rope_dim: of a head's query and key, without rotation and with it. value_dim: of a value's head.
    bias: of both projections to latents and of the last one. epsilon: of the latents' norms.
    rope: the rope group. scale: of the scores; 0 for (nope_dim + rope_dim)**-0.5.
    query_scale: queries are multiplied by a factor of their places, see `DecoderConfig`.
    """

    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False
    epsilon: float = 1e-6
    rope: int = 0
    scale: float = 0.0
    query_scale: bool = False

    def __post_init__(self) -> None:
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise FieldError("rope_dim", self.rope_dim, "even, 2 or more")

    @property
    def spec(self) -> AttentionSpec:
        """The op's attributes: all heads on one key, whose first kv_rank dimensions are the value."""
        return AttentionSpec(
            self.heads,
            1,
            self.rope_dim,
            rotary_start=self.kv_rank,
            scale=self.scale or (self.nope_dim + self.rope_dim) ** -0.5,
            value_in_key=True,
            value_dim=self.kv_rank,
        )

    @property
    def key_dim(self) -> int:
        """What a token keeps, in values."""
        return self.kv_rank + self.rope_dim

    def states(self, layer: int) -> tuple[StateSpec, ...]:
        return (PagedKV(layer=layer, kv_heads=1, key_dim=self.key_dim, value_dim=self.kv_rank, value_in_key=True),)

    def metadata(self) -> LayerMetadata:
        return LayerMetadata(
            heads=self.heads, kv_heads=1, key_dim=self.key_dim, value_dim=self.kv_rank, mixer=self.words
        )

    @property
    def words(self) -> str:
        return "MLA on a latent cache"

    def rotations(self) -> Mapping[int, int]:
        return {self.rope: self.rope_dim}

    @property
    def scales_queries(self) -> bool:
        return self.query_scale


@dataclass(frozen=True)
class GatedDeltaConfig(MixerConfig):
    """The gated delta rule behind a short convolution, and a gated norm (Yang et al. 2025).

    Sizes as in `plugins.ops.spec.GatedDeltaSpec`.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    def __post_init__(self) -> None:
        _ = self.spec  # refuses sizes that do not fit

    @property
    def words(self) -> str:
        return "gated delta rule"

    @property
    def spec(self) -> GatedDeltaSpec:
        """The op's attributes."""
        return GatedDeltaSpec(self.key_heads, self.value_heads, self.key_dim, self.value_dim, self.kernel)

    def states(self, layer: int) -> tuple[StateSpec, ...]:
        return (
            Recurrent(layer=layer, name="conv", shape=(self.kernel - 1, self.spec.channels)),
            Recurrent(layer=layer, name="delta", shape=(self.value_heads, self.key_dim, self.value_dim)),
        )
