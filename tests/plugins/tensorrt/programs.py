"""Programs for the recording driver, and what it must see of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from hypothesis import strategies as st

from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.program import (
    ALIGNMENT,
    ARGUMENTS,
    TOKENS,
    Argument,
    Fill,
    Image,
    Kernel,
    Launch,
    Program,
    TensorMap,
    Variant,
)
from moevlm.plugins.gpu.sizes import (
    ONE,
    SYMBOLS,
    Count,
    Linear,
    M,
    N,
    P,
    Sizes,
    Symbol,
    T,
    Tensor,
    at_most,
    fixed,
    per_token,
)
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.dtypes import DTYPES
from tests.plugins.tensorrt.fake_cuda import image

EXPERTS = ExpertsOp(ExpertsSpec(), experts=8, top_k=2, hidden=12, inner=6, dtype="float16", has_biases=True)
ROUTER = RouterOp(RouterSpec(top_k=2), experts=8, has_bias=True)
MAX_TOKENS = 4096
LARGEST = {"T": MAX_TOKENS, "N": 64, "M": 100, "P": 5000}


@dataclass(frozen=True)
class Attention:
    """An op with every symbol, a dimension of one more than a symbol, and an input that is written."""

    name = "PagedAttention"
    inputs = (
        Tensor("qkv", "bfloat16", (T, 24)),
        Tensor("key_cache", "bfloat16", (P, 2, 64, 4), written=True),
        Tensor("query_start", "int32", (N + 1,)),
        Tensor("context_len", "int32", (N,)),
        Tensor("page_table", "int32", (N, M)),
    )
    outputs = (Tensor("y", "bfloat16", (T, 16)), Tensor("rows", "int32", (N,)))


ATTENTION = Attention()


def sizes_at(tokens: int) -> dict[str, int]:
    """Sizes that rise with the number of tokens."""
    return {"T": tokens, "N": min(tokens, 64), "M": min(tokens, 7), "P": 2 * tokens}


KINDS = {kind: "*i8" for kind in ARGUMENTS} | {"symbol": "i32", "constant": "i32", "tensor_map": "map"}


def kernel(entry: str, kinds: Sequence[str], warps: int = 4, shared: int = 0) -> Kernel:
    """Takes arguments of these kinds."""
    return Kernel(entry, warps, shared, len(kinds), image(entry, [KINDS[kind] for kind in kinds]))


def experts_program(sms: Sequence[int] = (86, 89), max_tokens: int = MAX_TOKENS) -> Program:
    """One with every kind of argument, a fill, and three variants."""
    few = kernel("few", ("input", "input", "output", "symbol"), warps=1)
    sort = kernel("sort", ("input", "workspace", "constant", "null"), warps=8, shared=49152)
    grouped = kernel("grouped", ("input", "workspace", "workspace", "output", "symbol"), shared=98304)
    few_arguments = (Argument("input", 3), Argument("input", 0), Argument("output"), TOKENS)
    sort_arguments = (Argument("input", 1), Argument("workspace", 1), Argument("constant", 64), Argument("null"))
    grouped_arguments = (
        *(Argument("input", 0), Argument("workspace", 0), Argument("workspace", 2)),
        *(Argument("output"), TOKENS),
    )
    blocks = per_token(2, 8 * 63, 64, Linear(T=2))
    variants = (
        Variant((at_most(4),), (), (Launch(0, (per_token(2), ONE, ONE), few_arguments),)),
        Variant(
            (at_most(64),),
            (per_token(24), fixed(64), per_token(8)),
            (
                Fill(1, 0, fixed(16)),
                Launch(1, (ONE, ONE, ONE), sort_arguments),
                Launch(2, (per_token(2, 0, 16), fixed(3), ONE), grouped_arguments),
            ),
        ),
        Variant(
            (at_most(max_tokens),),
            (per_token(24), fixed(64), per_token(8 * 2, 8 * 8 * 63, 64, Linear(T=16))),
            (
                Fill(1, 0xFFFFFFFF, fixed(7)),
                Launch(1, (per_token(2, 0, 1024), ONE, ONE), sort_arguments),
                Launch(2, (blocks, ONE, fixed(2)), grouped_arguments),
            ),
        ),
    )
    images = tuple(Image(sm, (few, sort, grouped), variants) for sm in sms)
    return Program(EXPERTS.name, EXPERTS.inputs, EXPERTS.outputs, images)


def router_program(sms: Sequence[int] = (86,)) -> Program:
    """One launch, whatever the number of tokens."""
    route = kernel("route", ("input", "input", "output", "output"), warps=1)
    arguments = tuple(Argument(kind, index) for kind in ("input", "output") for index in range(2))
    variant = Variant((at_most(MAX_TOKENS),), (), (Launch(0, (per_token(1), ONE, ONE), arguments),))
    return Program(ROUTER.name, ROUTER.inputs, ROUTER.outputs, tuple(Image(sm, (route,), (variant,)) for sm in sms))


def attention_program(sms: Sequence[int] = (86, 90)) -> Program:
    """A variant for steps of one token per sequence, and one for all; from SM 9.0 on a launch overlaps."""
    append = kernel("append", ("input", "input", "input", "symbol", "symbol"), warps=2)
    attend = kernel("attend", ("input", "input", "input", "workspace", "output", "symbol", "symbol", "symbol"))
    merge = kernel("merge", ("workspace", "output", "output"), warps=1)
    inputs = [Argument("input", i) for i in range(5)]
    t, n, m, p = (Argument("symbol", i) for i in range(4))
    largest = tuple(at_most(LARGEST[symbol], symbol) for symbol in "TN")
    per_sequence = Count(Linear(N=1))
    images = []
    for sm in sms:
        appends = Launch(0, (per_token(1), ONE, fixed(2)), (*inputs[:3], t, p))
        attends = (inputs[1], inputs[4], inputs[3], Argument("workspace"), Argument("output"), n, m, p)
        merges = (Argument("workspace"), Argument("output"), Argument("output", 1))
        decode = Variant(
            (Linear(T=1, N=-1), *largest),
            (Count(Linear(N=4 * 8 * 16)),),
            (
                appends,
                Launch(1, (per_sequence, fixed(2), fixed(8)), attends, overlaps=sm >= 90),
                Launch(2, (per_sequence, ONE, ONE), merges, overlaps=sm >= 90),
            ),
        )
        blocks = Count(Linear(15, T=1, N=16), 16, Linear(T=1, N=1))
        mixed = Variant(
            largest,
            (Count(Linear(T=16, N=16)),),
            (Fill(0, 0, Count(Linear(T=2, N=1))), appends, Launch(1, (blocks, fixed(2), ONE), attends)),
        )
        images.append(Image(sm, (append, attend, merge), (decode, mixed)))
    return Program(ATTENTION.name, ATTENTION.inputs, ATTENTION.outputs, tuple(images))


@dataclass(frozen=True)
class Mapped:
    """An op with rows that are whole units of what the tensor memory accelerator loads."""

    name = "MoEExperts"
    inputs = (Tensor("x", "float16", (T, 64)), Tensor("gate_up", "bfloat16", (8, 32, 64)))
    outputs = (Tensor("y", "float32", (T, 64)),)


def mapped_program(sms: Sequence[int] = (90, 100)) -> Program:
    """A kernel that takes an input, a workspace buffer and part of an output as tensor maps."""
    product = kernel("product", ("tensor_map", "tensor_map", "null", "tensor_map", "tensor_map", "symbol"))
    maps = (
        TensorMap(Argument("input"), "float16", Linear(T=1), (64,), (32, 64), 128),
        TensorMap(Argument("input", 1), "bfloat16", Linear(8), (32, 64), (1, 16, 32), 64),
        TensorMap(Argument("workspace", 1), "int8", Linear(T=2), (48,), (256, 16)),
        TensorMap(Argument("output"), "float32", Linear(T=1), (2, 2, 4, 4), (1, 1, 2, 4, 4), 32),
    )
    x, gate_up, buffer, y = (Argument("tensor_map", i) for i in range(4))
    arguments = (gate_up, x, Argument("null"), buffer, y, TOKENS)
    steps = (Launch(0, (per_token(1), ONE, ONE), arguments),)
    variant = Variant((at_most(MAX_TOKENS),), (fixed(100), per_token(96)), steps, maps)
    op = Mapped()
    return Program(op.name, op.inputs, op.outputs, tuple(Image(sm, (product,), (variant,)) for sm in sms))


def expected_map(tensor: TensorMap, address: int, sizes: Sizes) -> dict[str, Any]:
    """As the driver has it: dimensions from the last one on, strides in bytes."""
    width = DTYPES[tensor.dtype].bytes
    shape = tensor.shape(sizes)
    return {
        "address": address,
        "element_type": {"float16": 6, "float32": 7, "bfloat16": 9, "int32": 3}.get(tensor.dtype, 0),
        "sizes": [*reversed(shape)],
        "strides": [width * prod(shape[-i:]) for i in range(1, len(shape))],
        "block": [*reversed(tensor.block)],
        "swizzle": (0, 32, 64, 128).index(tensor.swizzle),
    }


def expected_calls(
    program: Program, sm: int, sizes: Sizes, inputs: Sequence[int], outputs: Sequence[int], workspace: int
) -> list[tuple[str, dict[str, Any]]]:
    """The driver's calls of one execution: their names, and the values that say what the GPU does."""
    (gpu,) = (each for each in program.images if each.sm == sm)
    variant = gpu.variant(sizes)
    buffers, end = [], workspace
    for buffer in variant.buffers:
        buffers.append(end)
        end += -(-buffer.at(sizes) // ALIGNMENT) * ALIGNMENT
    symbols = [sizes[symbol] for symbol in SYMBOLS]
    values: dict[str, Sequence[Any]] = {"input": inputs, "output": outputs, "workspace": buffers, "symbol": symbols}
    values["tensor_map"] = [expected_map(m, values[m.source.kind][m.source.index], sizes) for m in variant.maps]
    calls: list[tuple[str, dict[str, Any]]] = []
    for step in variant.steps:
        if isinstance(step, Fill):
            if words := step.words.at(sizes):
                fill = {"address": buffers[step.buffer], "value": step.value, "words": words}
                calls.append(("cuMemsetD32Async", fill))
            continue
        launched = gpu.kernels[step.kernel]
        arguments = [
            values[a.kind][a.index] if a.kind in values else {"null": 0}.get(a.kind, a.index) for a in step.arguments
        ]
        launch = {
            "entry": launched.entry,
            "grid": [count.at(sizes) for count in step.grid],
            "block": [32 * launched.warps, 1, 1],
            "shared": launched.shared,
            "arguments": arguments,
        }
        calls.append(("cuLaunchKernelEx" if step.overlaps else "cuLaunchKernel", launch))
    return calls


def _symbols(tensors: Sequence[Tensor]) -> list[str]:
    return sorted({dim.name for tensor in tensors for dim in tensor.shape if isinstance(dim, Symbol)})


def _linear(symbols: Sequence[str], slope: st.SearchStrategy[int], offset: st.SearchStrategy[int]) -> Any:
    return st.builds(Linear, offset, **{symbol: slope for symbol in symbols})


def _counts(least: int, most: int, symbols: Sequence[str]) -> st.SearchStrategy[Count]:
    """Counts within these bounds for sizes from 1 to LARGEST."""

    def fits(count: Count) -> bool:
        return least <= count.at(dict.fromkeys(SYMBOLS, 1)) and count.at(LARGEST) <= most

    values = st.one_of(
        _linear(symbols, st.integers(0, 9), st.integers(0, 1000)),
        _linear(symbols[-1:], st.integers(0, 100), st.integers(0, 100_000)),
    )
    return st.builds(Count, values, st.integers(1, 300), st.none() | values).filter(fits)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """From 1 to LARGEST, often at an end."""
    return {symbol: draw(st.just(1) | st.integers(1, most) | st.just(most)) for symbol, most in LARGEST.items()}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any that the plugin takes, for compute capability 8.6 or 9.0 and sizes up to LARGEST."""
    op = draw(st.sampled_from([EXPERTS, ROUTER, ATTENTION]))
    sm = draw(st.sampled_from([86, 90]))
    symbols = _symbols(op.inputs)
    largest = tuple(at_most(LARGEST[symbol], symbol) for symbol in symbols)
    kernels: list[Kernel] = []
    variants = []
    for last in (*(False,) * draw(st.integers(0, 3)), True):
        bound = st.builds(at_most, st.integers(1, 100), st.sampled_from(symbols))
        relation = _linear(symbols, st.integers(-3, 3), st.integers(-300, 300))
        bounds = () if last else tuple(draw(st.lists(bound | relation, min_size=1, max_size=2)))
        buffers = tuple(draw(st.lists(_counts(0, 1 << 40, symbols), max_size=4)))
        kinds = ["input", "output", "symbol", "null", "constant", *(["workspace"] if buffers else [])]
        places = {"input": len(op.inputs), "output": len(op.outputs), "workspace": len(buffers), "constant": 1 << 31}
        steps: list[Launch | Fill] = []
        for _ in range(draw(st.integers(0, 4))):
            if buffers and draw(st.booleans()):
                buffer = draw(st.integers(0, len(buffers) - 1))
                words = min(draw(st.integers(0, 1000)), buffers[buffer].at(dict.fromkeys(SYMBOLS, 1)) // 4)
                steps.append(Fill(buffer, draw(st.integers(0, 0xFFFFFFFF)), fixed(words)))
                continue
            chosen = draw(st.lists(st.sampled_from(kinds), max_size=9))
            arguments = tuple(
                Argument(kind, SYMBOLS.index(draw(st.sampled_from(symbols))))
                if kind == "symbol"
                else Argument(kind, draw(st.integers(0, places.get(kind, 1) - 1)))
                for kind in chosen
            )
            grid = draw(st.tuples(_counts(1, 1 << 30, symbols), *(_counts(1, 65535, symbols),) * 2))
            warps, shared = draw(st.integers(1, 32)), draw(st.integers(0, 99 * 1024))
            kernels.append(kernel(f"kernel_{len(kernels)}", chosen, warps, shared))
            steps.append(Launch(len(kernels) - 1, grid, arguments, sm >= 90 and draw(st.booleans())))
        variants.append(Variant((*bounds, *largest), buffers, tuple(steps)))
    return Program(op.name, op.inputs, op.outputs, (Image(sm, tuple(kernels), tuple(variants)),))
