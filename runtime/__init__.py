"""Loads a bundle and generates text.

runtime = moevlm.runtime.load("demo.moevlm")
for piece in runtime.generate([{"role": "user", "content": "Translate to Chinese: forty-two"}]):
    print(piece.text, end="")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moevlm.runtime.generate import Runtime


def load(
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    threads: int | None = None,
    chunk_tokens: int = 512,
    max_image_pixels: int | None = None,
) -> Runtime:
    """Open a bundle, check the hashes of everything that will be used, and load one engine.

    target: the engine's name; by default the only one, or ort-cpu. threads: for one operator, by default all cores.
    chunk_tokens: the most prompt tokens in one step. max_image_pixels: larger images are refused.
    Raises BundleError or EngineError.
    """
    from moevlm.runtime.loading import load_runtime  # here, so that importing this package stays quick

    return load_runtime(path, target, threads, chunk_tokens, max_image_pixels)


__all__ = ["load"]
