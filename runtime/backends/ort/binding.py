"""Where a graph finds its inputs and puts its outputs, from one run to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Binding:
    """An IOBinding of one session. A run of the same shapes as the last writes into the same arrays and binds nothing.

    Arrays stay those of the caller: whatever is bound here reads and writes their memory.
    """

    def __init__(self, ort: Any, inference: Any, debug: Sequence[str] = ()) -> None:
        """debug: outputs whose shapes are not known before a run."""
        self._ort, self._inference, self._debug = ort, inference, tuple(debug)
        self._binding = inference.io_binding()
        self._inputs: dict[str, np.ndarray] = {}  # that runs are copied into
        self._held: dict[str, np.ndarray] = {}  # of the caller
        self._outputs: dict[str, np.ndarray] = {}
        for name in self._debug:  # first, so that they lead the list of outputs
            self._binding.bind_output(name)

    def replace(self, name: str, output: str, array: np.ndarray) -> None:
        """Let the output overwrite the input, in `array`."""
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(output, value)

    def feed(self, name: str, array: np.ndarray) -> None:
        """Copy a run's input to where the graph reads it."""
        held = self._inputs.get(name)
        if held is not None and held.shape == array.shape and held.dtype == array.dtype:
            held[...] = array
        else:
            self._bind(name, np.array(array, order="C"))

    def feed_table(self, name: str, table: np.ndarray) -> None:
        """The same for a table [N, M] int32 that grows: up to a power of two columns, the further ones 0.

        So few steps have other shapes than the one before.
        """
        sequences, columns = table.shape
        held = self._inputs.get(name)
        wide = 1 << max(columns - 1, 0).bit_length()
        if held is None or held.shape != (sequences, wide) or held.dtype != table.dtype:
            held = np.zeros((sequences, wide), table.dtype)
            self._bind(name, held)
        held[:, :columns] = table
        held[:, columns:] = 0

    def hold(self, name: str, array: np.ndarray) -> None:
        """Let the graph read an input from `array` itself, which does not change until another is given."""
        if self._held.get(name) is not array:
            self._bind(name, array)
            del self._inputs[name]
            self._held[name] = array

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._inputs[name] = array
        self._held.pop(name, None)
        self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))

    def output(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array for an output: that of the last run, if its shape is the same."""
        held = self._outputs.get(name)
        if held is None or held.shape != shape:
            self._outputs[name] = held = np.empty(shape, dtype)
            self._binding.bind_ortvalue_output(name, self._ort.OrtValue.ortvalue_from_numpy(held))
        return held

    def run(self, options: Any) -> dict[str, np.ndarray]:
        """Run the graph. Returns the debug outputs, by name."""
        for name in self._debug:  # again each time: a bound output keeps the last run's shape
            self._binding.bind_output(name)
        self._inference.run_with_iobinding(self._binding, options)
        if not self._debug:
            return {}
        values = self._binding.get_outputs()[: len(self._debug)]
        return {name: value.numpy() for name, value in zip(self._debug, values, strict=True)}
