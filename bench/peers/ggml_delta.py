"""The gated delta rule as llama.cpp computes it, through ggml's C interface: its convolution, norms and fused operator.

Source of the graph: llama.cpp's src/models/qwen35moe.cpp and delta-net-base.cpp.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any

import numpy as np

from bench.delta_rules import Array, Rule, Work
from bench.peers.client import PeerError
from bench.peers.llama_cpp_setup import FOLDER

FLOAT32 = 0  # ggml_type
NODES = 4096  # of a graph, at most


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """ggml's functions; every result is a pointer unless it is said otherwise."""

    def __init__(self) -> None:
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        (folder,) = FOLDER.glob("venv/lib/python3.*/site-packages/llama_cpp/lib")
        self._libraries = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in names]

    def __call__(self, name: str, *arguments: Any, result: Any = c_void_p) -> Any:
        """Call `ggml_{name}`. Python integers are int64_t; other types are given as ctypes."""
        function = next(f for library in self._libraries if (f := getattr(library, f"ggml_{name}", None)) is not None)
        function.restype = result
        return function(*(c_int64(one) if isinstance(one, int) else one for one in arguments))

    def context(self) -> c_void_p:
        """For the descriptions of tensors and a graph, whose memory is elsewhere."""
        overhead = self("tensor_overhead", result=c_size_t) * NODES
        graph = self("graph_overhead_custom", c_size_t(NODES), c_bool(False), result=c_size_t)
        return c_void_p(self("init", _InitParams(overhead + graph, None, True)))


@cache
def ggml() -> Ggml:
    """The library, loaded once."""
    return Ggml()


class LlamaCpp(Rule):
    """All layers in one graph of ggml; head h of the values reads key h modulo the keys, so heads lie in that order."""

    name = "llama.cpp"

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        spec, inputs, g = work.spec, work.inputs(), ggml()
        shared, shape = spec.value_heads // spec.key_heads, (work.sequences, work.tokens)
        self._order = np.arange(spec.value_heads).reshape(spec.key_heads, shared).T.reshape(-1)
        keys = 2 * spec.key_heads * spec.key_dim
        values = keys + (self._order[:, None] * spec.value_dim + np.arange(spec.value_dim)).reshape(-1)
        channels = np.concatenate([np.arange(keys), values])
        buffer_type = c_void_p(g("backend_cpu_buffer_type"))
        kept, made = g.context(), g.context()
        self._kept: list[tuple[c_void_p, Array]] = []

        def stored(array: Array) -> c_void_p:
            sizes = [*array.shape[::-1], *[1] * (4 - array.ndim)]
            tensor = c_void_p(g("new_tensor_4d", kept, c_int(FLOAT32), *sizes))
            self._kept.append((tensor, np.ascontiguousarray(array, np.float32)))
            return tensor

        def op(name: str, *arguments: Any) -> c_void_p:
            return c_void_p(g(name, made, *arguments))

        rows = inputs["qkv"].reshape(*shape, -1)[..., channels].swapaxes(1, 2)  # [B, C, T]: as after a transposition
        qkv, taps = stored(rows), stored(inputs["conv_weight"][channels])
        a, b = (stored(inputs[name].reshape(*shape, -1, 1)[:, :, self._order]) for name in "ab")
        rate, bias = (stored(inputs[name][self._order, None]) for name in ("rate", "dt_bias"))
        graph = c_void_p(g("new_graph_custom", made, c_size_t(NODES), c_bool(False)))
        for layer in range(work.layers):
            conv, delta = work.states(layer)
            conv_state = stored(conv[..., channels].swapaxes(1, 2))
            state = stored(delta[:, self._order].swapaxes(-1, -2))
            self._layer(op, graph, (qkv, taps, a, b, rate, bias, conv_state, state))
        g("backend_alloc_ctx_tensors_from_buft", kept, buffer_type)
        for tensor, array in self._kept:
            g(
                "backend_tensor_set",
                tensor,
                array.ctypes.data_as(c_void_p),
                c_size_t(0),
                c_size_t(array.nbytes),
                result=None,
            )
        allocator = c_void_p(g("gallocr_new", buffer_type))
        if not g("gallocr_alloc_graph", allocator, graph, result=c_bool):
            raise PeerError("ggml has no memory for the graph")
        self._graph, self._backend = graph, c_void_p(g("backend_cpu_init"))
        g("backend_cpu_set_n_threads", self._backend, c_int(threads), result=None)

    def _layer(self, op: Any, graph: c_void_p, tensors: tuple[c_void_p, ...]) -> None:
        qkv, taps, a, b, rate, bias, conv_state, state = tensors
        g, spec, four = ggml(), self.work.spec, 4
        sequences, tokens, kernel, channels = self.work.sequences, self.work.tokens, spec.kernel, spec.channels
        heads, dim, width = spec.value_heads, spec.value_dim, spec.channels * four

        def size(count: int) -> c_size_t:
            return c_size_t(count * four)

        def expand(tensor: c_void_p) -> None:
            g("build_forward_expand", graph, tensor, result=None)

        taken = op("concat", conv_state, qkv, c_int(0))
        length = kernel - 1 + tokens
        last = op(
            "view_3d", taken, kernel - 1, channels, sequences, size(length), size(length * channels), size(tokens)
        )
        expand(op("cpy", last, conv_state))
        mixed = op("silu", op("ssm_conv", taken, taps))

        def part(first: int, count: int, each: int) -> c_void_p:
            strides = (size(each), c_size_t(width), c_size_t(width * tokens))
            return op("view_4d", mixed, each, count, tokens, sequences, *strides, size(first))

        keys = spec.key_heads * spec.key_dim
        q, k = (op("l2_norm", part(i * keys, spec.key_heads, spec.key_dim), c_float(1e-6)) for i in (0, 1))
        v = part(2 * keys, heads, dim)
        gate = op("neg", op("mul", op("softplus", op("add", a, bias)), rate))
        found = op("gated_delta_net", q, k, v, gate, op("sigmoid", b), state, 1)
        square, done = dim * dim, dim * heads * tokens * sequences
        strides = (size(dim), size(square), size(square * heads))
        after = op("view_4d", found, dim, dim, heads, sequences, *strides, size(done))
        expand(op("cpy", after, state))
        self._y_at, self._y_shape = found, (sequences * tokens, heads, dim)

    def run(self) -> None:
        status = ggml()("backend_graph_compute", self._backend, self._graph, result=c_int)
        if status != 0:
            raise PeerError(f"ggml_backend_graph_compute gave {status} (allowed: 0)")

    def y(self) -> Array:
        y = np.empty(self._y_shape, np.float32)
        target = y.ctypes.data_as(c_void_p)
        ggml()("backend_tensor_get", self._y_at, target, c_size_t(0), c_size_t(y.nbytes), result=None)
        ordered = np.empty_like(y)
        ordered[:, self._order] = y
        return ordered.reshape(len(y), -1)
