"""The recording CUDA driver of `fake_cuda.cpp`."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def compile_driver(output: Path) -> Path:
    """It as a shared library, with no name inside: whoever looks for the real one by name in this process must not
    find it.
    """
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared"]
    command = [os.environ.get("CXX", "g++"), *flags, *os.environ.get("CXXFLAGS", "").split()]
    subprocess.run([*command, Path(__file__).with_suffix(".cpp"), "-o", output], check=True)
    return output


def image(entry: str, types: Sequence[str]) -> bytes:
    """In the place of a cubin. types: of the parameters, as Triton writes them; "*" for a pointer, "map" for a tensor's
    map.
    """
    return " ".join(["fake", entry, *map(_bytes, types)]).encode() + b"\0"


def _bytes(type: str) -> str:
    return "128" if type == "map" else "8" if type.startswith("*") else "4"


@dataclass(frozen=True)
class Event:
    """A call that succeeded. thread, context: who made it. values: what it was given."""

    call: str
    thread: int
    context: int
    values: dict[str, Any]


class FakeCuda:
    """One process has one; `reset` makes it new."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.fake_context.restype = ctypes.c_void_p
        self.c.fake_take_events.restype = ctypes.c_char_p
        self.reset()

    def reset(self) -> None:
        """A GPU of compute capability 8.6, and one context, current to this thread."""
        self.set_sm(86)
        self.use(self.context())
        self.events()

    def set_sm(self, sm: int) -> None:
        """Of every device from now on."""
        self.c.fake_set_sm(sm)

    def context(self) -> ctypes.c_void_p:
        """A new one."""
        return ctypes.c_void_p(self.c.fake_context())

    def use(self, context: ctypes.c_void_p | None, thread: int = 0) -> None:
        """Make it this thread's, and give the thread a name for its events."""
        self.c.fake_set_current(context)
        self.c.fake_name_thread(thread)

    def destroy(self, context: ctypes.c_void_p) -> None:
        """With the modules loaded in it."""
        self.c.fake_destroy(context)

    def loaded(self) -> int:
        """How many modules are, in all contexts."""
        return self.c.fake_loaded()

    @contextmanager
    def failing(self, call: str, error: int, successes: int = 0) -> Iterator[None]:
        """The call returns `error`, after so many that succeed."""
        self.c.fake_fail(call.encode(), successes, error)
        try:
            yield
        finally:
            self.c.fake_fail(call.encode(), -1, 0)

    def events(self) -> list[Event]:
        """The calls since the last time."""
        taken = json.loads(self.forget())
        return [Event(each.pop("call"), each.pop("thread"), each.pop("context"), each) for each in taken]

    def forget(self) -> bytes:
        """The same as it was written; names in it may be any bytes."""
        return self.c.fake_take_events()
