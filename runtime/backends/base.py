"""What a backend is: it runs the engines of one library. `registry` lists them; each has a folder of its own."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec

from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import Misfit
from moevlm.runtime.core.experts_in import DEVICE
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.progress import Stages
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import EngineLimits


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is loaded, see `moevlm.runtime.load`. threads, spinning: of engines on the CPU.

    experts_in: of engines on a GPU.
    """

    threads: int | None = None
    spinning: bool = True
    experts_in: str = DEVICE


class KernelsReport(msgspec.Struct, frozen=True):
    """Over all kernels of an engine, the most registers of a thread, bytes of shared memory of a block, and bytes that
    a thread spills, 0 if none does.
    """

    count: int
    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Table:
    """What people want to know of a backend's engines, a row each. lines: below the table."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    lines: Sequence[str] = ()


class Backend(Protocol):
    """Runs engines of one kind. An object looks at this machine once, when it is first asked what fits.

    machine: what this machine has, in words, as far as `misfit` had to look; "" where it had not.
    """

    @property
    def machine(self) -> str: ...

    def misfit(self, engine: EngineMetadata) -> Misfit | None:
        """What the engine needs and this machine does not have; None if it runs here."""
        ...

    def require_library(self, engine: EngineMetadata) -> None:
        """Find out whether what the engine runs on is installed. Raises EngineError, naming what to install."""
        ...

    def limits(self, model: ModelMetadata, engine: EngineMetadata) -> EngineLimits:
        """Of a step."""
        ...

    def load(self, bundle: Bundle, name: str, options: EngineOptions, progress: Stages | None = None) -> Engine:
        """The engine `name`, its files verified. Raises BundleError or EngineError."""
        ...

    def problems(self, bundle: Bundle, engine: EngineMetadata) -> list[str]:
        """What the engine's files say that the manifest does not, a line each; nothing is run."""
        ...

    def kernels(self, bundle: Bundle, engine: EngineMetadata) -> KernelsReport | None:
        """What its kernels take of a GPU; None if it has none, or the bundle does not say. Raises BundleError."""
        ...

    def table(self, bundle: Bundle, engines: Mapping[str, EngineMetadata]) -> Table | None:
        """What `moevlm inspect` shows of these engines besides what all have. Raises BundleError."""
        ...


@contextmanager
def opened_files(
    bundle: Bundle, name: str, read: Container[str], progress: Stages | None
) -> Iterator[Mapping[str, BundleFile]]:
    """All files of an engine but those in `read`, which are checked as they are read."""
    with ExitStack() as stack:
        told = partial(progress, "verifying") if progress else None
        files = bundle.open_verified([path for path in bundle.engine_files(name) if path not in read], told)
        if progress:
            progress("loading", 0, 0)
        for file in files.values():
            stack.push(file)
        yield files
