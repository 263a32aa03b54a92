"""Triton's interpreter in a process of its own: what Triton is decides itself when it is first imported."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np

from moevlm.plugins.gpu.draft import Draft
from tests.plugins.gpu import guarded_memory, interpreter_speed

Result = TypeVar("Result")


class Interpreter:
    """Runs drafts on numpy arrays; raises OutOfBounds where a kernel touches anything but its arguments."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, draft: Draft, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of the draft, then the inputs that it writes; those in floating point as float32.

        inputs are rounded to the dtypes it states.
        """
        return self.call(_run, draft, dict(inputs))

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a function of a module there."""
        return self._pool.submit(function, *arguments).result()


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """One more process, until the end of the context."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(_prepare).result()  # it has the environment of now
            _restore(before)
            yield Interpreter(pool)
    finally:
        _restore(before)


def _prepare() -> None:
    interpreter_speed.install()
    guarded_memory.install()


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = before


def _run(draft: Draft, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    import torch

    from bench.gpu import launch

    torch.set_num_threads(1)
    given: list[Any] = [torch.from_numpy(inputs[t.name]).to(getattr(torch, t.dtype)) for t in draft.inputs]
    results = launch.run(draft, given)
    results += [tensor for tensor, stated in zip(given, draft.inputs, strict=True) if stated.written]
    return [(y.float() if y.is_floating_point() else y).numpy() for y in results]
