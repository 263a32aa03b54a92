"""A whole model: its layers, its decoder, its vision tower, and the ids that join them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from moevlm.export.config.feed_forward import MLPConfig, MoEConfig
from moevlm.export.config.mixers import MixerConfig
from moevlm.export.config.vision import VisionConfig
from moevlm.runtime.core.errors import FieldError
from moevlm.runtime.core.manifest import (
    NO_MARKS,
    ImageMarks,
    LayerMetadata,
    ModelMetadata,
    QueryScaleMetadata,
    RopeMetadata,
    VideoMetadata,
)
from moevlm.runtime.core.states import StateSpec
from moevlm.runtime.core.towers import VisionMetadata

NORMS = ("pre", "sandwich", "parallel")


@dataclass(frozen=True)
class LayerConfig:
    """One layer of the decoder. norms: where its RMS norms stand around the residual stream x.

    pre:      x = x + mixer(norm(x)), then x = x + feed_forward(norm(x)).
    sandwich: x = x + norm(mixer(norm(x))), then x = x + norm(feed_forward(norm(x))) (Gemma 2 and 3).
    parallel: x = x + mixer(y) + feed_forward(y) with y = norm(x) (Command R).
    A feed-forward with a dense layer beside its experts takes x itself, and norms it.
    scaled: behind all that, x is multiplied by a scalar of the layer.
    """

    mixer: MixerConfig
    feed_forward: MLPConfig | MoEConfig
    norms: str = "pre"
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.norms not in NORMS:
            raise FieldError("norms", self.norms, ", ".join(NORMS))


@dataclass(frozen=True)
class DecoderConfig:
    """The language model. ropes: by rope group. deepstack: visual levels added after the first layers.

    visual: it takes rows of visual features. image_ids: tokens that go to experts for images, where there are such.
    embedding_scale: factor on the rows of text tokens. logit_softcap: logits become softcap * tanh(logits / softcap);
    0 for none. query_scale: of the layers whose mixers scale queries by their place; None if there are none.
    """

    vocabulary: int
    hidden: int
    context: int
    epsilon: float
    tied_head: bool
    ropes: tuple[RopeMetadata, ...]
    layers: tuple[LayerConfig, ...]
    deepstack: int = 0
    visual: bool = True
    embedding_scale: float = 1.0
    logit_softcap: float = 0.0
    query_scale: QueryScaleMetadata | None = None
    image_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(layer.mixer.scales_queries for layer in self.layers) != (self.query_scale is not None):
            raise FieldError("query_scale", self.query_scale, "given if, and only if, a layer scales its queries")
        for group, dim in (found for layer in self.layers for found in layer.mixer.rotations().items()):
            if not 0 <= group < len(self.ropes):
                raise FieldError("rope", group, f"one of the {len(self.ropes)} rope groups")
            if dim != self.ropes[group].dim:
                raise FieldError("rotary_dim", dim, f"rope.dim = {self.ropes[group].dim}")

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What a sequence keeps between steps, layer by layer, in float32."""
        return tuple(state for i, layer in enumerate(self.layers) for state in layer.mixer.states(i))


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: both towers, and the token ids that join them. A model of text alone has vision None.

    image_marks, video: see `runtime.core.manifest.ModelMetadata`. mark_texts: tokens of image_marks whose ids
    config.json does not say, by field; the checkpoint's tokenizer does.
    """

    model_type: str
    decoder: DecoderConfig
    vision: VisionConfig | None
    image_token_id: int | None
    eos_token_ids: tuple[int, ...]
    image_marks: ImageMarks = NO_MARKS
    mark_texts: Mapping[str, str] = field(default_factory=dict)
    video: VideoMetadata | None = None

    def __post_init__(self) -> None:
        if self.vision is not None and self.vision.out != self.decoder.hidden:
            raise FieldError("width of visual tokens", self.vision.out, str(self.decoder.hidden))
        if self.vision is not None and self.decoder.deepstack > len(self.decoder.layers):
            levels, layers = list(self.vision.deepstack_layers), len(self.decoder.layers)
            raise FieldError("deepstack layers", levels, f"at most {layers}, one per decoder layer")
        for name, token_ids in self._token_ids().items():
            for token_id in token_ids:
                if token_id >= self.decoder.vocabulary:
                    raise FieldError(name, token_id, f"up to {self.decoder.vocabulary - 1}")

    def _token_ids(self) -> dict[str, tuple[int, ...]]:
        """The ids that stand for images and videos, and around them, by field."""
        image = () if self.image_token_id is None else (self.image_token_id,)
        found: dict[str, tuple[int, ...]] = {"image_token_id": image}
        found |= {f"image_{mark}": ids for mark, ids in msgspec.structs.asdict(self.image_marks).items()}
        if self.video is not None:
            found |= {"video_token_id": (self.video.placeholder,)}
            found |= {"video_begin": self.video.begin, "video_end": self.video.end}
        return found

    @property
    def tower(self) -> VisionMetadata | None:
        """Metadata of the vision tower, if there is one."""
        return None if self.vision is None else self.vision.metadata()

    @property
    def moe(self) -> dict[int, MoEConfig]:
        """The sparse layers, by their place among all."""
        found = ((i, layer.feed_forward) for i, layer in enumerate(self.decoder.layers))
        return {i: feed_forward for i, feed_forward in found if isinstance(feed_forward, MoEConfig)}

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.moe)

    @property
    def expert_matrices(self) -> dict[tuple[str, str], MoEConfig]:
        """The experts of each sparse layer, those for images apart, by the names of gate_up and down in the decoder."""
        found: dict[tuple[str, str], MoEConfig] = {}
        for i, moe in self.moe.items():
            banks = {"": moe}
            if moe.image_width:
                banks["images."] = replace(moe, width=moe.image_width, shared_width=0)
            found |= {
                (f"layers.{i}.feed_forward.{bank}gate_up", f"layers.{i}.feed_forward.{bank}down"): config
                for bank, config in banks.items()
            }
        return found

    def metadata(self) -> ModelMetadata:
        """What the runtime must know, for the manifest."""
        decoder = self.decoder
        return ModelMetadata(
            model_type=self.model_type,
            hidden=decoder.hidden,
            vocabulary=decoder.vocabulary,
            context=decoder.context,
            layers=tuple(map(_layer_metadata, decoder.layers)),
            eos_token_ids=self.eos_token_ids,
            image_token_id=self.image_token_id,
            ropes=decoder.ropes,
            vision=self.tower,
            image_marks=self.image_marks,
            video=self.video,
            query_scale=decoder.query_scale,
        )


def _layer_metadata(layer: LayerConfig) -> LayerMetadata:
    metadata, feed_forward = layer.mixer.metadata(), layer.feed_forward
    if not isinstance(feed_forward, MoEConfig):
        return metadata
    return msgspec.structs.replace(
        metadata, experts=feed_forward.experts, top_k=feed_forward.router.top_k, routing=feed_forward.words
    )
