"""Programs for the recording driver, and what it must see of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from moevlm.plugins.gpu.ops import ExpertsOp, RouterOp
from moevlm.plugins.gpu.program import (
    ALIGNMENT,
    ARGUMENTS,
    ONE,
    Argument,
    Count,
    Fill,
    Image,
    Kernel,
    Launch,
    Program,
    Variant,
)
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from tests.plugins.tensorrt.fake_cuda import image

EXPERTS = ExpertsOp(ExpertsSpec(), experts=8, top_k=2, hidden=12, inner=6, dtype="float16", has_biases=True)
ROUTER = RouterOp(RouterSpec(top_k=2), experts=8, has_bias=True)
MAX_TOKENS = 4096
KINDS = {kind: "*i8" for kind in ARGUMENTS} | {"tokens": "i32", "constant": "i32"}


def kernel(entry: str, kinds: Sequence[str], warps: int = 4, shared: int = 0) -> Kernel:
    """Takes arguments of these kinds."""
    return Kernel(entry, warps, shared, len(kinds), image(entry, [KINDS[kind] for kind in kinds]))


def experts_program(sms: Sequence[int] = (86, 89), max_tokens: int = MAX_TOKENS) -> Program:
    """One with every kind of argument, a fill, and three variants."""
    few = kernel("few", ("input", "input", "output", "tokens"), warps=1)
    sort = kernel("sort", ("input", "workspace", "constant", "null"), warps=8, shared=49152)
    grouped = kernel("grouped", ("input", "workspace", "workspace", "output", "tokens"), shared=98304)
    few_arguments = (Argument("input", 3), Argument("input", 0), Argument("output"), Argument("tokens"))
    sort_arguments = (Argument("input", 1), Argument("workspace", 1), Argument("constant", 64), Argument("null"))
    grouped_arguments = (
        *(Argument("input", 0), Argument("workspace", 0), Argument("workspace", 2)),
        *(Argument("output"), Argument("tokens")),
    )
    blocks = Count(2, 8 * 63, 64, 2, 0)
    variants = (
        Variant(4, (), (Launch(0, (Count(2), ONE, ONE), few_arguments),)),
        Variant(
            64,
            (Count(24), Count(offset=64), Count(8)),
            (
                Fill(1, 0, Count(offset=16)),
                Launch(1, (ONE, ONE, ONE), sort_arguments),
                Launch(2, (Count(2, 0, 16), Count(offset=3), ONE), grouped_arguments),
            ),
        ),
        Variant(
            max_tokens,
            (Count(24), Count(offset=64), Count(8 * 2, 8 * 8 * 63, 64, 16, 0)),
            (
                Fill(1, 0xFFFFFFFF, Count(offset=7)),
                Launch(1, (Count(2, 0, 1024), ONE, ONE), sort_arguments),
                Launch(2, (blocks, ONE, Count(offset=2)), grouped_arguments),
            ),
        ),
    )
    images = tuple(Image(sm, (few, sort, grouped), variants) for sm in sms)
    return Program(EXPERTS.name, EXPERTS.inputs, EXPERTS.outputs, images)


def router_program(sms: Sequence[int] = (86,)) -> Program:
    """One launch, whatever the number of tokens."""
    route = kernel("route", ("input", "input", "output", "output"), warps=1)
    arguments = tuple(Argument(kind, index) for kind in ("input", "output") for index in range(2))
    variant = Variant(MAX_TOKENS, (), (Launch(0, (Count(1), ONE, ONE), arguments),))
    return Program(ROUTER.name, ROUTER.inputs, ROUTER.outputs, tuple(Image(sm, (route,), (variant,)) for sm in sms))


def expected_calls(
    program: Program, sm: int, tokens: int, inputs: Sequence[int], outputs: Sequence[int], workspace: int
) -> list[tuple[str, dict[str, Any]]]:
    """The driver's calls of one execution: their names, and the values that say what the GPU does."""
    (gpu,) = (each for each in program.images if each.sm == sm)
    variant = gpu.variant(tokens)
    buffers, end = [], workspace
    for buffer in variant.buffers:
        buffers.append(end)
        end += -(-buffer.at(tokens) // ALIGNMENT) * ALIGNMENT
    values = {"input": inputs, "output": outputs, "workspace": buffers}
    calls: list[tuple[str, dict[str, Any]]] = []
    for step in variant.steps:
        if isinstance(step, Fill):
            if words := step.words.at(tokens):
                fill = {"address": buffers[step.buffer], "value": step.value, "words": words}
                calls.append(("cuMemsetD32Async", fill))
            continue
        launched = gpu.kernels[step.kernel]
        scalars = {"tokens": tokens, "null": 0}
        arguments = [
            values[a.kind][a.index] if a.kind in values else scalars.get(a.kind, a.index) for a in step.arguments
        ]
        launch = {
            "entry": launched.entry,
            "grid": [count.at(tokens) for count in step.grid],
            "block": [32 * launched.warps, 1, 1],
            "shared": launched.shared,
            "arguments": arguments,
        }
        calls.append(("cuLaunchKernel", launch))
    return calls


def _counts(least: int, most: int) -> st.SearchStrategy[Count]:
    """Counts within these bounds for 1 to MAX_TOKENS tokens."""

    def fits(count: Count) -> bool:
        return least <= count.at(1) and count.at(MAX_TOKENS) <= most

    slope, offset = st.integers(0, 1000), st.integers(0, 100_000)
    limited = st.builds(Count, slope, offset, st.integers(1, 300), slope, offset)
    unlimited = st.builds(Count, slope, offset, st.integers(1, 300))
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
        kinds = ["input", "output", "tokens", "null", "constant", *(["workspace"] if buffers else [])]
        places = {"input": len(op.inputs), "output": len(op.outputs), "workspace": len(buffers), "constant": 1 << 31}
        steps: list[Launch | Fill] = []
        for _ in range(draw(st.integers(0, 4))):
            if buffers and draw(st.booleans()):
                buffer = draw(st.integers(0, len(buffers) - 1))
                words = min(draw(st.integers(0, 1000)), buffers[buffer].at(1) // 4)
                steps.append(Fill(buffer, draw(st.integers(0, 0xFFFFFFFF)), Count(offset=words)))
                continue
            chosen = draw(st.lists(st.sampled_from(kinds), max_size=9))
            arguments = tuple(Argument(kind, draw(st.integers(0, places.get(kind, 1) - 1))) for kind in chosen)
            grid = draw(st.tuples(_counts(1, 1 << 30), _counts(1, 65535), _counts(1, 65535)))
            warps, shared = draw(st.integers(1, 32)), draw(st.integers(0, 99 * 1024))
            kernels.append(kernel(f"kernel_{len(kernels)}", chosen, warps, shared))
            steps.append(Launch(len(kernels) - 1, grid, arguments))
        variants.append(Variant(max_tokens, buffers, tuple(steps)))
    return Program(op.name, op.inputs, op.outputs, (Image(86, tuple(kernels), tuple(variants)),))
