"""What an engine needs of any GPU, and how much cache it can use, as the manifest says."""

from __future__ import annotations

from dataclasses import dataclass

from moevlm.runtime.core.engine_metadata import EngineMetadata


@dataclass(frozen=True)
class Needs:
    """bytes: beside weights and cache. max_sequences: of a step. max_pages: of the cache.

    experts_apart: the experts' weights lie in a file of their own, so they can stay on the host.
    """

    bytes: int
    max_sequences: int
    max_pages: int
    experts_apart: bool


def needs_of(engine: EngineMetadata) -> Needs | None:
    """None for an engine of another backend."""
    built = engine.tensorrt
    if built is None:
        return None
    return Needs(built.workspace, built.max_sequences, built.max_pages, bool(built.experts))
