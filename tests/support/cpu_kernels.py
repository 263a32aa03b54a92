"""The CPU kernels as numpy functions: what the tests and the benchmark call."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np

from moevlm.plugins.ops.spec import ACTIVATIONS, SCORINGS, ExpertsSpec, RouterSpec

CPU = Path(__file__).parents[2] / "plugins" / "cpu"
FOLDERS = ("matmul", "sampling", "simd")  # attention is reached through its operator
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_vnni")  # by their numbers in instruction_set.h
Array = np.ndarray


def compile_kernels(library: Path) -> Path:
    """The kernels and their C interface as a shared library. CXXFLAGS as usual."""
    kernels = (source for folder in FOLDERS for source in sorted((CPU / folder).glob("*.cpp")))
    sources = [*kernels, Path(__file__).with_name("kernel_interface.cpp")]
    return compile_library(library, sources, ["-O2", *os.environ.get("CXXFLAGS", "").split()])


def compile_library(library: Path, sources: list[Path], options: list[str]) -> Path:
    """One compiler per source, side by side. CXX as usual."""
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-ffp-contract=fast", "-fPIC", f"-I{CPU}", *options]
    objects = [library.parent / f"{source.parent.name}-{source.stem}.o" for source in sources]
    pairs = zip(sources, objects, strict=True)
    running = [subprocess.Popen([compiler, *flags, "-c", source, "-o", out]) for source, out in pairs]
    assert not any([process.wait() for process in running]), "the compiler failed"
    subprocess.run([compiler, *flags, "-shared", "-pthread", *objects, "-o", library], check=True)
    return library


def _pointer(array: Array | None) -> ctypes.c_void_p | None:
    assert array is None or array.flags.c_contiguous
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


class Kernels:
    """One instruction set's kernels. Arrays are contiguous, of the dtypes that the C functions take."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str, threads: int = 1) -> None:
        self.library, self.name, self.threads = library, instruction_set, threads
        self.instruction_set = INSTRUCTION_SETS.index(instruction_set) if instruction_set else -1  # the best
        library.has_instruction_set.restype = ctypes.c_bool
        library.run_experts.restype = ctypes.c_int64

    def available(self) -> bool:
        return self.library.has_instruction_set(self.instruction_set)

    def quantize(self, x: Array, bits: int, block: int, fp4: bool = False) -> Array:
        """[T, blocks, 8 + block] uint8: scale, start, values."""
        tokens, columns = x.shape
        rows = np.empty((tokens, -(-columns // block), 8 + block), np.uint8)
        self.library.run_quantize(
            self.instruction_set, bits, block, 2 * fp4, *_sizes(tokens, columns), _pointer(x), _pointer(rows)
        )
        return rows

    def linear(
        self,
        x: Array,
        packed: Array,
        bias: Array | None,
        n: int,
        bits: int,
        block: int,
        zeros: bool = False,
        heads: int = 1,
        fp4: bool = False,
    ) -> Array:
        """heads: that x [T, heads * K] and y [T, heads * n] have, each with a weight of its own."""
        y = np.full((len(x), heads * n), np.nan, np.float32)
        sizes = _sizes(heads, n, x.shape[1] // heads, len(x))
        arrays = map(_pointer, (x, packed, bias, y))
        layout = bits, block, zeros + 2 * fp4
        self.library.run_linear(self.instruction_set, *_sizes(self.threads), *layout, *sizes, *arrays)
        return y

    def float_linear(self, x: Array, packed: Array, bias: Array | None, n: int) -> Array:
        y = np.full((len(x), n), np.nan, np.float32)
        sizes = _sizes(self.threads, n, x.shape[1], len(x))
        self.library.run_float_linear(self.instruction_set, *sizes, *map(_pointer, (x, packed, bias, y)))
        return y

    def experts(
        self,
        x: Array,
        index: Array,
        weight: Array,
        gate_up: Array,
        down: Array,
        spec: ExpertsSpec,
        width: int,
        bits: int,
        block: int,
        gate_up_bias: Array | None = None,
        down_bias: Array | None = None,
        zeros: bool = False,
        fp4: bool = False,
    ) -> tuple[Array, int]:
        """y, and where the first index stands that is no expert (or how many indices there are)."""
        y = np.full(x.shape, np.nan, np.float32)
        settings = (ACTIVATIONS.index(spec.activation), int(spec.gated), int(spec.weight_on == "input"))
        checked = self.library.run_experts(
            self.instruction_set,
            *_sizes(self.threads),
            bits,
            block,
            zeros + 2 * fp4,
            *_sizes(len(gate_up), x.shape[1], width),
            *settings,
            ctypes.c_float(spec.alpha),
            ctypes.c_float(spec.limit),
            *_sizes(*index.shape),
            *map(_pointer, (x, index, weight, gate_up, down, gate_up_bias, down_bias, y)),
        )
        return y, checked

    def route(
        self, logits: Array, spec: RouterSpec, bias: Array | None = None, expert_scale: Array | None = None
    ) -> tuple[Array, Array] | None:
        """None: refused."""
        shape = (len(logits), spec.top_k)
        index, weight = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float32)
        refused = self.library.run_router(
            self.instruction_set,
            *_sizes(self.threads, spec.top_k),
            SCORINGS.index(spec.scoring),
            int(spec.renormalize),
            ctypes.c_float(spec.epsilon),
            ctypes.c_float(spec.scale),
            *_sizes(spec.n_group, spec.topk_group),
            int(spec.group_score == "top2_sum"),
            *_sizes(*logits.shape),
            *map(_pointer, (logits, bias, expert_scale, index, weight)),
        )
        return None if refused else (index, weight)

    def candidates(self, logits: Array, count: int) -> tuple[Array, Array, Array]:
        """values, ids, log_sum_exp."""
        rows, vocabulary = logits.shape
        values, ids = np.full((rows, count), np.nan, np.float32), np.full((rows, count), -1, np.int32)
        log_sum_exp = np.full(rows, np.nan, np.float32)
        sizes = _sizes(self.threads, rows, vocabulary, count)
        arrays = map(_pointer, (logits, values, ids, log_sum_exp))
        self.library.run_candidates(self.instruction_set, *sizes, *arrays)
        return values, ids, log_sum_exp
