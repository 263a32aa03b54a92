"""Memory of this process that stands for a GPU's, and watches over what kernels do to it.

What NVIDIA's compute-sanitizer finds on a GPU is found here in Triton's interpreter: accesses outside of what is
allocated (memcheck), reads of what nobody wrote (initcheck), and programs of one launch that access the same bytes
without atomics, one of them writing (racecheck).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.support.fakes.cuda_driver import AddressSpace

ALIGNMENT = 256
_GUARD = 4096  # bytes around a block that belong to none: two blocks never touch


class MemoryFault(AssertionError):
    """What a kernel did that is undefined on a GPU."""


@dataclass
class Block:
    """One allocation. written: whether each byte was. writer, reader: the last program that did, see `Memory`."""

    address: int
    data: np.ndarray
    written: np.ndarray
    writer: np.ndarray
    reader: np.ndarray
    whole: bool = False  # all of it was written: weights

    @property
    def end(self) -> int:
        return self.address + len(self.data)

    def __str__(self) -> str:
        return f"a block of {len(self.data)} bytes"


class Memory(AddressSpace):
    """Blocks of bytes at real addresses. They start as ones, which is NaN as any kind of float.

    program: number of the program that runs, over all launches; 0 for none. launch: number of its launch's first one.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._order: list[int] = []
        self._padding: Sequence[tuple[int, int]] = ()
        self.launch = self.program = 0

    def allocate(self, size: int) -> tuple[int, np.ndarray]:
        room = np.empty(size + 2 * _GUARD + ALIGNMENT, np.uint8)
        start = _GUARD + -(room.ctypes.data + _GUARD) % ALIGNMENT
        data = room[start : start + size]
        data[:] = 0xFF
        address = data.ctypes.data
        self._blocks[address] = Block(
            address, data, np.zeros(size, bool), np.zeros(size, np.int64), np.zeros(size, np.int64)
        )
        insort(self._order, address)
        return address, data

    def free(self, address: int) -> None:
        self._blocks.pop(address).data[:] = 0xFF
        self._order.remove(address)

    def map(self, memory: np.ndarray) -> int:
        address = memory.ctypes.data
        block = Block(address, memory, np.ones(len(memory), bool), *np.zeros((2, len(memory)), np.int64), whole=True)
        self._blocks[address] = block
        insort(self._order, address)
        return address

    def add(self, data: np.ndarray) -> int:
        """The address of a copy of an array."""
        address, _ = self.allocate(max(data.nbytes, 1))
        self.write(address, data)
        return address

    def block(self, address: int, size: int = 1) -> Block:
        """The one that has these bytes. Raises MemoryFault."""
        place = bisect_right(self._order, address) - 1
        block = self._blocks[self._order[place]] if place >= 0 else None
        if block is None or address + size > block.end:
            raise MemoryFault(f"{size} bytes at {address:#x} are not inside an allocation")
        return block

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes, to be read or written."""
        block = self.block(address, size)
        return block.data[address - block.address : address - block.address + size]

    def written(self, address: int, size: int) -> np.ndarray:
        """Whether each byte was, to be read or changed."""
        block = self.block(address, size)
        return block.written[address - block.address : address - block.address + size]

    def read(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A view as an array. Raises MemoryFault unless all of it was written."""
        size = int(np.prod(shape)) * dtype.itemsize
        if not self.written(address, size).all():
            first = int(np.argmin(self.written(address, size)))
            raise MemoryFault(f"{dtype} {shape} at {address:#x}: byte {first} is read, and was never written")
        return self.view(address, size).view(dtype).reshape(shape)

    def write(self, address: int, data: np.ndarray) -> None:
        """Copy an array there."""
        self.view(address, data.nbytes)[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.wrote(address, data.nbytes)

    def wrote(self, address: int, size: int, source: int | None = None) -> None:
        self.written(address, size)[:] = True if source is None else self.written(source, size)

    def forget(self, address: int, size: int) -> None:
        """What these bytes hold is not defined any more."""
        self.view(address, size)[:] = 0xFF
        self.written(address, size)[:] = False

    def begin_launch(self, padding: Sequence[tuple[int, int]] = ()) -> None:
        """A kernel starts, after all before it have ended.

        padding: ranges of bytes, start and end, that any program may write: whoever reads them wants no answer.
        """
        self._padding = padding
        self.launch = self.program + 1

    def loads(self, addresses: np.ndarray, size: int, atomic: bool = False) -> None:
        """A program reads `size` bytes at each of these addresses. Raises MemoryFault."""
        for block, places in self._places(addresses, size, "read"):
            ends = places + size - 1
            if not block.whole and not (block.written[places].all() and block.written[ends].all()):
                at = places[~(block.written[places] & block.written[ends])]
                raise MemoryFault(
                    f"{len(at)} of {len(places)} values are read and were never written, the first at byte {at[0]} of "
                    f"{block}"
                )
            if self.program and not atomic:
                self._race(block, places, block.writer, "wrote", "reads")
                block.reader[places] = self.program

    def stores(self, addresses: np.ndarray, size: int, atomic: bool = False) -> None:
        """A program writes `size` bytes at each of these addresses. Raises MemoryFault."""
        for block, places in self._places(addresses, size, "written"):
            for i in range(size):
                block.written[places + i] = True
            if self.program and not atomic:
                self._race(block, places, block.writer, "wrote", "writes")
                self._race(block, places, block.reader, "read", "writes")
                for i in range(size):
                    block.writer[places + i] = self.program

    def atomics(self, addresses: np.ndarray, size: int) -> None:
        """A program changes `size` bytes at each of these addresses, atomically. Raises MemoryFault."""
        self.loads(addresses, size, atomic=True)
        self.stores(addresses, size, atomic=True)

    def _race(self, block: Block, places: np.ndarray, last: np.ndarray, did: str, does: str) -> None:
        found = last[places]
        other = (found >= self.launch) & (found != self.program)
        for start, end in self._padding:
            other &= (places < start - block.address) | (places >= end - block.address)
        if other.any():
            i = int(np.argmax(other))
            raise MemoryFault(
                f"program {self.program - self.launch} {does} byte {places[i]} of {block}, which "
                f"program {int(found[i]) - self.launch} of the same launch {did}"
            )

    def _places(self, addresses: np.ndarray, size: int, done: str) -> list[tuple[Block, np.ndarray]]:
        """The blocks that the addresses are in, and offsets into them."""
        if not addresses.size:
            return []
        addresses = addresses.reshape(-1).astype(np.int64)
        block = self._inside(int(addresses.min()), done)
        if int(addresses.max()) + size <= block.end:
            return [(block, addresses - block.address)]
        found = []
        for number in np.unique(np.searchsorted(self._order, addresses, side="right")).tolist():
            own = addresses[np.searchsorted(self._order, addresses, side="right") == number]
            block = self._inside(int(own.min()), done)
            last = int(own.max())
            if last + size > block.end:
                raise MemoryFault(
                    f"{last - block.address - len(block.data)} bytes past the end of a block of "
                    f"{len(block.data)} are {done}"
                )
            found.append((block, own - block.address))
        return found

    def _inside(self, address: int, done: str) -> Block:
        try:
            return self.block(address)
        except MemoryFault:
            before = [self._blocks[start] for start in self._order if start <= address]
            past = f"{address - before[-1].end} bytes past the end of {before[-1]}" if before else "before all blocks"
            raise MemoryFault(f"a byte {past} is {done}") from None
