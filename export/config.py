"""The canonical description of a MoE VLM: what every family's config.json is translated into."""

from dataclasses import dataclass

from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.errors import shown
from moevlm.runtime.core.manifest import LayerMetadata, ModelMetadata, RopeMetadata, VisionMetadata


@dataclass(frozen=True)
class MLPConfig:
    """A dense feed-forward layer: gated (down(act(gate) * up), no biases) or plain (fc2(act(fc1)), biases)."""

    width: int
    activation: str
    gated: bool = True


@dataclass(frozen=True)
class MoEConfig:
    """A sparse feed-forward layer. correction_bias: [experts] added for the choice. shared_width: 0 for none."""

    experts: int
    width: int
    router: RouterSpec
    expert: ExpertsSpec
    correction_bias: bool = False
    shared_width: int = 0

    def __post_init__(self) -> None:
        self.router.check(self.experts)


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with rotary embedding on the first rotary_dim dimensions of each head."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} (allowed: a divisor of the {self.heads} heads)")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim = {self.rotary_dim} (allowed: even, up to head_dim = {self.head_dim})")


@dataclass(frozen=True)
class DecoderConfig:
    """The language model. feed_forward: one entry per layer. deepstack: visual levels added after the first layers."""

    vocabulary: int
    hidden: int
    context: int
    epsilon: float
    tied_head: bool
    attention: AttentionConfig
    rope: RopeMetadata
    feed_forward: tuple[MLPConfig | MoEConfig, ...]
    deepstack: int = 0

    def __post_init__(self) -> None:
        if self.rope.dim != self.attention.rotary_dim:
            raise ValueError(f"rotary_dim = {self.attention.rotary_dim} (allowed: rope.dim = {self.rope.dim})")


@dataclass(frozen=True)
class MergerConfig:
    """Four patches to one visual token: mlp (Qwen3-VL) or gated (GLM-4V, after a strided convolution)."""

    kind: str
    out: int
    width: int


@dataclass(frozen=True)
class VisionConfig:
    """The packed vision transformer.

    norm: layer or rms. outer_norms: RMS norms right after the patch embedding and after the last block (GLM-4V).
    deepstack_layers: blocks whose output also goes through a merger of its own.
    position_resampling: bilinear or bicubic, see `runtime.core.manifest.VisionMetadata`.
    """

    hidden: int
    depth: int
    heads: int
    mlp: MLPConfig
    norm: str
    epsilon: float
    qkv_bias: bool
    out_bias: bool
    outer_norms: bool
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    channels: int
    position_grid: int
    position_resampling: str
    rope_theta: float
    merger: MergerConfig
    deepstack_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.head_dim % 4:  # two axes, and pairs on each
            raise ValueError(f"vision heads = {self.heads} (allowed: width {self.hidden} / heads is a multiple of 4)")
        allowed = range(self.depth)
        if len(set(self.deepstack_layers)) < len(self.deepstack_layers) or not set(self.deepstack_layers) <= {*allowed}:
            raise ValueError(
                f"deepstack layers = {shown(list(self.deepstack_layers))} (allowed: some of 0 to {self.depth - 1})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def patch_dim(self) -> int:
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: both towers, and the token ids that join them."""

    model_type: str
    decoder: DecoderConfig
    vision: VisionConfig
    image_token_id: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.vision.merger.out != self.decoder.hidden:
            raise ValueError(f"width of visual tokens = {self.vision.merger.out} (allowed: {self.decoder.hidden})")
        if self.decoder.deepstack > len(self.decoder.feed_forward):
            levels, layers = shown(list(self.vision.deepstack_layers)), len(self.decoder.feed_forward)
            raise ValueError(f"deepstack layers = {levels} (allowed: at most {layers}, one per decoder layer)")
        if self.image_token_id >= self.decoder.vocabulary:
            raise ValueError(f"image_token_id = {self.image_token_id} (allowed: up to {self.decoder.vocabulary - 1})")

    @property
    def moe(self) -> dict[int, MoEConfig]:
        """The sparse layers, by their place among all."""
        return {i: ffn for i, ffn in enumerate(self.decoder.feed_forward) if isinstance(ffn, MoEConfig)}

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.moe)

    def metadata(self) -> ModelMetadata:
        """What the runtime must know, for the manifest."""
        decoder, vision, attention = self.decoder, self.vision, self.decoder.attention
        return ModelMetadata(
            model_type=self.model_type,
            hidden=decoder.hidden,
            vocabulary=decoder.vocabulary,
            context=decoder.context,
            layers=tuple(
                LayerMetadata(
                    heads=attention.heads,
                    kv_heads=attention.kv_heads,
                    key_dim=attention.head_dim,
                    value_dim=attention.head_dim,
                    experts=ffn.experts if isinstance(ffn, MoEConfig) else 0,
                    top_k=ffn.router.top_k if isinstance(ffn, MoEConfig) else 0,
                )
                for ffn in decoder.feed_forward
            ),
            eos_token_ids=self.eos_token_ids,
            image_token_id=self.image_token_id,
            ropes=(decoder.rope,),
            vision=VisionMetadata(
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.merge_size,
                channels=vision.channels,
                head_dim=vision.head_dim,
                rope_theta=vision.rope_theta,
                position_grid=vision.position_grid,
                position_resampling=vision.position_resampling,
                deepstack=len(vision.deepstack_layers),
            ),
        )
