"""The plugin nodes of graphs lowered for TensorRT, as numpy computes them; a program's bytes name its op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from onnx.reference.op_run import OpRun

from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN
from moevlm.export.formats.gpu_packing import unpack
from moevlm.export.formats.registry import weight_format
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.sizes import sizes_of
from moevlm.plugins.ops.attention import attention, cross_attention, segment_attention
from moevlm.plugins.ops.candidates import candidates
from moevlm.plugins.ops.experts import experts
from moevlm.plugins.ops.gated_delta import gated_delta
from moevlm.plugins.ops.router import route, sigmoid
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.states import SCALE_BYTES

_OPS: dict[str, Any] = {}
# How a quantized cache stores a value, and the largest that it holds.
CODES = {"int8": (np.dtype(np.int8), 127.0), "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448.0)}


def named(op: KernelOp) -> bytes:
    """In the place of an op's program: a name under which the evaluator finds the op."""
    name = repr(op)
    _OPS[name] = op
    return name.encode()


def op_named(program: bytes | str) -> Any:
    """The op of such a program."""
    return _OPS[program.decode() if isinstance(program, bytes) else program]


class _Plugin(OpRun):
    op_domain = DOMAIN

    def _run(self, *inputs: np.ndarray, program: str) -> tuple[np.ndarray, ...]:
        op = op_named(program)
        for tensor, array in zip(op.inputs, inputs, strict=True):
            assert array.dtype == DTYPES[tensor.dtype].numpy, tensor.name
        sizes = sizes_of(op.inputs, [array.shape for array in inputs])
        outputs = self.computed(op, {t.name: array for t, array in zip(op.inputs, inputs, strict=True)})
        for tensor, array in zip(op.outputs, outputs, strict=True):
            assert (array.dtype, array.shape) == (DTYPES[tensor.dtype].numpy, tensor.at(sizes)), tensor.name
        return outputs

    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        raise NotImplementedError


class MoERouter(_Plugin):
    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return route(spec=op.spec, **inputs)


class MoEExperts(_Plugin):
    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        x, index, weight, *stored = inputs.values()
        exact = unpacked(op, stored)
        return (experts(x.astype(np.float32), index, weight, spec=op.spec, **exact).astype(x.dtype),)


