"""The canonical description of a vision tower: one class for each kind, found again by `modules.vision`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from moevlm.export.config.feed_forward import MLPConfig
from moevlm.runtime.core.errors import FieldError
from moevlm.runtime.core.towers import (
    GridTower,
    MoonTower,
    PooledTower,
    QueryTower,
    ResampledTower,
    RotaryTower,
    TileTower,
    VisionMetadata,
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ABC):
    """What all towers have: blocks of attention inside each image on patches in a row, then visual tokens of width out.

    merge_size: patches along a side of one visual token. rope_theta: of a rotary embedding on two axes. out: width of
    visual tokens. deepstack_layers: blocks whose output becomes visual tokens, too.
    """

    hidden: int
    depth: int
    heads: int
    head_dim: int
    mlp: MLPConfig
    epsilon: float
    patch_size: int
    merge_size: int
    channels: int
    rope_theta: float
    out: int
    deepstack_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim % 4:  # two axes, and pairs on each
            raise FieldError("vision head_dim", self.head_dim, "a multiple of 4")
        allowed = range(self.depth)
        if len(set(self.deepstack_layers)) < len(self.deepstack_layers) or not set(self.deepstack_layers) <= {*allowed}:
            raise FieldError("deepstack layers", list(self.deepstack_layers), f"some of 0 to {self.depth - 1}")

    @abstractmethod
    def metadata(self) -> VisionMetadata:
        """What the runtime must know, for the manifest."""

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields that every tower of the manifest has."""
        return {
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "channels": self.channels,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
        }


@dataclass(frozen=True, kw_only=True)
class EvenVisionConfig(VisionConfig):
    """Towers whose heads side by side are as wide as a row."""

    def __post_init__(self) -> None:
        if self.hidden != self.heads * self.head_dim or self.head_dim % 4:
            raise FieldError("vision heads", self.heads, f"width {self.hidden} / heads is a multiple of 4")
        super().__post_init__()


@dataclass(frozen=True)
class MergerConfig:
    """Four patches to one visual token: mlp (Qwen3-VL) or gated (GLM-4V, after a strided convolution)."""

    kind: str
    width: int


@dataclass(frozen=True, kw_only=True)
class GridVisionConfig(EvenVisionConfig):
    """The towers of Qwen3-VL and GLM-4V: a table of positions resampled to the image, a learned merge of patches.

    norm: layer or rms. outer_norms: RMS norms right after the patch embedding and after the last block (GLM-4V).
    position_resampling: bilinear or bicubic, see `runtime.core.towers.GridTower`.
    """

    norm: str
    qkv_bias: bool
    out_bias: bool
    outer_norms: bool
    temporal_patch_size: int
    position_grid: int
    position_resampling: str
    merger: MergerConfig

    def metadata(self) -> GridTower:
        return GridTower(
            **self.sizes,
            deepstack=len(self.deepstack_layers),
            temporal_patch_size=self.temporal_patch_size,
            position_grid=self.position_grid,
            position_resampling=self.position_resampling,
        )


@dataclass(frozen=True, kw_only=True)
class PooledVisionConfig(VisionConfig):
    """The tower of Gemma 4: norms around and inside attention, a table of positions for each axis, means of patches.

    position_table: rows of each table. standardize: pooled patches less a bias, times a gain, both learned.
    """

    position_table: int
    standardize: bool

    def metadata(self) -> PooledTower:
        return PooledTower(**self.sizes, position_table=self.position_table)


@dataclass(frozen=True, kw_only=True)
class MoonVisionConfig(EvenVisionConfig):
    """MoonViT of Kimi-K2.5: layer norms and biases throughout, a table of positions resampled to the image.

    projector_epsilon: of the norm before patches are joined, behind the tower's last one.
    """

    position_grid: int
    projector_epsilon: float

    def metadata(self) -> MoonTower:
        return MoonTower(**self.sizes, position_grid=self.position_grid)


@dataclass(frozen=True, kw_only=True)
class RotaryVisionConfig(EvenVisionConfig):
    """The tower of Pixtral: RMS norms, no biases; patches are normed, joined to one of their width, then projected.

    joined_epsilon: of the norm before patches are joined. projector_activation, projector_bias: of the two projections
    to visual tokens.
    """

    joined_epsilon: float
    projector_activation: str
    projector_bias: bool

    def metadata(self) -> RotaryTower:
        return RotaryTower(**self.sizes)


@dataclass(frozen=True, kw_only=True)
class ResampledVisionConfig(EvenVisionConfig):
    """The tower of ERNIE 4.5 VL: layer norms throughout; a block of patches, then two frames, through a layer each.

    An image is one frame, taken twice. out_epsilon: of the RMS norm of visual tokens.
    """

    out_epsilon: float

    def metadata(self) -> ResampledTower:
        return ResampledTower(**self.sizes)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Joined patches to a visual token: one projection after the other, an activation between them.

    widths: between the projections. norm: a layer norm before the first. bias: of all projections.
    """

    widths: tuple[int, ...]
    activation: str
    norm: bool
    bias: bool


@dataclass(frozen=True, kw_only=True)
class TileVisionConfig(EvenVisionConfig):
    """The towers of InternVL and Llama 4: images of one size, a class token behind the patches of each.

    side: of an image, in patches. norm: layer or rms, of blocks. qk_norm: queries and keys are normed, a whole row at
    once. first_norm, last_norm: layer norms before the first block and after the last. rope_theta: 0 for none.
    """

    side: int
    norm: str
    patch_bias: bool
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    first_norm: bool
    last_norm: bool
    projector: ProjectorConfig

    def metadata(self) -> TileTower:
        return TileTower(**self.sizes, side=self.side)


@dataclass(frozen=True, kw_only=True)
class QueryVisionConfig(EvenVisionConfig):
    """The tower of Aria: SigLIP, then queries that make visual tokens of an image's patches by cross-attention.

    queries: visual tokens of every image. side: the longer one of an image, in patches. position_grid: side of the
    table of positions.
    """

    queries: int
    side: int
    position_grid: int

    def metadata(self) -> QueryTower:
        return QueryTower(**self.sizes, queries=self.queries, side=self.side, position_grid=self.position_grid)
