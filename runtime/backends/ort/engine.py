"""The engine protocol on ONNX Runtime's CPU provider, with pages of keys and values that the graph updates in place."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moevlm.runtime.backends.ort.binding import Binding
from moevlm.runtime.backends.ort.graph_check import check_decoder_graph, check_vision_graph
from moevlm.runtime.backends.ort.library import onnxruntime
from moevlm.runtime.backends.ort.limits import limits_of
from moevlm.runtime.backends.ort.pools import Pool, SequencePages, SharedPages
from moevlm.runtime.backends.ort.session import Session
from moevlm.runtime.bundle.graph_file import GraphFile
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS, CANDIDATES
from moevlm.runtime.core.states import PagedKV, Recurrent, output_name
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.candidates import candidates_of
from moevlm.runtime.engine.protocol import TEXT_ALONE, check_reserve, check_step, check_vision
from moevlm.runtime.engine.step import Candidates, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined
from moevlm.runtime.request.vision_inputs import VisionInputs

# Fields of a step that are inputs of the graph as they are, where it has them.
_PLAIN = (
    *("input_ids", "visual_index", "query_start", "context_len", "state_row", "logits_index"),
    *("visible_end", "query_scale"),
)


class OrtEngine:
    """ONNX Runtime sessions of the decoder and, if there is one, of the tower.

    Their weights stay in the files that they are mapped from.

    threads: for one operator; None takes all physical cores. Raises EngineError if a graph cannot be loaded or run.
    A cancelled call ends after the operator that runs at the time. Outputs of the decoder beside logits, candidates
    and states are debug outputs of every step.
    """

    def __init__(
        self,
        vision: GraphFile | None,
        decoder: GraphFile,
        model: ModelMetadata,
        metadata: EngineMetadata,
        threads: int | None = None,
        *,
        spinning: bool = True,
        operators: Path | None = None,
    ) -> None:
        """spinning: see `moevlm.runtime.load`. operators: a library that the graphs need beside ONNX Runtime's own."""
        self._model, self._metadata = model, metadata
        self._vision = None if vision is None else Session("vision", vision, threads, spinning, operators)
        self._decoder: Session | None = Session("decoder", decoder, threads, spinning, operators)
        for mapped in (*(() if vision is None else vision.maps), *decoder.maps):
            mapped.forget()  # kernels that pack their weights have read them for the last time
        inference = self._decoder.inference
        if self._vision is not None:
            check_vision_graph(self._vision.inference, model)
        check_decoder_graph(inference, model, metadata)
        self.states, self.limits = metadata.states, limits_of(model, metadata)
        inputs = {value.name for value in inference.get_inputs()}
        self._plain = [name for name in _PLAIN if name in inputs]
        self._ropes = [(str(group), f"rope_cos.{group}", f"rope_sin.{group}") for group in range(len(model.ropes))]
        self._has_table = "page_table" in inputs
        outputs = [value.name for value in inference.get_outputs()]
        kept = {output_name(name) for state in self.states for name in state.tensors}
        self._debug = [name for name in outputs if name not in {"logits", *CANDIDATE_OUTPUTS, *kept}]
        self._finds_candidates = set(CANDIDATE_OUTPUTS) <= set(outputs)
        # A step without images still feeds one row, which no visual_index points at.
        deepstack = np.zeros((model.deepstack, 1, model.hidden), np.float32)
        self._no_visual = HostFeatures(np.zeros((1, model.hidden), np.float32), deepstack)
        self._lock = threading.Lock()
        self._pool: Pool | None = None
        self._pages = self._rows = 0

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> HostFeatures:
        """Visual tokens of all images of one packed call. Raises EngineError for an image_start that does not rise."""
        if self._model.vision is None:
            raise EngineError(TEXT_ALONE)
        session = _opened(self._vision)
        check_vision(inputs)
        with session.running(cancellation) as options:
            outputs = session.inference.run(None, inputs.arrays, options)
        embeds = outputs[0]
        empty = np.zeros((0, *embeds.shape), np.float32)
        return HostFeatures(embeds, outputs[1] if len(outputs) > 1 else empty)

    def reserve(self, pages: int, rows: int) -> None:
        """See the protocol. The system gives memory where it is first written."""
        session = _opened(self._decoder)
        check_reserve(self.states, pages, rows)
        new = partial(Binding, onnxruntime(), session.inference, self._debug)
        with self._lock:
            self._pool = None
            try:
                if self._metadata.page_size:
                    self._pool = SharedPages(new, self.states, pages, rows, self.limits.page_size)
                else:
                    self._pool = SequencePages(new, self.states, rows, self.limits.max_context)
            except MemoryError as error:
                raise EngineError(f"no memory for {pages} pages of {self.limits.page_size} tokens") from error
            kinds = {type(state) for state in self.states}
            self._pages, self._rows = pages if PagedKV in kinds else 0, rows if Recurrent in kinds else 0

    def forward(
        self, step: Step, visual: Sequence[FeatureRows] = (), cancellation: Cancellation | None = None
    ) -> StepOutput:
        """See the protocol."""
        with self._lock:
            session, pool = _opened(self._decoder), self._pool
            if pool is None:
                raise EngineError("a step before any page was reserved")
            check_step(step, visual, self.limits, self._model, self._pages, self._rows)
            for source, target in step.copies:
                pool.copy(source, target)
            for row in step.cleared:
                pool.clear(row)
            for source, target in step.row_copies:
                pool.copy_row(source, target)
            binding = pool.bound(step)
            self._feed(binding, step, visual)
            rows = len(step.logits_index)
            logits = binding.output("logits", (rows, self._model.vocabulary), np.float32)
            found = self._candidates(binding, rows) if self._finds_candidates else None
            with session.running(cancellation) as options:
                outputs = binding.run(options)
            candidates = candidates_of(logits, CANDIDATES) if found is None else Candidates(*map(np.copy, found))
            return StepOutput(candidates, lambda row: logits[row].copy(), outputs)

    def _candidates(self, binding: Binding, rows: int) -> list[np.ndarray]:
        """Where the graph puts values, ids and log_sum_exp."""
        count = min(CANDIDATES, self._model.vocabulary)
        shapes: list[tuple[int, ...]] = [(rows, count), (rows, count), (rows,)]
        dtypes = np.float32, np.int32, np.float32
        return [binding.output(*output) for output in zip(CANDIDATE_OUTPUTS, shapes, dtypes, strict=True)]

    def _feed(self, binding: Binding, step: Step, visual: Sequence[FeatureRows]) -> None:
        """Put a step's arrays where the graph reads them."""
        for name in self._plain:
            binding.feed(name, getattr(step, name))
        for group, cos_name, sin_name in self._ropes:
            cos, sin = step.rope[group]
            binding.feed(cos_name, cos)
            binding.feed(sin_name, sin)
        if self._has_table:
            binding.feed_table("page_table", step.page_table)
        if self._model.vision is None:
            return
        give, features = (binding.feed, joined(visual)) if visual else (binding.hold, self._no_visual)
        give("visual_embeds", features.embeds)
        if self._model.deepstack:
            give("deepstack_embeds", features.deepstack)

    def close(self) -> None:
        """Let go of the sessions and the pool; they are freed with the steps that run now. Then nothing runs."""
        self._vision = self._decoder = self._pool = None


def _opened(session: Session | None) -> Session:
    """Raises EngineError for a session that was closed, or whose weights were cut short on the disk."""
    if session is None:
        raise EngineError("this engine was closed")
    session.require_whole()
    return session