def unpacked(op: ExpertsOp, arrays: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Weights and biases by name, float32. arrays: as the op stores them."""
    held = dict(zip((tensor.name for tensor in op.inputs[3:]), arrays, strict=True))
    if op.weights:
        form = weight_format(*op.form)
        for name, width in (("gate_up", op.hidden), ("down", op.inner)):
            zeros = held.pop(f"{name}_zero", None)
            row_scales = held.pop(f"{name}_row_scale", None)
            held[name] = unpack(held[name], held.pop(f"{name}_scale"), form, width, zeros, row_scales)
    return {name: array.astype(np.float32) for name, array in held.items()}


class PagedAttention(_Plugin):
    """Writes into the arrays of the caches that it is given."""

    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        spec = op.spec
        ends = np.cumsum([spec.heads * op.key_dim, spec.kv_heads * op.key_dim])
        q, k, v = np.split(inputs.pop("qkv"), ends, axis=1)
        caches = {name: inputs.pop(name) for name in ("key_cache", "value_cache") if name in inputs}
        read = {name: decoded(cache, op.cache) if op.cache else cache for name, cache in caches.items()}
        absent = dict.fromkeys(("cos", "sin", "value_cache", "q_norm", "k_norm", "sinks", "visible_end"))
        stored = (lambda rows: _rounded(rows, op.cache)[0]) if op.cache else (lambda rows: rows)
        given = absent | inputs | read
        y, *written = attention(q, k, v if spec.has_values else None, spec=spec, stored=stored, **given)
        for name, after in zip(("key_cache", "value_cache"), written, strict=True):
            if after is not None:
                _write(caches[name], after, inputs, op)
        return (y,)


def _write(cache: np.ndarray, after: np.ndarray, step: dict[str, np.ndarray], op: Any) -> None:
    """The rows that a step wrote."""
    for page, row in written_rows(step, op.page_size):
        if not op.cache:
            cache[page, :, row] = after[page, :, row]
            continue
        codes, scales = _blocks(cache, op.cache)
        _, codes[page, :, row], scales[page, :, row] = _rounded(after[page, :, row], op.cache)


def written_rows(step: dict[str, np.ndarray], page_size: int) -> list[tuple[int, int]]:
    """Page and row in it of each token of a step."""
    starts, table = step["query_start"], step["page_table"]
    return [
        (int(table[n, position // page_size]), position % page_size)
        for n, context in enumerate(step["context_len"])
        for position in range(context, context + starts[n + 1] - starts[n])
    ]


def _blocks(cache: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Views of a quantized cache: codes [P, heads, page, D], and behind them scales [P, heads, page] float32."""
    pages, heads, page, width = cache.shape
    blocks = cache.reshape(pages, heads, page * width)
    dim = width - SCALE_BYTES
    codes = blocks[..., : page * dim].view(CODES[kind][0]).reshape(pages, heads, page, dim)
    return codes, blocks[..., page * dim :].view(np.float32)


def decoded(cache: np.ndarray, kind: str) -> np.ndarray:
    """The values of a quantized cache, [P, heads, page, D] float32."""
    codes, scales = _blocks(cache, kind)
    return codes.astype(np.float32) * scales[..., None]


def _rounded(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values [..., D] as they are stored: read again, codes, scales [...]."""
    dtype, largest = CODES[kind]
    scales = (np.abs(rows).max(axis=-1) / np.float32(largest)).astype(np.float32)
    exact = rows / np.where(scales, scales, 1)[..., None]
    codes = (np.rint(exact) if kind == "int8" else exact).astype(dtype)
    return codes.astype(np.float32) * scales[..., None], codes, scales


def encoded(cache: np.ndarray, kind: str) -> np.ndarray:
    """A float32 cache [P, heads, page, D] as a quantized one, [P, heads, page, D + 4] int8."""
    made = np.zeros((*cache.shape[:-1], cache.shape[-1] + SCALE_BYTES), np.int8)
    codes, scales = _blocks(made, kind)
    _, codes[:], scales[:] = _rounded(cache, kind)
    return made


class SegmentAttention(_Plugin):
    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        q, k, v = np.split(inputs.pop("qkv"), 3, axis=1)
        tables = {"cos": None, "sin": None}
        return (segment_attention(q, k, v, heads=op.heads, **tables | inputs),)


class CrossAttention(_Plugin):
    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        k, v = np.split(inputs["kv"], 2, axis=1)
        return (cross_attention(inputs["q"], k, v, inputs["image_start"], op.heads),)


class GatedDelta(_Plugin):
    """Writes into the arrays of the states that it is given, but into row 0."""

    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        spec = op.spec
        ends = spec.channels + spec.value_heads * np.arange(3)
        qkv, a, b, _ = np.split(inputs.pop("x"), ends, axis=1)
        y, *after = gated_delta(qkv, a, b, spec=spec, **inputs)
        rows = inputs["state_row"][(np.diff(inputs["query_start"]) > 0) & (inputs["state_row"] > 0)]
        for name, state in zip(("conv_state", "delta_state"), after, strict=True):
            inputs[name][rows] = state[rows]
        return (y,)


class Candidates(_Plugin):
    def computed(self, op: Any, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return candidates(inputs["logits"], op.count)


class TRT_MoE(OpRun):
    """As TensorRT documents its MoE layer: [B, S, H], weights [E, H, I], [E, H, I], [E, I, H]."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, index: np.ndarray, scores: np.ndarray, *weights: np.ndarray, activation_type: int
    ) -> Any:
        assert activation_type == 1
        assert {scores.dtype, *(w.dtype for w in weights)} == {x.dtype}
        gate, up, down, *biases = (w.astype(np.float64) for w in weights)
        y = np.zeros(x.shape, np.float64)
        for place in np.ndindex(*index.shape):
            e, row = index[place], x[place[:2]].astype(np.float64)
            inner, other = row @ gate[e], row @ up[e]
            if biases:
                inner, other = inner + biases[0][e], other + biases[1][e]
            out = (inner * sigmoid(inner) * other) @ down[e]
            y[place[:2]] += float(scores[place]) * (out + biases[2][e] if biases else out)
        return (y.astype(x.dtype),)


NODES = (MoERouter, MoEExperts, PagedAttention, SegmentAttention, CrossAttention, GatedDelta, Candidates, TRT_MoE)
