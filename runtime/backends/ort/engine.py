"""The engine protocol on ONNX Runtime's CPU provider, with KV caches that the graph updates in place."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moevlm.runtime.backends.ort.graph_check import check_decoder_graph, check_vision_graph
from moevlm.runtime.backends.ort.library import onnxruntime
from moevlm.runtime.bundle.graph_file import GraphFile
from moevlm.runtime.core.errors import EngineError, one_line
from moevlm.runtime.core.manifest import EngineMetadata, ModelMetadata
from moevlm.runtime.core.states import PagedKV, output_name
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Step, VisionInputs, VisualFeatures, check_cache, check_step, check_vision

# Longer than from one operator, or one token, to the next. A thread that waits longer gives its core to others.
_SPIN_MICROSECONDS = 500


@dataclass(frozen=True)
class _Session:
    """inference: an InferenceSession. weights: in the memory of `file`; it has no reference of its own to them."""

    inference: Any
    weights: Mapping[str, Any]
    file: GraphFile


@dataclass(frozen=True)
class OrtCache:
    """binding: the decoder's IOBinding, with every layer's key and value buffer bound as both input and output.

    held: the arrays bound to a step's other inputs and to the logits. A step of the same shapes as the last, as in
    decoding, writes into them and binds nothing anew.
    """

    batch: int
    capacity: int
    binding: Any
    session: "_Session"
    held: dict[str, np.ndarray] = field(default_factory=dict)


class OrtEngine:
    """Two ONNX Runtime sessions, whose weights stay in the files that they are mapped from.

    threads: for one operator; None takes all physical cores. Raises EngineError if a graph cannot be loaded or run.
    A cancelled call ends after the operator that runs at the time.
    """

    def __init__(
        self,
        vision: GraphFile,
        decoder: GraphFile,
        model: ModelMetadata,
        metadata: EngineMetadata,
        threads: int | None = None,
        *,
        spinning: bool = True,
        operators: Path | None = None,
    ) -> None:
        """spinning: see `moevlm.runtime.load`. operators: a library that the graphs need beside ONNX Runtime's own."""
        self._ort = onnxruntime()
        self._model = model
        self._operators = operators
        self._spinning = spinning
        self._vision: _Session | None = self._session(vision, threads)
        self._decoder: _Session | None = self._session(decoder, threads)
        for mapped in (*vision.maps, *decoder.maps):
            mapped.forget()  # kernels that pack their weights have read them for the last time
        check_vision_graph(self._vision.inference, model)
        check_decoder_graph(self._decoder.inference, model, metadata.states)
        self._states = metadata.states
        self._deepstack = model.vision.deepstack
        # A step without images still feeds one row, which no visual_index points at.
        self._no_visual = VisualFeatures(
            np.zeros((1, model.hidden), np.float32), np.zeros((self._deepstack, 1, model.hidden), np.float32)
        )
        outputs = [value.name for value in self._decoder.inference.get_outputs()]
        self._taps = [name for name in outputs if name != "logits" and "_cache_out." not in name]

    def _session(self, graph: GraphFile, threads: int | None) -> _Session:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self._spinning)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
        options.log_severity_level = 4  # what it says on failure is in the exception
        # ONNX Runtime wants to see the data files, and with all weights given reads none of them.
        folder = os.fsencode(graph.path.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            if self._operators is not None:
                options.register_custom_ops_library(str(self._operators))
            weights = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in graph.weights.items()}
            for name, value in weights.items():
                options.add_initializer(name, value)
            inference = self._ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
            return _Session(inference, weights, graph)
        except Exception as error:
            raise EngineError(f"ONNX Runtime refused {graph.path.name}: {_first_line(error)}") from error

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:
        """Visual tokens of all images of one packed call. Raises EngineError for segment ids that are not in order."""
        session = _opened(self._vision)
        check_vision(inputs)
        with self._running("vision", cancellation) as options:
            outputs = session.inference.run(None, vars(inputs), options)
        embeds = outputs[0]
        empty = np.zeros((0, *embeds.shape), np.float32)
        return VisualFeatures(embeds, outputs[1] if len(outputs) > 1 else empty)

    def new_cache(self, batch: int, capacity: int) -> OrtCache:
        """An empty cache of two buffers per layer: float32 [batch, kv_heads, capacity, head_dim], or int8 and wider."""
        session = _opened(self._decoder)
        check_cache(batch, capacity)
        binding = session.inference.io_binding()
        for name in ("logits", *self._taps):  # first, so that they lead the list of outputs
            binding.bind_output(name)
        for state in self._states:
            assert isinstance(state, PagedKV)
            for name, width in state.widths.items():
                zeros = np.zeros((batch, state.kv_heads, capacity, width), state.dtype)
                buffer = self._ort.OrtValue.ortvalue_from_numpy(zeros)
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(output_name(name), buffer)
        return OrtCache(batch, capacity, binding, session)

    def forward(
        self, step: Step, visual: VisualFeatures | None, cache: OrtCache, cancellation: Cancellation | None = None
    ) -> np.ndarray:
        """Logits [N, vocabulary] float32; see the protocol."""
        return self.run(step, visual, cache, cancellation)["logits"]

    def run(
        self, step: Step, visual: VisualFeatures | None, cache: OrtCache, cancellation: Cancellation | None = None
    ) -> dict[str, np.ndarray]:
        """All outputs but the caches, by name: logits, and the taps if the graph was given any."""
        session = _opened(self._decoder)
        check_step(step, visual, cache, self._model.vocabulary)
        visual = visual or self._no_visual
        feeds = vars(step) | {"visual_embeds": visual.embeds}
        if self._deepstack:
            feeds["deepstack_embeds"] = visual.deepstack
        self._feed(cache, feeds)
        for name in self._taps:  # again each time: a bound output keeps the last step's shape
            cache.binding.bind_output(name)
        with self._running("decoder", cancellation) as options:
            session.inference.run_with_iobinding(cache.binding, options)
        outputs = {"logits": cache.held["logits"].copy()}
        if self._taps:
            values = cache.binding.get_outputs()[1 : 1 + len(self._taps)]
            outputs |= {name: value.numpy() for name, value in zip(self._taps, values, strict=True)}
        return outputs

    def close(self) -> None:
        """Let go of the sessions; they are freed with the steps that run now and the caches. Then nothing runs."""
        self._vision = self._decoder = None

    @contextmanager
    def _running(self, graph: str, cancellation: Cancellation | None) -> Iterator[Any]:
        """Options of one run, which a cancellation ends. Raises EngineError if it fails by itself."""
        options = self._ort.RunOptions()
        cancellation = cancellation or Cancellation()
        with cancellation.stopping(lambda: setattr(options, "terminate", True)):
            try:
                yield options
            except Exception as error:
                cancellation.check()
                raise EngineError(f"the {graph} graph failed: {_first_line(error)}") from error

    def _feed(self, cache: OrtCache, feeds: dict[str, np.ndarray]) -> None:
        """Put a step's arrays where the graph reads them, and have room for its logits."""
        held = cache.held
        if all(name in held and _alike(held[name], array) for name, array in feeds.items()):
            for name, array in feeds.items():
                held[name][...] = array
            return
        held["logits"] = np.empty((len(feeds["logits_index"]), self._model.vocabulary), np.float32)
        cache.binding.bind_ortvalue_output("logits", self._ort.OrtValue.ortvalue_from_numpy(held["logits"]))
        for name, array in feeds.items():
            held[name] = np.array(array, order="C")  # a copy: the next step writes into it
            cache.binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(held[name]))


def _opened(session: _Session | None) -> _Session:
    """Raises EngineError for a session that was closed, or whose weights were cut short on the disk."""
    if session is None:
        raise EngineError("this engine was closed")
    session.file.require_whole()
    return session


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _first_line(error: Exception) -> str:
    return one_line(str(error).strip().partition("\n")[0])
