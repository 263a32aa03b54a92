"""Triton's interpreter without the work that it repeats: half of the time of our kernels there."""

from __future__ import annotations

from functools import cache
from typing import Any


class _Nothing:
    """In the place of patches that are there already."""

    def restore(self) -> None:
        """Leave them there, as Triton does with those of a function that a kernel calls."""


def install() -> None:
    """Prepare the language once a launch, and not at every call of a function in a kernel, tl.sum among them."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # modules, in the launch that runs

    @cache
    def modules(function: Any) -> frozenset[int]:
        return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch_once(function: Any) -> Any:
        if modules(function) <= patched:
            return _Nothing()
        patched.update(modules(function))
        return patch(function)

    def launch(self: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()
        try:
            execute(self, *arguments, **named)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch
