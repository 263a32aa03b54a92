"""The bundle's manifest: every fact that the runtime needs, typed, and checked once when it is read."""

import hashlib
from typing import Any

import msgspec

from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.metadata import Metadata
from moevlm.runtime.core.towers import VisionMetadata

SCHEMA = 3


class RopeMetadata(Metadata, frozen=True):
    """Rotary embedding of the decoder's layers of one rope group.

    dim: rotated dimensions of a head (R); theta: base; sections: how many of the R/2 frequencies belong to the
    (time, height, width) axes; interleaved: t,h,w,t,h,w,... (Qwen3-VL) instead of one block per axis (GLM-4V);
    alternating: h,w,h,w,..., then time's (ERNIE 4.5 VL).
    Without sections there is one axis, and positions count tokens, those of images like those of text (Gemma 4).
    frequencies: the R/2 inverse frequencies, in radians a position, where they are not theta's own (scaled rope); each
    is the value of a float32. factor: on every cosine and sine (yarn's attention factor).
    """

    dim: int
    theta: float
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    frequencies: tuple[float, ...] = ()
    factor: float = 1.0
    alternating: bool = False


class QueryScaleMetadata(Metadata, frozen=True):
    """The factor on a token's queries at place p of its sequence: 1 + beta * log(1 + floor((p + offset) / original)).

    Source: transformers 5.24 `models/llama4` and `models/mistral4`. original: tokens that the model was first trained
    with; up to there the factor is 1.
    """

    beta: float
    original: int
    offset: int = 0


class LayerMetadata(Metadata, frozen=True):
    """Shapes of one decoder layer.

    heads: of queries; 0, as all that follow, for a layer without attention. kv_heads: of keys and values. key_dim,
    value_dim: of a head. window: tokens that a query sees, itself included; 0 for all before it.
    chunk: positions are cut into chunks of so many, and a query sees its own; 0 for one chunk.
    bidirectional_images: an image's tokens see those of their image that follow, too.
    experts: routed ones; 0 for a dense layer. top_k: experts that a token is sent to.
    mixer, routing: for people, how its tokens see each other and how experts are chosen; routing is "" without any.
    """

    heads: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    chunk: int = 0
    bidirectional_images: bool = False
    experts: int = 0
    top_k: int = 0
    mixer: str = ""
    routing: str = ""


class VideoMetadata(Metadata, frozen=True):
    """Token ids of a video, which a prompt holds slice by slice, a text with the time beside each.

    placeholder: what the chat template writes for a whole video. token_id: of each visual token. begin, end: around
    the visual tokens of a slice.
    """

    placeholder: int
    token_id: int
    begin: tuple[int, ...]
    end: tuple[int, ...]


class ImageMarks(Metadata, frozen=True):
    """Token ids of an image beside those of its visual tokens, in whose order see `ImageLayout.ids`.

    placeholder: the one that the chat template writes for an image, whose place all others take; none where that is
    the id of a visual token. begin, end: around all. row_break: between rows of visual tokens (Pixtral). tile_break:
    between tiles of a row. tile_row_end: behind each row of tiles. overview: before the overview, and before an image
    in one piece (Llama 4).
    """

    placeholder: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    row_break: tuple[int, ...] = ()
    tile_break: tuple[int, ...] = ()
    tile_row_end: tuple[int, ...] = ()
    overview: tuple[int, ...] = ()


NO_MARKS = ImageMarks()


class ModelMetadata(Metadata, frozen=True):
    """Shapes and token ids. ropes: of rope groups 0, 1, ...

    vision, image_token_id: None for a model of text alone.
    image_token_id: of each visual token. image_marks: what else an image has. video: None for a model that takes none.
    query_scale: None where no layer scales queries by their place.
    parameters: all weights, a shared one once. active_parameters: those that one token uses: its top_k experts, and
    everything else.
    """

    model_type: str
    hidden: int
    vocabulary: int
    context: int
    layers: tuple[LayerMetadata, ...]
    eos_token_ids: tuple[int, ...]
    ropes: tuple[RopeMetadata, ...]
    vision: VisionMetadata | None = None
    image_token_id: int | None = None
    image_marks: ImageMarks = NO_MARKS
    video: VideoMetadata | None = None
    query_scale: QueryScaleMetadata | None = None
    parameters: int = 0
    active_parameters: int = 0

    @property
    def image_placeholder(self) -> int | None:
        """What the chat template writes for an image; None where it writes none."""
        return next(iter(self.image_marks.placeholder), self.image_token_id)

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids in whose place the decoder takes visual features."""
        ids = (self.image_token_id, None if self.video is None else self.video.token_id)
        return tuple(token_id for token_id in ids if token_id is not None)

    @property
    def control_token_ids(self) -> frozenset[int]:
        """Ids that end an answer or belong to an image or a video, and that no text of a user may become."""
        video = () if self.video is None else ((self.video.placeholder,), self.video.begin, self.video.end)
        marks = msgspec.structs.astuple(self.image_marks)
        return frozenset().union(self.eos_token_ids, self.visual_token_ids, *marks, *video)

    @property
    def tower(self) -> VisionMetadata:
        """For code that has an image at hand: `vision` of a model that has one."""
        assert self.vision is not None
        return self.vision

    @property
    def deepstack(self) -> int:
        """Levels of visual features added in the decoder."""
        return 0 if self.vision is None else self.vision.deepstack

    @property
    def bidirectional_images(self) -> bool:
        """Whether a step has to hold all tokens of an image: some layer lets them see later ones."""
        return any(layer.bidirectional_images for layer in self.layers)


class FileMetadata(Metadata, frozen=True):
    """sha256 in hexadecimal, size in bytes."""

    sha256: str
    size: int


class Manifest(Metadata, frozen=True):
    """manifest.json. `files` covers every other file of the bundle, by its path inside it.

    expert_layout: how the checkpoint's fused experts were read; every engine of the bundle has to read them so.
    ignored_config: dotted names of fields of config.json that were left out of account at the user's word.
    left_out: how many of the checkpoint's tensors have no part in a forward pass, by the part of names that they share.
    stored_as: how many weights the checkpoint holds in which format, in words; empty where it is not quantized.
    template_variables: names that the chat template may use, the tokenizer's eos_token and the like, and their texts.
    digest: of all the other fields, see `digest_of`; it finds damage, not forgery.
    """

    schema: int
    model: ModelMetadata
    source: dict[str, FileMetadata]
    files: dict[str, FileMetadata]
    engines: dict[str, EngineMetadata]
    tools: dict[str, str]
    expert_layout: str = "auto"
    ignored_config: tuple[str, ...] = ()
    left_out: dict[str, int] = msgspec.field(default_factory=dict)
    stored_as: dict[str, int] = msgspec.field(default_factory=dict)
    template_variables: dict[str, str] = msgspec.field(default_factory=dict)
    parity: dict[str, Any] = msgspec.field(default_factory=dict)
    digest: str = ""


def digest_of(manifest: bytes) -> str:
    """sha256, in hexadecimal, of manifest.json without white space and with an empty digest.

    Of the fields that are there: a bundle that is older than some of them keeps its digest.
    """
    return hashlib.sha256(msgspec.json.encode(msgspec.json.decode(manifest) | {"digest": ""})).hexdigest()
