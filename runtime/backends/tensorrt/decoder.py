"""The decoder's engine with all that stays on the device: experts, pages, page tables, logits, recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import DeviceMemory
from moevlm.runtime.backends.tensorrt.decode_step import DecodeStep, sizes
from moevlm.runtime.backends.tensorrt.decoder_check import ANY, DECODE, check_decoder
from moevlm.runtime.backends.tensorrt.device_engine import DeviceEngine
from moevlm.runtime.backends.tensorrt.device_features import FeatureMemory
from moevlm.runtime.backends.tensorrt.execution import Execution
from moevlm.runtime.backends.tensorrt.expert_memory import ExpertMemory, expert_weights
from moevlm.runtime.backends.tensorrt.page_tables import PageTables
from moevlm.runtime.backends.tensorrt.state_memory import Bindings, StateMemory, page_shapes, row_shapes
from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.engine_metadata import TensorRTMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS
from moevlm.runtime.core.progress import Progress
from moevlm.runtime.core.states import Recurrent, StateSpec
from moevlm.runtime.engine.step import Candidates, EngineLimits, Step
from moevlm.runtime.engine.visual import FeatureRows

_WARM = 2  # pages, and rows: the first, and as a profile's least one more


class Decoder:
    """Steps, one at a time. Everything is freed by `close`, inside the device's context."""

    def __init__(
        self,
        engine: DeviceEngine,
        experts: MappedFile | None,
        model: ModelMetadata,
        states: tuple[StateSpec, ...],
        metadata: TensorRTMetadata,
        limits: EngineLimits,
        features: FeatureMemory,
        host_layers: int = 0,
    ) -> None:
        """experts: a file whose hash was checked, if the engine needs one. host_layers: see `ExpertMemory`.

        Raises EngineError if it or the engine is not what the metadata say.
        """
        self._engine, self._device, self._model, self._limits = engine, engine.device, model, limits
        self._states, self._features = states, features
        self._has_rows = any(isinstance(state, Recurrent) for state in states)
        self._kept: StateMemory | None = None
        self._of_tokens = (
            "input_ids",
            *(("visual_index",) if model.vision else ()),
            *(("visible_end",) if model.bidirectional_images else ()),
            *(("query_scale",) if model.query_scale is not None else ()),
        )
        self._one_each = np.arange(limits.max_sequences + 1, dtype=np.int32)
        self._resources = ExitStack()
        try:
            pages, rows = page_shapes(states, limits.page_size), row_shapes(states)
            names = check_decoder(engine, model, pages, rows, metadata)
            weights = ExpertMemory(self._device, expert_weights(engine, names, experts), host_layers)
            self._resources.callback(weights.free)
            self._allocate()
            bound = {name: (address, engine.inputs[name]) for name, address in weights.addresses.items()}
            self._make_executions(bound | self._blank)
        except BaseException:
            self._resources.close()
            raise

    def _allocate(self) -> None:
        limits, layout, vocabulary = self._limits, self._features.layout, self._model.vocabulary
        rows = max(limits.max_logits, limits.max_sequences)  # decode steps compute a row of each sequence
        self._logits = self._memory(4 * rows * vocabulary).address
        self._blank: Bindings = {}
        if self._model.vision is not None:
            assert limits.max_visual is not None
            self._visual = self._memory(layout.size(limits.max_visual)).address
            # A row of zeros that no visual_index points at, for steps without images.
            blank = self._memory(layout.size(1))
            self._device.clear(blank.address, blank.size)
            self._blank = self._visual_at(blank.address, 1)
        self._row = self._device.allocate_host(4 * vocabulary)
        self._resources.callback(self._row.free)
        self._tables = PageTables(self._device, limits.max_sequences, -(-limits.max_context // limits.page_size))
        self._resources.callback(self._tables.free)

    def _memory(self, size: int) -> DeviceMemory:
        memory = self._device.allocate(size)
        self._resources.callback(memory.free)
        return memory

    def _make_executions(self, bound: Bindings) -> None:
        """One context for steps of any shapes, and one for each size of decode steps, as a recording asks for."""
        # Until there are others everything is bound with these.
        self._warm = StateMemory(
            self._device, self._states, _WARM, _WARM if self._has_rows else 0, self._limits.page_size
        )
        self._resources.callback(self._warm.free)
        bound = bound | self._warm.tensors
        self._any = Execution(self._engine, ANY)
        self._resources.callback(self._any.close)
        for name, (address, shape) in bound.items():
            self._any.bind(name, address, shape)
        self._decode: dict[int, DecodeStep] = {}
        for size in sizes(self._limits.max_sequences):
            logits: Bindings = {"logits": (self._logits, (size, self._model.vocabulary))}
            execution = Execution(self._engine, DECODE, fixed=True)
            self._resources.callback(execution.close)
            self._decode[size] = DecodeStep(execution, size, self._model, bound | logits, self._tables, self._has_rows)

    def warm_up(self, progress: Progress) -> None:
        """Run each kind of step once, on page 0 and row 0: what TensorRT compiles and the driver loads is there then.

        progress: steps that ran, and how many will. Raises EngineError.
        """
        runs = [self._run_largest, *(step.warm_up for step in self._decode.values())]
        try:
            for done, run in enumerate(runs):
                progress(done, len(runs))
                run()
            progress(len(runs), len(runs))
        finally:
            self._warm.free()

    @property
    def graphs(self) -> str:
        """Whether decode steps are replayed: "replayed", "refused: why" or "not yet"."""
        if self._kept is None:
            return "not yet"
        refused = next((step.graph_refused for step in self._decode.values() if step.graph_refused), None)
        return "replayed" if refused is None else f"refused: {refused}"

    def reserve(self, pages: int, rows: int) -> None:
        """So many pages and rows; those of before are gone. Records every size of decode steps. Raises EngineError."""
        if self._kept is not None and self._kept.size == (pages, rows):
            return
        self.free_states()
        self._kept = StateMemory(self._device, self._states, pages, rows, self._limits.page_size)
        try:
            for name, (address, shape) in self._kept.tensors.items():
                self._any.bind(name, address, shape)
            for step in self._decode.values():
                step.bind_states(self._kept.tensors)
                step.record()
        except BaseException:
            self.free_states()
            raise

    def free_states(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.free()

    def step(self, step: Step, visual: Sequence[FeatureRows]) -> Candidates:
        """Of the rows of logits_index. The step was checked before. Raises EngineError."""
        assert self._kept is not None
        self._kept.prepare(step)
        count = step.sequences
        if not visual and step.tokens == count and np.array_equal(step.query_start, self._one_each[: count + 1]):
            size = min(1 << (count - 1).bit_length(), self._limits.max_sequences)
            if len(step.logits_index) <= size:
                return self._decode[size].run(step)
        return self._any_step(step, visual)

    def logits(self, row: int) -> np.ndarray:
        """[vocabulary] float32, of the last step's row. Raises EngineError."""
        size = self._row.size
        self._device.copy_out(self._row.address, self._logits + row * size, size)
        self._device.synchronize()
        return self._row.array.view(np.float32).copy()

    def _any_step(self, step: Step, visual: Sequence[FeatureRows]) -> Candidates:
        wanted = len(step.logits_index)
        if visual:
            rows = sum(one.rows for one in visual)
            self._features.copy(visual, self._visual)
            seen = self._visual_at(self._visual, rows)
        else:
            seen = self._blank
        self._tables.write(step.page_table, step.sequences)
        self._arrange(step.tokens, step.sequences, max(wanted, 1), seen)
        arrays = self._any.arrays
        names = [*self._of_tokens, "query_start", "context_len", *(["state_row"] if self._has_rows else [])]
        for name in names:
            arrays[name][...] = getattr(step, name)
        # No axis may be empty: where nothing is wanted, one row is computed and dropped.
        arrays["logits_index"][...] = step.logits_index if wanted else 0
        for group, (cos, sin) in step.rope.items():
            arrays[f"rope_cos.{group}"][...] = cos
            arrays[f"rope_sin.{group}"][...] = sin
        self._any.run()
        values, ids, log_sum_exp = (arrays[name][:wanted].copy() for name in CANDIDATE_OUTPUTS)
        return Candidates(values, ids, log_sum_exp)

    def _arrange(self, tokens: int, sequences: int, wanted: int, visual: Bindings) -> None:
        for name, (address, shape) in visual.items():
            self._any.bind(name, address, shape)
        self._any.bind("page_table", self._tables.address, (sequences, self._tables.columns))
        self._any.bind("logits", self._logits, (wanted, self._model.vocabulary))
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self._of_tokens, (tokens,))
        shapes |= {"query_start": (sequences + 1,), "context_len": (sequences,), "logits_index": (wanted,)}
        if self._has_rows:
            shapes["state_row"] = (sequences,)
        for group, rope in enumerate(self._model.ropes):
            shapes |= dict.fromkeys((f"rope_cos.{group}", f"rope_sin.{group}"), (tokens, rope.dim // 2))
        self._any.arrange(shapes)

    def _run_largest(self) -> None:
        """As many tokens, sequences and rows of logits as a step may have, all on page 0 and row 0."""
        limits = self._limits
        tokens = min(limits.max_tokens, limits.max_context)
        sequences = min(limits.max_sequences, tokens)
        self._tables.write(np.zeros((sequences, self._tables.columns), np.int32), sequences)
        self._arrange(tokens, sequences, min(limits.max_logits, tokens), self._blank)
        for array in self._any.arrays.values():
            array[...] = 0
        if self._model.vision is not None:
            self._any.arrays["visual_index"][...] = -1
        starts = self._any.arrays["query_start"]
        starts[1:] = np.arange(tokens - sequences + 1, tokens + 1)  # one token each, but for the first
        self._any.run()

    def _visual_at(self, address: int, rows: int) -> Bindings:
        """Features of so many rows at an address, as `FeatureMemory.copy` leaves them there."""
        layout = self._features.layout
        found: dict[str, tuple[int, tuple[int, ...]]] = {"visual_embeds": (address, (rows, layout.hidden))}
        if layout.levels:
            shape = layout.levels, rows, layout.hidden
            found["deepstack_embeds"] = address + layout.levels_at(rows), shape
        return found

    def close(self) -> None:
        with self._resources:
            self.free_states()
