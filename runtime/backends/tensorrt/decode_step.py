"""A step of one token of each of a fixed number of sequences, recorded once and replayed."""

from __future__ import annotations

import numpy as np

from moevlm.runtime.backends.tensorrt.execution import Execution, Shape
from moevlm.runtime.backends.tensorrt.page_tables import PageTables
from moevlm.runtime.backends.tensorrt.state_memory import Bindings
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS
from moevlm.runtime.engine.step import Candidates, Step

_NO_TABLE = np.zeros((0, 1), np.int32)


def sizes(max_sequences: int) -> list[int]:
    """How many sequences steps are padded to: 1, 2, 4, ..., and the most."""
    return [*(1 << i for i in range((max_sequences - 1).bit_length())), max_sequences]


class DecodeStep:
    """Steps of up to `size` sequences. The others are padding: token 0 at place 0 of page 0, with row 0, for nobody."""

    def __init__(
        self,
        execution: Execution,
        size: int,
        model: ModelMetadata,
        bound: Bindings,
        tables: PageTables,
        has_rows: bool,
    ) -> None:
        """execution: for fixed shapes. bound: address and shape of everything that is no array of a step.

        has_rows: whether sequences have rows of recurrent states.
        """
        self._execution, self._size, self._tables = execution, size, tables
        for name, (address, shape) in bound.items():
            execution.bind(name, address, shape)
        execution.bind("page_table", tables.address, (size, tables.columns))
        shapes: dict[str, Shape] = dict.fromkeys(("input_ids", "context_len", "logits_index"), (size,))
        if model.vision is not None:
            shapes["visual_index"] = (size,)
        shapes["query_start"] = (size + 1,)
        if has_rows:
            shapes["state_row"] = (size,)
        if model.bidirectional_images:  # zeros: a token sees itself at least, and nothing follows it
            shapes["visible_end"] = (size,)
        if model.query_scale is not None:
            shapes["query_scale"] = (size,)
        for i, rope in enumerate(model.ropes):
            shapes |= dict.fromkeys((f"rope_cos.{i}", f"rope_sin.{i}"), (size, rope.dim // 2))
        execution.arrange(shapes)
        arrays = execution.arrays
        for name in shapes:
            arrays[name][...] = 0
        if model.vision is not None:
            arrays["visual_index"][...] = -1
        arrays["query_start"][...] = np.arange(size + 1)
        self._ids, self._kept, self._wanted = (arrays[n] for n in ("input_ids", "context_len", "logits_index"))
        self._rows = arrays["state_row"] if has_rows else None
        self._scales = arrays["query_scale"] if model.query_scale is not None else None
        self._ropes = [(str(i), arrays[f"rope_cos.{i}"], arrays[f"rope_sin.{i}"]) for i in range(len(model.ropes))]
        self._found = [arrays[name] for name in CANDIDATE_OUTPUTS]

    @property
    def graph_refused(self) -> str | None:
        """Why steps are not replayed; None if they are."""
        return self._execution.graph_refused

    def bind_states(self, states: Bindings) -> None:
        """Have steps use other pages and rows from now on; a recording is lost by that."""
        for name, (address, shape) in states.items():
            self._execution.bind(name, address, shape)

    def warm_up(self) -> None:
        """Run padding alone: TensorRT compiles what it needs. Raises EngineError."""
        self._pad(0, 0)
        self._tables.write(_NO_TABLE, self._size)
        self._execution.run()

    def record(self) -> None:
        """Have later steps be one launch, where TensorRT allows it. Raises EngineError."""
        self._pad(0, 0)
        self._tables.write(_NO_TABLE, self._size)
        self._execution.record()

    def run(self, step: Step) -> Candidates:
        """The step has one token of each sequence and no image, and wants at most `size` rows. Raises EngineError."""
        count, wanted = step.sequences, len(step.logits_index)
        self._ids[:count] = step.input_ids
        self._kept[:count] = step.context_len
        if self._rows is not None:
            self._rows[:count] = step.state_row
        if self._scales is not None:
            self._scales[:count] = step.query_scale
        self._wanted[:wanted] = step.logits_index
        for group, cos, sin in self._ropes:
            cos[:count], sin[:count] = step.rope[group]
        self._pad(count, wanted)
        self._tables.write(step.page_table, self._size)
        self._execution.run()
        values, ids, log_sum_exp = (found[:wanted].copy() for found in self._found)
        return Candidates(values, ids, log_sum_exp)

    def _pad(self, count: int, wanted: int) -> None:
        """Sequences from `count` on are padding, and so are rows of logits from `wanted` on."""
        self._ids[count:] = 0
        self._kept[count:] = 0
        if self._rows is not None:
            self._rows[count:] = 0
        self._wanted[wanted:] = 0

    def close(self) -> None:
        self._execution.close()
