"""The page tables of a step on the device: at one address and of one width, so that recorded steps may read them."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import Device


class PageTables:
    """[sequences, columns] int32 on the device. Made and freed inside the device's context.

    Behind the columns that a step uses lie those of earlier steps: kernels use of a sequence's table what its tokens
    need, and no more, though they read a column ahead.
    """

    def __init__(self, device: Device, sequences: int, columns: int) -> None:
        self._device, self.columns = device, columns
        self._resources = ExitStack()
        size = 4 * sequences * columns
        try:
            memory = device.allocate(size)
            self._resources.callback(memory.free)
            host = device.allocate_host(size)
            self._resources.callback(host.free)
            device.clear(memory.address, memory.size)
        except BaseException:
            self._resources.close()
            raise
        self.address, self._host_address = memory.address, host.address
        self._host = host.array.view(np.int32).reshape(sequences, columns)
        self._host[...] = 0

    def write(self, table: np.ndarray, sequences: int) -> None:
        """Queue the copy of a step's tables, and of page 0 alone for as many more as make `sequences`.

        table: [N, M] int32; columns beyond the context are of no use. Nothing that was queued before may run any more.
        """
        count, used = len(table), min(table.shape[1], self.columns)
        self._host[:count, :used] = table[:, :used]
        self._host[count:sequences, 0] = 0
        pitch = 4 * self.columns
        self._device.copy_rows_in(self.address, self._host_address, pitch, 4 * used, sequences)

    def free(self) -> None:
        self._resources.close()
