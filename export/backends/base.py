"""What a target is: something that `moevlm build` makes of the canonical graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

import onnx_ir as ir

from moevlm.export.backends.sizes import Sizes
from moevlm.export.config import ModelConfig
from moevlm.export.graph.weights import Weight
from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.progress import Stages

GRAPHS = ("vision", "decoder")


@dataclass(frozen=True)
class BuildContext:
    """What targets are built from, and into. canonical: the graphs by name; they stay as they are.

    image_patches: of the largest image that the checkpoint's preprocessing makes; None if it has none.
    existing: the bundle that targets are added to, None for a new one. engines: that the bundle has so far, by name.
    """

    writer: BundleWriter
    canonical: Mapping[str, ir.Model]
    config: ModelConfig
    progress: Stages
    image_patches: int | None = None
    existing: Bundle | None = None
    engines: Mapping[str, EngineMetadata] = field(default_factory=dict)


class Target(Protocol):
    """name: in full, as in the manifest. sizes: that its kernels take."""

    @property
    def name(self) -> str: ...
    @property
    def sizes(self) -> Sizes: ...

    def require_machine(self) -> None:
        """Raises BuildError for what is missing on this machine to build it."""
        ...

    def suited(self, config: ModelConfig, weights: Mapping[str, Weight]) -> Self:
        """This target with what its options leave to the checkpoint, its name included.

        weights: of the decoder, by the names of its parameters.
        """
        ...

    def planned(
        self, config: ModelConfig, weights: Mapping[str, Weight], image_patches: int | None
    ) -> EngineMetadata | None:
        """What the manifest will say, as far as that is known before a build; None where no memory has to be planned.

        weights: as in `suited`. image_patches: as in BuildContext.
        """
        ...

    def rehearse(
        self, canonical: Mapping[str, ir.Model], config: ModelConfig, image_patches: int | None
    ) -> tuple[EngineMetadata, int]:
        """What the manifest will say, and the bytes of its files; no weight is read. Raises BuildError.

        canonical, image_patches: as in BuildContext.
        """
        ...

    def write(self, build: BuildContext) -> EngineMetadata:
        """Add its files to the bundle; what the manifest says of them. Raises BuildError."""
        ...
