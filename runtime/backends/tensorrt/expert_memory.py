"""The experts' weights of an engine in memory: once, whatever contexts read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import ALIGNMENT, Device
from moevlm.runtime.backends.tensorrt.device_engine import DeviceEngine
from moevlm.runtime.bundle.safetensors import open_tensors
from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.errors import EngineError

UPLOAD_BYTES = 32 << 20  # of each of the two buffers that expert weights go through


class ExpertMemory:
    """Weights of experts where kernels read them, until `free`. addresses: for kernels, by the engine's inputs.

    Made and freed inside the device's context.
    """

    def __init__(self, device: Device, weights: Mapping[str, np.ndarray], host_layers: int = 0) -> None:
        """weights: bytes by name, as `expert_weights` gives them; none are allowed.

        host_layers: the last so many layers stay in the host's memory, mapped, and kernels read them there. Raises
        EngineError.
        """
        self._device, self._resources = device, ExitStack()
        self.addresses: dict[str, int] = {}
        layers = list(dict.fromkeys(map(_layer, weights)))
        mapped = set(layers[len(layers) - host_layers :])
        try:
            if here := {name: data for name, data in weights.items() if _layer(name) not in mapped}:
                self._upload(here)
            if there := {name: data for name, data in weights.items() if _layer(name) in mapped}:
                self._map(there)
        except BaseException:
            self.free()
            raise

    def _upload(self, weights: Mapping[str, np.ndarray]) -> None:
        """From the mapped file through two pinned buffers in turn."""
        places, size = _places(weights)
        memory = self._device.allocate(size)
        self._resources.callback(memory.free)
        with ExitStack() as stack:
            buffers = []
            for _ in range(2):
                buffer = self._device.allocate_host(min(UPLOAD_BYTES, size))
                stack.callback(buffer.free)
                buffers.append((buffer, stack.enter_context(self._device.event())))
            stack.callback(self._device.synchronize)  # before the buffers go
            turn = 0
            for name, data in weights.items():
                self.addresses[name] = memory.address + places[name]
                for start in range(0, len(data), UPLOAD_BYTES):
                    piece = data[start : start + UPLOAD_BYTES]
                    buffer, copied = buffers[turn % 2]
                    copied.wait()
                    buffer.array[: len(piece)] = piece
                    self._device.copy_in(self.addresses[name] + start, buffer.address, len(piece))
                    copied.record()
                    turn += 1

    def _map(self, weights: Mapping[str, np.ndarray]) -> None:
        """Into pinned memory, one copy; the pages of the file are the system's to drop."""
        places, size = _places(weights)
        memory = self._device.allocate_mapped(size)
        self._resources.callback(memory.free)
        for name, data in weights.items():
            place = places[name]
            memory.array[place : place + len(data)] = data
            self.addresses[name] = memory.device_address + place

    def free(self) -> None:
        self._resources.close()


def expert_weights(engine: DeviceEngine, names: Sequence[str], experts: MappedFile | None) -> dict[str, np.ndarray]:
    """Bytes of the engine's inputs `names`, in this order.

    experts: a file whose hash was checked. Raises EngineError if it is missing or does not have one of them, or in
    another size.
    """
    if not names:
        return {}
    if experts is None:
        raise EngineError(f"{engine.name} has an input {names[0]}, and manifest.json names no file with expert weights")
    tensors = open_tensors(experts)
    for name in names:
        if name not in tensors:
            raise EngineError(f"{engine.name} has an input {name}, which {experts.path.name} does not have")
        if len(tensors[name].data) != engine.size(name):
            raise EngineError(
                f"{engine.name} takes {engine.size(name)} bytes for {name} {engine.inputs[name]}, "
                f"{experts.path.name} has {len(tensors[name].data)}"
            )
    return {name: tensors[name].data for name in names}


def _layer(name: str) -> str:
    """layers.3.feed_forward for layers.3.feed_forward.gate_up, and for the same of its experts for images."""
    return name.rpartition(".")[0].removesuffix(".images")


def _places(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """(offset of each in one piece of memory, bytes of the whole)."""
    places, end = {}, 0
    for name, data in weights.items():
        places[name] = end
        end += -(-len(data) // ALIGNMENT) * ALIGNMENT
    return places, end
