"""Programs for the recording driver, and what it must see of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.program import (
    ALIGNMENT,
    ARGUMENTS,
    ONE,
    TOKENS,
    Argument,
    Count,
    Fill,
    Image,
    Kernel,
    Launch,
    Linear,
    Program,
    Variant,
    at_most,
    fixed,
    per_token,
)
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from tests.plugins.tensorrt.fake_cuda import image

EXPERTS = ExpertsOp(ExpertsSpec(), experts=8, top_k=2, hidden=12, inner=6, dtype="float16", has_biases=True)
ROUTER = RouterOp(RouterSpec(top_k=2), experts=8, has_bias=True)
MAX_TOKENS = 4096
KINDS = {kind: "*i8" for kind in ARGUMENTS} | {"symbol": "i32", "constant": "i32"}


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


def expected_calls(
    program: Program, sm: int, tokens: int, inputs: Sequence[int], outputs: Sequence[int], workspace: int
) -> list[tuple[str, dict[str, Any]]]:
    """The driver's calls of one execution: their names, and the values that say what the GPU does."""
    (gpu,) = (each for each in program.images if each.sm == sm)
    sizes = {"T": tokens}
    variant = gpu.variant(sizes)
    buffers, end = [], workspace
    for buffer in variant.buffers:
        buffers.append(end)
        end += -(-buffer.at(sizes) // ALIGNMENT) * ALIGNMENT
    values = {"input": inputs, "output": outputs, "workspace": buffers}
    calls: list[tuple[str, dict[str, Any]]] = []
    for step in variant.steps:
        if isinstance(step, Fill):
            if words := step.words.at(sizes):
                fill = {"address": buffers[step.buffer], "value": step.value, "words": words}
                calls.append(("cuMemsetD32Async", fill))
            continue
        launched = gpu.kernels[step.kernel]
        scalars = {"symbol": tokens, "null": 0}
        arguments = [
            values[a.kind][a.index] if a.kind in values else scalars.get(a.kind, a.index) for a in step.arguments
        ]
        launch = {
            "entry": launched.entry,
            "grid": [count.at(sizes) for count in step.grid],
            "block": [32 * launched.warps, 1, 1],
            "shared": launched.shared,
            "arguments": arguments,
        }
        calls.append(("cuLaunchKernel", launch))
    return calls


def _counts(least: int, most: int) -> st.SearchStrategy[Count]:
    """Counts within these bounds for 1 to MAX_TOKENS tokens."""

    def fits(count: Count) -> bool:
        return least <= count.at({"T": 1}) and count.at({"T": MAX_TOKENS}) <= most

    slope, offset = st.integers(0, 1000), st.integers(0, 100_000)
    limited = st.builds(per_token, slope, offset, st.integers(1, 300), st.builds(Linear, offset, slope))
    unlimited = st.builds(per_token, slope, offset, st.integers(1, 300))
    return st.one_of(limited, unlimited).filter(fits)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any that the plugin takes, for compute capability 8.6 and up to MAX_TOKENS tokens."""
    op = draw(st.sampled_from([EXPERTS, ROUTER]))
    limits = sorted(draw(st.sets(st.integers(1, MAX_TOKENS - 1), max_size=3)))
    kernels: list[Kernel] = []
    variants = []
    for max_tokens in (*limits, MAX_TOKENS):
        buffers = tuple(draw(st.lists(_counts(0, 1 << 40), max_size=4)))
        kinds = ["input", "output", "symbol", "null", "constant", *(["workspace"] if buffers else [])]
        places = {"input": len(op.inputs), "output": len(op.outputs), "workspace": len(buffers), "constant": 1 << 31}
        steps: list[Launch | Fill] = []
        for _ in range(draw(st.integers(0, 4))):
            if buffers and draw(st.booleans()):
                buffer = draw(st.integers(0, len(buffers) - 1))
                words = min(draw(st.integers(0, 1000)), buffers[buffer].at({"T": 1}) // 4)
                steps.append(Fill(buffer, draw(st.integers(0, 0xFFFFFFFF)), fixed(words)))
                continue
            chosen = draw(st.lists(st.sampled_from(kinds), max_size=9))
            arguments = tuple(Argument(kind, draw(st.integers(0, places.get(kind, 1) - 1))) for kind in chosen)
            grid = draw(st.tuples(_counts(1, 1 << 30), _counts(1, 65535), _counts(1, 65535)))
            warps, shared = draw(st.integers(1, 32)), draw(st.integers(0, 99 * 1024))
            kernels.append(kernel(f"kernel_{len(kernels)}", chosen, warps, shared))
            steps.append(Launch(len(kernels) - 1, grid, arguments))
        variants.append(Variant((at_most(max_tokens),), buffers, tuple(steps)))
    return Program(op.name, op.inputs, op.outputs, (Image(86, tuple(kernels), tuple(variants)),))
