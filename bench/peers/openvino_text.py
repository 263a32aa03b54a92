"""OpenVINO on the decoder alone, weights of 4 or 8 bits, its own stateful cache; run by openvino_setup.PYTHON."""

from pathlib import Path
from time import perf_counter

import numpy as np
import openvino

from bench.peers.openvino_setup import model_of
from bench.peers.protocol import System, Timed, arguments, serve


class OpenVinoText(System):
    """The exported graph as it is, tuned for latency. Logits of all positions are what the graph gives."""

    def __init__(self, model: Path, threads: int) -> None:
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self._request = compiled.create_infer_request()
        self.vocabulary = compiled.output("logits").partial_shape[-1].get_length()
        self.versions = {"openvino": openvino.__version__}

    def prefill(self, ids: np.ndarray) -> Timed:
        self._request.reset_state()
        started = perf_counter()
        chosen = self._step(ids[None], 0)
        return perf_counter() - started, int(chosen[0])

    def decode(self, history: np.ndarray, steps: np.ndarray) -> Timed:
        self._request.reset_state()
        past = history.shape[1]
        self._step(history, 0)
        started = perf_counter()
        for i, column in enumerate(steps.T):
            chosen = self._step(column[:, None], past + i)
        return perf_counter() - started, int(chosen[0])

    def _step(self, ids: np.ndarray, past: int) -> np.ndarray:
        """ids: [B, S] after `past` tokens. Returns the argmax [B] behind each row."""
        rows, columns = ids.shape
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, past + columns), np.int64),
            "position_ids": np.tile(np.arange(past, past + columns), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        return self._request.infer(inputs)["logits"][:, -1].argmax(-1)


if __name__ == "__main__":
    given = arguments(__doc__)
    serve(lambda: OpenVinoText(model_of(given.checkpoint, given.bits), given.threads))
