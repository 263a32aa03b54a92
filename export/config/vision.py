"""The canonical description of a vision tower: one class for each kind, found again by `modules.vision`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moevlm.runtime.core.errors import FieldError
from moevlm.runtime.core.towers import GridTower, VisionMetadata

if TYPE_CHECKING:
    from moevlm.export.config.model import MLPConfig


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ABC):
    """What all towers have: blocks of attention inside each image on patches in a row, then visual tokens of width out.

    merge_size: patches along a side of one visual token. rope_theta: of a rotary embedding on two axes.
    deepstack_layers: blocks whose output becomes visual tokens, too.
    """

    hidden: int
    depth: int
    heads: int
    mlp: MLPConfig
    epsilon: float
    patch_size: int
    merge_size: int
    channels: int
    rope_theta: float
    deepstack_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim % 4:  # two axes, and pairs on each
            raise FieldError("vision heads", self.heads, f"heads of a multiple of 4, and here of {self.head_dim}")
        allowed = range(self.depth)
        if len(set(self.deepstack_layers)) < len(self.deepstack_layers) or not set(self.deepstack_layers) <= {*allowed}:
            raise FieldError("deepstack layers", list(self.deepstack_layers), f"some of 0 to {self.depth - 1}")

    @property
    @abstractmethod
    def head_dim(self) -> int:
        """Width of a head of attention."""

    @property
    @abstractmethod
    def out(self) -> int:
        """Width of visual tokens."""

    @abstractmethod
    def metadata(self) -> VisionMetadata:
        """What the runtime must know, for the manifest."""


@dataclass(frozen=True)
class MergerConfig:
    """Four patches to one visual token: mlp (Qwen3-VL) or gated (GLM-4V, after a strided convolution)."""

    kind: str
    out: int
    width: int


@dataclass(frozen=True, kw_only=True)
class GridVisionConfig(VisionConfig):
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

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.head_dim % 4:
            raise FieldError("vision heads", self.heads, f"width {self.hidden} / heads is a multiple of 4")
        super().__post_init__()

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def out(self) -> int:
        return self.merger.out

    def metadata(self) -> GridTower:
        return GridTower(
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            channels=self.channels,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            deepstack=len(self.deepstack_layers),
            temporal_patch_size=self.temporal_patch_size,
            position_grid=self.position_grid,
            position_resampling=self.position_resampling,
        )
