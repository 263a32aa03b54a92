"""A lowered graph as an engine: its plugins are those of the C++ library, its memory is that of the fake device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.plugin_harness import RUNTIME, DynamicTensorDesc, Io, Plugin
from moevlm.runtime.core.dtypes import DTYPES
from tests.support.fakes.cuda_driver import Work
from tests.support.fakes.evaluation import Shapes
from tests.support.simulator.graph import Graph, PluginNode, Segment
from tests.support.simulator.machine import Binding, Machine, PluginCall
from tests.support.simulator.memory import ALIGNMENT

Profile = Mapping[str, Sequence[Sequence[int]]]  # smallest, usual and largest shape by name

_KEPT_SHAPES = 64


class SimulatedEngine:
    """See `EngineEvaluation`. profiles: of every input with an open shape."""

    def __init__(self, machine: Machine, graph: Graph, profiles: Sequence[Profile]) -> None:
        self.machine, self.graph, self._profiles = machine, graph, profiles
        self.plugins = {
            step.name: machine.library.plugin(step.op, step.program, phase=RUNTIME)
            for step in graph.steps
            if isinstance(step, PluginNode)
        }
        self._values: dict[frozenset[tuple[str, tuple[int, ...]]], dict[str, np.ndarray]] = {}
        self.constants = {name: machine.memory.add(array) for name, array in graph.constants.items()}
        self._workspace = [self._configure(profile) for profile in range(len(profiles))]

    def _configure(self, profile: int) -> int:
        """Bytes of workspace that any plugin needs in a profile."""
        least, most = (
            self.values({name: tuple(ranges[i]) for name, ranges in self._profiles[profile].items()}) for i in (0, -1)
        )
        sizes = [0]
        for step in self._plugin_nodes():
            plugin, io = self.plugins[step.name], _io(step, least, most)
            for place in range(len(step.inputs) + len(step.outputs)):
                assert plugin.supports(place, io), (step.name, place)
            plugin.configure(io)
            sizes.append(plugin.workspace(io))
        return max(sizes)

    def _plugin_nodes(self) -> list[PluginNode]:
        return [step for step in self.graph.steps if isinstance(step, PluginNode)]

    def require(self, shapes: Shapes) -> None:
        """That these shapes of the inputs are inside of a profile."""
        assert any(
            all(
                low <= size <= high
                for name, (least, _, most) in profile.items()
                for low, size, high in zip(least, shapes[name], most, strict=True)
            )
            for profile in self._profiles
        ), shapes

    def values(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """Every value that is in memory, as zeros of its shape and dtype, for these shapes of the inputs."""
        key = frozenset(shapes.items())
        if key not in self._values:
            if len(self._values) == _KEPT_SHAPES:
                self._values.clear()
            self._values[key] = self._computed(shapes)
        return self._values[key]

    def _computed(self, shapes: Shapes) -> dict[str, np.ndarray]:
        given = self.graph.fixed_shapes() | dict(shapes)
        values = {name: _zeros(given[name], self.graph.dtype(name)) for name in self.graph.inputs}
        values |= self.graph.constants
        for step in self.graph.steps:
            if isinstance(step, Segment):
                values |= step.run({name: np.array(values[name]) for name in step.inputs})
                continue
            plugin = self.plugins[step.name]
            made = plugin.output_shapes([values[name].shape for name in step.inputs])
            types = plugin.output_types([_number(values[name].dtype) for name in step.inputs])
            for name, shape, number in zip(step.outputs, made, types, strict=True):
                assert number == _number(self.graph.dtype(name)), name
                values[name] = _zeros(shape, self.graph.dtype(name))
        return values

    def scratch(self, profile: int) -> int:
        """Bytes of memory that a context of a profile needs."""
        largest = {name: tuple(ranges[-1]) for name, ranges in self._profiles[profile].items()}
        return Layout.of(self, largest).size + self._workspace[profile]

    def output_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """See `EngineEvaluation`."""
        values = self.values(shapes)
        return {name: values[name].shape for name in self.graph.outputs}

    def context(self) -> SimulatedContext:
        return SimulatedContext(self)

    def close(self) -> None:
        for plugin in self.plugins.values():
            plugin.close()
        for address in self.constants.values():
            self.machine.memory.free(address)


@dataclass(frozen=True)
class Layout:
    """Where the values of one call lie in a context's memory. offsets: of those between two steps. size: of all."""

    values: dict[str, np.ndarray]
    offsets: dict[str, int]
    size: int

    @classmethod
    def of(cls, engine: SimulatedEngine, shapes: Shapes) -> Layout:
        values = engine.values(shapes)
        elsewhere = {*engine.graph.inputs, *engine.graph.outputs, *engine.constants}
        offsets, end = {}, 0
        for name, value in values.items():
            if name not in elsewhere:
                offsets[name] = end
                end += max(-(-value.nbytes // ALIGNMENT), 1) * ALIGNMENT
        return cls(values, offsets, end)


class SimulatedContext:
    """An execution context: its plugins are attached to the device's context."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine, self._machine = engine, engine.machine
        self._machine.enter()
        self._plugins = {name: plugin.attach() for name, plugin in engine.plugins.items()}
        self._bound: dict[str, Binding] = {}

    def enqueue(self, shapes: Shapes, addresses: Mapping[str, int], memory: tuple[int, int], stream: int) -> list[Work]:
        """The work of a call, in order. shapes: of the inputs. addresses: of inputs and outputs. memory: the context's.

        Launches are fixed now, as in a recorded graph: to do the work again is to launch the same again.
        """
        machine, graph = self._machine, self._engine.graph
        self._engine.require(shapes)
        layout = Layout.of(self._engine, shapes)
        start, size = memory
        places = {name: start + offset for name, offset in layout.offsets.items()}
        places |= self._engine.constants | dict(addresses)
        bound = {name: Binding(places[name], value.shape, value.dtype) for name, value in layout.values.items()}
        work: list[Work] = [partial(machine.memory.forget, start, size)]
        for step in graph.steps:
            if isinstance(step, Segment):
                work.append(partial(self._run, step, bound))
                continue
            plugin, io = self._plugins[step.name], _io(step, layout.values, layout.values)
            if bound != self._bound:
                plugin.shape_change(io)
            work += self._launched(plugin, io, step, bound, (start + layout.size, size - layout.size), stream)
        self._bound = bound
        return work

    def _launched(
        self,
        plugin: Plugin,
        io: Io,
        step: PluginNode,
        bound: Mapping[str, Binding],
        workspace: tuple[int, int],
        stream: int,
    ) -> list[Work]:
        machine = self._machine
        machine.enter()
        machine.cuda.events()
        inputs, outputs = (tuple(bound[name] for name in names) for names in (step.inputs, step.outputs))
        plugin.enqueue(io, [one.address for one in inputs], [one.address for one in outputs], workspace[0], stream)
        events = tuple(machine.cuda.events())
        assert {event.values["stream"] for event in events} == {stream}
        work = machine.kernels.work(machine.memory, PluginCall(step, inputs, outputs, events, workspace))
        return [partial(machine.memory.forget, *workspace), *work]

    def _run(self, step: Segment, bound: Mapping[str, Binding]) -> None:
        memory = self._machine.memory
        feeds = {name: memory.read(one.address, one.shape, one.dtype) for name in step.inputs for one in [bound[name]]}
        for name, array in step.run(feeds).items():
            assert (array.shape, array.dtype) == (bound[name].shape, bound[name].dtype), name
            memory.write(bound[name].address, array)

    def close(self) -> None:
        self._machine.enter()
        for plugin in self._plugins.values():
            plugin.close()


def _zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Of a shape, whatever its size."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def _number(dtype: np.dtype) -> int:
    """TensorRT's of a dtype."""
    return DTYPES[dtype.name].tensorrt_number


def _io(step: PluginNode, least: Mapping[str, np.ndarray], most: Mapping[str, np.ndarray]) -> Io:
    """What the plugin is told of its tensors."""

    def described(names: Sequence[str]) -> list[DynamicTensorDesc]:
        return [DynamicTensorDesc.of(most[name].dtype.name, least[name].shape, most[name].shape) for name in names]

    return Io(described(step.inputs), described(step.outputs))
