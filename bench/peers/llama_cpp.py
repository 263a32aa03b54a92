"""llama.cpp through its Python binding, Q4_0 or Q8_0 weights and a 16-bit cache; run by llama_cpp_setup.PYTHON."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import llama_cpp as lib
import numpy as np

from bench.peers.llama_cpp_setup import model_of
from bench.peers.protocol import System, Timed, arguments, serve

CHUNK = 512  # prompt tokens in one call, llama.cpp's own default for a physical batch


@dataclass(frozen=True)
class Session:
    """A context with an empty cache, and the batch that feeds it. Made once for each shape."""

    context: lib.llama_context_p
    batch: lib.llama_batch


class LlamaCpp(System):
    """Text alone, with flash attention for several sequences only: measured, the faster way for either.

    (Per core, Q4_0: one sequence with 4096 past decodes at 14 tok/s with it and at 29 without, eight at 100 and 88.)
    """

    def __init__(self, model: Path, threads: int) -> None:
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp refused {model}")
        self._threads = threads
        self._sessions: dict[tuple[int, int], Session] = {}
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.versions = {"llama-cpp-python": lib.__version__, "features": lib.llama_print_system_info().decode()}

    def prefill(self, ids: np.ndarray) -> Timed:
        session = self._session(1, len(ids) + 1)
        started = perf_counter()
        chosen = self._prompt(session, ids[None])
        return perf_counter() - started, int(chosen[0])

    def decode(self, history: np.ndarray, steps: np.ndarray) -> Timed:
        past = history.shape[1]
        session = self._session(len(steps), past + steps.shape[1])
        self._prompt(session, history)
        sequences = np.arange(len(steps))
        started = perf_counter()
        for i, column in enumerate(steps.T):
            self._forward(session, column, np.full(len(column), past + i), sequences, np.ones(len(column), bool))
            chosen = self._argmax(session, len(column))
        return perf_counter() - started, int(chosen[0])

    def clients(self, history: np.ndarray, tokens: int) -> Timed:
        past = history.shape[1]
        session = self._session(len(history), past + tokens)
        chosen = self._prompt(session, history)
        sequences, wanted = np.arange(len(history)), np.ones(len(history), bool)
        started = perf_counter()
        for i in range(tokens):
            self._forward(session, chosen, np.full(len(history), past + i), sequences, wanted)
            chosen = self._argmax(session, len(history))
        return perf_counter() - started, int(chosen[0])

    def _prompt(self, session: Session, ids: np.ndarray) -> np.ndarray:
        """ids: [B, S], sequence after sequence, in chunks. Returns the argmax [B] behind each."""
        chosen = np.zeros(len(ids), np.int64)
        for sequence, row in enumerate(ids):
            for start in range(0, len(row), CHUNK):
                chunk = row[start : start + CHUNK]
                last = np.arange(start, start + len(chunk)) == len(row) - 1
                positions = np.arange(start, start + len(chunk))
                self._forward(session, chunk, positions, np.full(len(chunk), sequence), last)
            chosen[sequence] = self._argmax(session, 1)[0]
        return chosen

    def _forward(
        self, session: Session, ids: np.ndarray, positions: np.ndarray, sequences: np.ndarray, wanted: np.ndarray
    ) -> None:
        """Arguments: [N]. wanted: whose logits are computed."""
        batch, count = session.batch, len(ids)
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.token, (count,))[:] = ids
        np.ctypeslib.as_array(batch.pos, (count,))[:] = positions
        np.ctypeslib.as_array(batch.logits, (count,))[:] = wanted
        for i, sequence in enumerate(sequences):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = int(sequence)
        status = lib.llama_decode(session.context, batch)
        if status:
            raise ValueError(f"llama_decode failed with status {status}")

    def _argmax(self, session: Session, rows: int) -> np.ndarray:
        """[rows], of the last `rows` logits that were computed."""
        logits = [lib.llama_get_logits_ith(session.context, i - rows) for i in range(rows)]
        return np.array([np.ctypeslib.as_array(row, (self.vocabulary,)).argmax() for row in logits])

    def _session(self, sequences: int, tokens: int) -> Session:
        """Room for so many sequences of so many tokens each, empty."""
        key = (sequences, -(-tokens // 256) * 256)
        if key not in self._sessions:
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = key[0] * key[1], sequences
            params.n_batch = params.n_ubatch = CHUNK
            flash = sequences > 1
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.n_threads = params.n_threads_batch = self._threads
            context = lib.llama_init_from_model(self._model, params)
            if not context:
                raise ValueError(f"llama.cpp made no context of {params.n_ctx} tokens")
            self._sessions[key] = Session(context, lib.llama_batch_init(CHUNK, 0, 1))
        session = self._sessions[key]
        lib.llama_memory_clear(lib.llama_get_memory(session.context), True)
        return session


if __name__ == "__main__":
    given = arguments(__doc__)
    serve(lambda: LlamaCpp(model_of(given.checkpoint, given.bits), given.threads))
