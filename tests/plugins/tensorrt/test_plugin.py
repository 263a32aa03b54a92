"""The plugins, from their creation to the calls that reach the driver."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.plugin_harness import BUILD, CHAR, INT8, INT32, DynamicTensorDesc, Io, Plugin, PluginError, PluginLibrary
from moevlm.plugins.gpu.program import Fill, Image, Program, Variant
from moevlm.plugins.gpu.sizes import (
    LARGEST_SIZES,
    SYMBOLS,
    TENSOR_DTYPES,
    Count,
    Linear,
    Sizes,
    Tensor,
    at_most,
    fixed,
    per_token,
)
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.names import PLUGINS
from tests.plugins.tensorrt.fake_cuda import FakeCuda
from tests.plugins.tensorrt.programs import (
    MAX_TOKENS,
    attention_program,
    expected_calls,
    experts_program,
    mapped_program,
    programs,
    router_program,
    sizes,
    sizes_at,
)

WORKSPACE = 1 << 40
STREAM = 77
ON_STREAM = ("cuLaunchKernel", "cuLaunchKernelEx", "cuMemsetD32Async")
PROGRAMS = {
    "MoEExperts": experts_program(),
    "MoERouter": router_program(),
    "PagedAttention": attention_program(),
}


def io_of(program: Program, least: int, most: int | None = None) -> Io:
    return Io.of(program.inputs, program.outputs, sizes_at(least), sizes_at(most or least))


def create(library: PluginLibrary, program: Program) -> Plugin:
    return library.plugin(program.op, program.to_bytes())


def addresses(program: Program) -> tuple[list[int], list[int]]:
    inputs = [(1 << 33) + (i << 20) for i in range(len(program.inputs))]
    return inputs, [(1 << 34) + (i << 20) for i in range(len(program.outputs))]


def execute(
    plugin: Plugin, program: Program, at: int | Sizes, workspace: int = WORKSPACE, stream: int = STREAM
) -> None:
    inputs, outputs = addresses(program)
    io = Io.of(program.inputs, program.outputs, sizes_at(at) if isinstance(at, int) else at)
    plugin.shape_change(io)
    plugin.enqueue(io, inputs, outputs, workspace, stream)


def executed(cuda: FakeCuda, context: int | None = None, thread: int = 0) -> list[tuple[str, dict[str, object]]]:
    """The driver's calls on the stream, without what tells one execution from another."""
    events = [event for event in cuda.events() if event.call in ON_STREAM]
    return [
        (event.call, {name: value for name, value in event.values.items() if name not in ("stream", "module")})
        for event in events
        if event.thread == thread and (context is None or event.context == context)
    ]


def test_library_has_a_plugin_for_every_op(library: PluginLibrary) -> None:
    assert library.ops() == PLUGINS


@pytest.mark.parametrize("op", PROGRAMS)
def test_plugins_say_who_they_are(library: PluginLibrary, op: str) -> None:
    plugin = create(library, PROGRAMS[op])
    kinds = ["PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
    assert plugin.identity() == [op, "1", "", *kinds]
    assert library.field_names(op) == ["program"]
    plugin.close()


@pytest.mark.parametrize("op", PROGRAMS)
def test_outputs_are_those_of_the_program(library: PluginLibrary, op: str) -> None:
    program = PROGRAMS[op]
    plugin = create(library, program)
    inputs, outputs = (
        [DTYPES[tensor.dtype].tensorrt_number for tensor in side] for side in (program.inputs, program.outputs)
    )
    assert plugin.output_types(inputs) == outputs
    sizes = {"T": 17, "N": 5, "M": 3, "P": 9}
    shapes = [list(t.at(sizes)) for t in program.inputs]
    assert plugin.output_shapes(shapes) == [t.at(sizes) for t in program.outputs]
    plugin.close()


@pytest.mark.parametrize("op", PROGRAMS)
def test_only_linear_tensors_of_the_right_dtype_are_supported(library: PluginLibrary, op: str) -> None:
    program = PROGRAMS[op]
    plugin = create(library, program)
    tensors = (*program.inputs, *program.outputs)
    for position, tensor in enumerate(tensors):
        for dtype in TENSOR_DTYPES:
            for layout in (0, 1):
                io = io_of(program, 4)
                described = [*io.inputs, *io.outputs]
                described[position] = DynamicTensorDesc.of(dtype, (4,), (4,), layout)
                changed = Io(described[: len(io.inputs)], described[len(io.inputs) :])
                assert plugin.supports(position, changed) == (dtype == tensor.dtype and layout == 0)
    plugin.close()


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 33, 64, 65, 700, MAX_TOKENS])
@pytest.mark.parametrize("op", PROGRAMS)
def test_launches_are_those_of_the_program(library: PluginLibrary, cuda: FakeCuda, op: str, tokens: int) -> None:
    program = PROGRAMS[op]
    plugin = create(library, program)
    plugin.configure(io_of(program, 1, MAX_TOKENS))
    context = plugin.attach()
    execute(context, program, tokens)
    inputs, outputs = addresses(program)
    assert executed(cuda) == expected_calls(program, 86, sizes_at(tokens), inputs, outputs, WORKSPACE)
    context.close()
    plugin.close()


@given(program=programs(), executions=st.lists(sizes(), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_any_program_runs_as_python_says(
    shared_library: PluginLibrary, shared_cuda: FakeCuda, program: Program, executions: list[Sizes]
) -> None:
    (image,) = program.images
    shared_cuda.reset()
    shared_cuda.set_sm(image.sm)
    plugin = create(shared_library, program)
    least, most = ({symbol: which(at[symbol] for at in executions) for symbol in SYMBOLS} for which in (min, max))
    profile = Io.of(program.inputs, program.outputs, least, most)
    plugin.configure(profile)
    reported = plugin.workspace(profile)
    context = plugin.attach()
    for at in executions:
        execute(context, program, at)
        inputs, outputs = addresses(program)
        assert executed(shared_cuda) == expected_calls(program, image.sm, at, inputs, outputs, WORKSPACE)
        assert image.variant(at).workspace(at) <= reported
    context.close()
    plugin.close()
    assert shared_cuda.loaded() == 0


def test_workspace_is_the_most_that_any_gpu_and_number_of_tokens_needs(library: PluginLibrary) -> None:
    base = experts_program((86,))
    hungry = Variant((at_most(9),), (fixed(1 << 20),), ())  # for few tokens, and needs more than those for many
    images = (*base.images, Image(89, (), (hungry, Variant((at_most(MAX_TOKENS),), (per_token(1 << 10),), ()))))
    program = replace(base, images=images)
    plugin = create(library, program)
    for most in (1, 4, 5, 9, 10, 64, 65, 700, 2000, MAX_TOKENS):
        every = [{"T": tokens} for tokens in range(1, most + 1)]
        needed = (image.variant(sizes).workspace(sizes) for sizes in every for image in program.images)
        assert plugin.workspace(io_of(program, 1, most)) == max(needed)
    plugin.close()


def test_workspace_is_for_what_a_variants_bounds_let_through(library: PluginLibrary) -> None:
    def taking(*variants: Variant) -> Program:
        return replace(PROGRAMS["PagedAttention"], images=(Image(86, (), variants),))

    decode = Variant((Linear(T=1, N=-1), at_most(16, "N")), (Count(Linear(T=4096)),), ())
    long = Variant((Linear(2000, T=-1), at_most(64, "N")), (Count(Linear(N=1 << 20)),), ())
    rest = Variant((at_most(MAX_TOKENS),), (Count(Linear(T=256)),), ())
    for variants, most, expected in (
        ((decode, rest), {"T": 100, "N": 16}, 16 * 4096),  # T <= N <= 16
        ((decode, rest), {"T": 5, "N": 16}, 5 * 4096),
        ((decode, rest), {"T": 4096, "N": 8}, 4096 * 256),
        ((long, rest), {"T": 1999, "N": 8}, 1999 * 256),  # never long
        ((long, rest), {"T": 2000, "N": 8}, 8 << 20),
        ((rest, long), {"T": 2000, "N": 8}, 2000 * 256),  # long is never reached
    ):
        program = taking(*variants)
        plugin = create(library, program)
        least = {"T": 1, "N": 1, "M": 1, "P": 1}
        assert plugin.workspace(Io.of(program.inputs, program.outputs, least, least | most)) == expected
        plugin.close()


def test_a_variant_without_bounds_is_for_the_largest_sizes(library: PluginLibrary) -> None:
    program = replace(PROGRAMS["PagedAttention"], images=(Image(86, (), (Variant((), (), ()),)),))
    plugin = create(library, program)
    plugin.configure(Io.of(program.inputs, program.outputs, dict.fromkeys(SYMBOLS, 1), LARGEST_SIZES))
    for symbol, tensor in zip("TNMP", ("qkv", "query_start", "page_table", "key_cache"), strict=True):
        most = LARGEST_SIZES[symbol]
        io = Io.of(program.inputs, program.outputs, {**LARGEST_SIZES, symbol: most + 1})
        message = rf"^PagedAttention: input {tensor} has {symbol} = {most + 1} \(allowed: 1 to {most}\)$"
        with pytest.raises(PluginError, match=message):
            plugin.configure(io)
    plugin.close()


def test_the_first_variant_that_holds_is_run(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["PagedAttention"]
    plugin = create(library, program).attach()
    entries = {}
    for tokens, sequences in ((1, 1), (64, 64), (2, 1), (65, 64)):
        execute(plugin, program, {"T": tokens, "N": sequences, "M": 3, "P": 9})
        entries[tokens, sequences] = [values["entry"] for call, values in executed(cuda) if call != "cuMemsetD32Async"]
    decode, mixed = ["append", "attend", "merge"], ["append", "attend"]
    assert entries == {(1, 1): decode, (64, 64): decode, (2, 1): mixed, (65, 64): mixed}
    plugin.close()


def test_a_launch_overlaps_the_one_before_it_where_the_program_says_so(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["PagedAttention"]
    cuda.set_sm(90)
    plugin = create(library, program).attach()
    execute(plugin, program, 64)
    inputs, outputs = addresses(program)
    calls = executed(cuda)
    assert calls == expected_calls(program, 90, sizes_at(64), inputs, outputs, WORKSPACE)
    assert [call for call, _ in calls] == ["cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchKernelEx"]
    with (
        cuda.failing("cuLaunchKernelEx", 719),
        pytest.raises(PluginError, match=r"^PagedAttention: cuLaunchKernelEx of attend: CUDA_ERROR_LAUNCH_FAILED"),
    ):
        execute(plugin, program, 64)
    plugin.close()


def test_tensor_maps_are_encoded_when_an_address_or_a_size_changes(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = mapped_program()
    cuda.set_sm(90)
    plugin = create(library, program).attach()
    inputs, outputs = addresses(program)
    moved = [inputs[0], inputs[1] + 4096]
    encoded = []
    for tokens, own, workspace in (
        (5, inputs, WORKSPACE),
        (5, inputs, WORKSPACE),
        (5, moved, WORKSPACE),
        (5, moved, WORKSPACE + 512),
        (7, moved, WORKSPACE + 512),
    ):
        io = io_of(program, tokens)
        plugin.shape_change(io)
        plugin.enqueue(io, own, outputs, workspace, STREAM)
        events = cuda.events()
        calls = [(e.call, {k: v for k, v in e.values.items() if k not in ("stream", "module")}) for e in events]
        launches = [call for call in calls if call[0] == "cuLaunchKernel"]
        assert launches == expected_calls(program, 90, sizes_at(tokens), own, outputs, workspace)
        encoded.append([event.call for event in events].count("cuTensorMapEncodeTiled"))
    assert encoded == [4, 0, 1, 1, 4]
    with (
        cuda.failing("cuTensorMapEncodeTiled", 1, successes=2),
        pytest.raises(PluginError, match="cuTensorMapEncodeTiled of buffer 1: CUDA_ERROR_INVALID_VALUE"),
    ):
        execute(plugin, program, 9)
    execute(plugin, program, 9)
    assert executed(cuda) == expected_calls(program, 90, sizes_at(9), inputs, outputs, WORKSPACE)
    plugin.close()


def test_tensor_map_beyond_its_tensor_is_refused(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = mapped_program()
    cuda.set_sm(90)
    (variant,) = program.images[0].variants
    for i, tensor, name in ((0, "input", "x"), (2, "workspace", "buffer 1"), (3, "output", "y")):
        maps = [*variant.maps]
        assert maps[i].source.kind == tensor
        maps[i] = replace(maps[i], rows=Linear(1, T=maps[i].rows.T))
        image = replace(program.images[0], variants=(replace(variant, maps=tuple(maps)),))
        plugin = create(library, replace(program, images=(image,)))
        with pytest.raises(
            PluginError, match=rf"^MoEExperts: the program maps more of {name} than there is for T = 5$"
        ):
            execute(plugin, program, 5)
        plugin.close()


def test_shapes_may_change_with_no_call_between(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program).attach()
    inputs, outputs = addresses(program)
    for tokens in (3, 100, 3, 64):
        plugin.enqueue(io_of(program, tokens), inputs, outputs, WORKSPACE)
        assert executed(cuda) == expected_calls(program, 86, sizes_at(tokens), inputs, outputs, WORKSPACE)
    plugin.close()


def test_kernels_are_loaded_before_they_are_enqueued(library: PluginLibrary, cuda: FakeCuda) -> None:
    """So that an execution can be captured into a CUDA graph."""
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    context = plugin.attach()
    calls = [event.call for event in cuda.events()]
    assert calls.count("cuModuleLoadData") == 3
    context.shape_change(io_of(program, 100))
    inputs, outputs = addresses(program)
    context.enqueue(io_of(program, 100), inputs, outputs, WORKSPACE, STREAM)
    events = cuda.events()
    assert {event.call for event in events} == {"cuLaunchKernel", "cuMemsetD32Async"}
    assert {event.values["stream"] for event in events} == {STREAM}
    context.close()
    plugin.close()


def test_large_shared_memory_is_asked_for(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program).attach()
    execute(plugin, program, 100)
    asked = {
        event.values["entry"]: event.values["shared"] for event in cuda.events() if event.call == "cuFuncSetAttribute"
    }
    assert asked == {"grouped": 98304}
    plugin.close()


def test_layers_of_one_program_share_its_kernels_until_the_last_goes(library: PluginLibrary, cuda: FakeCuda) -> None:
    layers = [create(library, PROGRAMS["MoEExperts"]) for _ in range(3)]
    router = create(library, PROGRAMS["MoERouter"])
    contexts = [layer.attach() for layer in layers]
    for context in contexts:
        context.shape_change(io_of(PROGRAMS["MoEExperts"], 5))
    assert cuda.loaded() == 3
    router.shape_change(io_of(PROGRAMS["MoERouter"], 5))
    assert cuda.loaded() == 4
    router.close()
    for context in contexts[:-1]:
        context.close()
    assert cuda.loaded() == 3
    contexts[-1].close()
    assert cuda.loaded() == 0
    for layer in layers:
        layer.close()


def test_two_cuda_contexts_have_their_own_kernels(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    attached = []
    for number in (1, 2):
        context = cuda.context()
        cuda.use(context, thread=number)
        attached.append((context, plugin.attach()))
        attached[-1][1].shape_change(io_of(program, 50))
    assert cuda.loaded() == 6
    inputs, outputs = addresses(program)
    cuda.events()
    for number, (context, copy) in enumerate(attached, start=1):
        cuda.use(context, thread=number)
        copy.enqueue(io_of(program, 50), inputs, outputs, WORKSPACE)
        assert executed(cuda, thread=number) == expected_calls(program, 86, sizes_at(50), inputs, outputs, WORKSPACE)
    cuda.use(None)
    for _, copy in attached:
        copy.close()
    assert cuda.loaded() == 0
    plugin.close()


def test_a_plugin_may_move_to_another_cuda_context(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    execute(plugin, program, 50)
    cuda.use(cuda.context())
    execute(plugin, program, 50)
    assert cuda.loaded() == 3
    plugin.close()


def test_plugins_may_outlive_their_cuda_context(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    context = cuda.context()
    cuda.use(context)
    plugin.shape_change(io_of(program, 5))
    cuda.destroy(context)
    plugin.close()
    assert library.messages() == ""


def test_threads_do_not_disturb_each_other(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    inputs, outputs = addresses(program)
    contexts = [cuda.context() for _ in range(2)]
    failures: list[BaseException] = []
    rounds = 60

    def work(number: int) -> None:
        try:
            cuda.use(contexts[number % 2], thread=number)  # two threads in each context
            for i in range(rounds):
                copy = plugin.attach()
                workspace = WORKSPACE * number
                execute(copy, program, 1 + 37 * i * number % MAX_TOKENS, workspace, stream=number)
                copy.close()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    by_thread: dict[int, list[tuple[str, dict[str, object]]]] = {}
    for event in cuda.events():
        if event.call in ON_STREAM:
            values = {k: v for k, v in event.values.items() if k not in ("stream", "module")}
            by_thread.setdefault(event.thread, []).append((event.call, values))
    for number in (1, 2, 3, 4):
        expected = []
        for i in range(rounds):
            tokens = 1 + 37 * i * number % MAX_TOKENS
            expected += expected_calls(program, 86, sizes_at(tokens), inputs, outputs, WORKSPACE * number)
        assert by_thread[number] == expected
    plugin.close()


@pytest.mark.parametrize("kind", [CHAR, INT8])
@pytest.mark.parametrize("phase", [BUILD, 1])
def test_an_engine_gets_back_what_the_network_had(library: PluginLibrary, kind: int, phase: int) -> None:
    data = PROGRAMS["MoEExperts"].to_bytes()
    plugin = library.plugin("MoEExperts", data, kind, phase)
    ((name, stored_kind, stored),) = plugin.clone().serialized()
    assert (name, stored) == ("program", data)
    ((_, _, again),) = library.plugin("MoEExperts", stored, stored_kind).serialized()
    assert again == data


def test_final_zero_of_a_string_attribute_is_no_part_of_the_program(library: PluginLibrary) -> None:
    data = PROGRAMS["MoEExperts"].to_bytes()
    ((_, _, stored),) = library.plugin("MoEExperts", data + b"\0", CHAR).serialized()
    assert stored == data


def described(program: Program, name: str, shape: Sequence[int], dtype: str | None = None, layout: int = 0) -> Io:
    """The program's tensors for 5 tokens, but one of another shape, dtype or format."""
    io = io_of(program, 5)

    def changed(described: Sequence[DynamicTensorDesc], tensors: Sequence[Tensor]) -> list[DynamicTensorDesc]:
        return [
            DynamicTensorDesc.of(dtype or tensor.dtype, shape, shape, layout) if tensor.name == name else given
            for given, tensor in zip(described, tensors, strict=True)
        ]

    return Io(changed(io.inputs, program.inputs), changed(io.outputs, program.outputs))


GATE_UP = "its kernels were compiled for [8, 12, 12]"
SHAPES = {
    "dimension": ("gate_up", (8, 24, 12), None, 0, f"input gate_up has shape [8, 24, 12], {GATE_UP}"),
    "first dimension": ("gate_up", (9, 12, 12), None, 0, f"input gate_up has shape [9, 12, 12], {GATE_UP}"),
    "rank": ("gate_up", (8, 144), None, 0, f"input gate_up has shape [8, 144], {GATE_UP}"),
    "rank of x": ("x", (1, 5, 12), None, 0, "input x has shape [1, 5, 12], its kernels were compiled for [T, 12]"),
    "scalar": ("x", (), None, 0, "input x has shape [], its kernels were compiled for [T, 12]"),
    "hidden": ("x", (5, 13), None, 0, "input x has shape [5, 13], its kernels were compiled for [T, 12]"),
    "dtype": (
        *("down", (8, 12, 6), "bfloat16", 0),
        "input down has dtype bfloat16, its kernels were compiled for float16",
    ),
    "dtype of an output": (
        *("y", (5, 12), "float32", 0),
        "output y has dtype float32, its kernels were compiled for float16",
    ),
    "format": ("x", (5, 12), None, 2, "input x has format 2 (allowed: 0, linear)"),
    "tokens differ": ("expert_index", (4, 2), None, 0, "input expert_index has T = 4, x has T = 5"),
    "tokens of an output": ("y", (6, 12), None, 0, "output y has T = 6, x has T = 5"),
}


# At 5 tokens there are 5 sequences and columns, and 10 pages.
ATTENTION_SHAPES = {
    "starts": ("query_start", (5,), "input context_len has N = 5, query_start has N = 4"),
    "no start": ("query_start", (1,), "input query_start has N = 0 (allowed: 1 to 64)"),
    "sequences": ("context_len", (6,), "input context_len has N = 6, query_start has N = 5"),
    "rows of the table": ("page_table", (4, 5), "input page_table has N = 4, query_start has N = 5"),
    "no columns": ("page_table", (5, 0), "input page_table has M = 0 (allowed: 1 to 2147483647)"),
    "page": (
        *("key_cache", (10, 2, 32, 4)),
        "input key_cache has shape [10, 2, 32, 4], its kernels were compiled for [P, 2, 64, 4]",
    ),
    "rank of the starts": (
        *("query_start", (6, 1)),
        "input query_start has shape [6, 1], its kernels were compiled for [N + 1]",
    ),
    "pages": ("key_cache", (1 << 31, 2, 64, 4), "input key_cache has P = 2147483648 (allowed: 1 to 2147483647)"),
}


@pytest.mark.parametrize("moment", ["configure", "shape_change"])
@pytest.mark.parametrize("case", ATTENTION_SHAPES)
@pytest.mark.usefixtures("cuda")
def test_mismatch_of_any_symbol_is_named(library: PluginLibrary, case: str, moment: str) -> None:
    name, shape, message = ATTENTION_SHAPES[case]
    plugin = create(library, PROGRAMS["PagedAttention"])
    with pytest.raises(PluginError) as error:
        getattr(plugin, moment)(described(PROGRAMS["PagedAttention"], name, shape))
    assert str(error.value) == f"PagedAttention: {message}"
    plugin.close()


@pytest.mark.usefixtures("cuda")
def test_sizes_that_no_variant_is_for_are_named(library: PluginLibrary) -> None:
    variants = (
        Variant((Linear(T=1, N=-1), at_most(64, "N")), (), ()),
        Variant((at_most(8), at_most(8, "N")), (), ()),
    )
    images = (Image(89, (), (replace(variants[0], bounds=()),)), Image(86, (), variants))
    program = replace(PROGRAMS["PagedAttention"], images=images)
    plugin = create(library, program)
    tall = {"T": 9, "N": 8, "M": 1, "P": 1}
    message = "^PagedAttention: its kernels for sm86 are not for T = {}, N = {}, M = 1, P = 1$"
    with pytest.raises(PluginError, match=message.format(r"1\.\.9", r"1\.\.8")):
        plugin.configure(Io.of(program.inputs, program.outputs, dict.fromkeys(tall, 1), tall))
    with pytest.raises(PluginError, match=message.format(9, 8)):
        execute(plugin, program, tall)
    with pytest.raises(PluginError, match=message.format(9, 8)):
        plugin.enqueue(Io.of(program.inputs, program.outputs, tall), *addresses(program), WORKSPACE)
    with pytest.raises(PluginError, match=message.format(0, 8)):
        plugin.enqueue(Io.of(program.inputs, program.outputs, tall | {"T": 0}), *addresses(program), WORKSPACE)
    plugin.close()


def test_shapes_of_outputs_may_be_of_another_sum(library: PluginLibrary) -> None:
    """rows [N] follows from query_start [N + 1]."""
    plugin = create(library, PROGRAMS["PagedAttention"])
    assert plugin.output_shapes([(7, 24), (9, 2, 64, 4), (4,), (3,), (3, 2)]) == [(7, 16), (3,)]
    with pytest.raises(PluginError, match=r"input query_start has 2 dimensions \(allowed: 1\)"):
        plugin.output_shapes([(7, 24), (9, 2, 64, 4), (4, 1), (3,), (3, 2)])
    plugin.close()


@pytest.mark.parametrize("moment", ["configure", "shape_change"])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.usefixtures("cuda")
def test_mismatch_is_named(library: PluginLibrary, case: str, moment: str) -> None:
    name, shape, dtype, layout, message = SHAPES[case]
    plugin = create(library, PROGRAMS["MoEExperts"])
    with pytest.raises(PluginError) as error:
        getattr(plugin, moment)(described(PROGRAMS["MoEExperts"], name, shape, dtype, layout))
    assert str(error.value) == f"MoEExperts: {message}" == library.last_error()
    plugin.close()


@pytest.mark.parametrize("logger", [10, 11])
def test_errors_reach_the_loggers_of_tensorrt_10_and_11(library: PluginLibrary, logger: int) -> None:
    library.set_logger(logger)
    with pytest.raises(PluginError, match=r"^MoERouter: attribute program is missing \(a GPU program, as bytes\)$"):
        library.plugin("MoERouter", None)


def test_errors_without_a_logger_go_to_stderr(library: PluginLibrary, capfd: pytest.CaptureFixture[str]) -> None:
    library.set_logger(0)
    with pytest.raises(PluginError, match=r"^$"):
        library.plugin("MoERouter", None)
    assert capfd.readouterr().err == "MoERouter: attribute program is missing (a GPU program, as bytes)\n"


@pytest.mark.parametrize("bounds", [(0, 5), (1, MAX_TOKENS + 1)])
def test_number_of_tokens_must_be_in_bounds(library: PluginLibrary, bounds: tuple[int, int]) -> None:
    plugin = create(library, PROGRAMS["MoEExperts"])
    low, high = bounds
    with pytest.raises(PluginError, match=rf"^MoEExperts: input x has T = {low}\.\.{high} \(allowed: 1 to 4096\)$"):
        plugin.configure(io_of(PROGRAMS["MoEExperts"], low, high))
    plugin.close()


def test_tokens_are_limited_by_the_gpu_with_the_fewest(library: PluginLibrary) -> None:
    images = experts_program((86,)).images + experts_program((89,), max_tokens=99).images
    plugin = create(library, replace(PROGRAMS["MoEExperts"], images=images))
    plugin.configure(io_of(PROGRAMS["MoEExperts"], 1, 99))
    with pytest.raises(PluginError, match=r"input x has T = 100 \(allowed: 1 to 99\)"):
        plugin.configure(io_of(PROGRAMS["MoEExperts"], 100))
    plugin.close()


def test_number_of_tensors_is_checked(library: PluginLibrary) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    io = io_of(program, 5)
    names = "x, expert_index, expert_weight, gate_up, down, gate_up_bias, down_bias"
    inputs = f"it has 5 inputs, its kernels were compiled for 7: {names}"
    with pytest.raises(PluginError, match=inputs):
        plugin.configure(Io(io.inputs[:5], io.outputs))
    with pytest.raises(PluginError, match="it has 2 outputs, its kernels were compiled for 1: y"):
        plugin.configure(Io(io.inputs, [*io.outputs, *io.outputs]))
    with pytest.raises(PluginError, match=inputs):
        plugin.output_types([0] * 5)
    with pytest.raises(PluginError, match=inputs):
        plugin.output_shapes([(1, 1)] * 5)
    assert not plugin.supports(0, Io(io.inputs[:5], io.outputs))
    plugin.close()


def test_an_op_takes_its_own_program_only(library: PluginLibrary) -> None:
    with pytest.raises(PluginError, match=r"^MoERouter: attribute program is for MoEExperts$"):
        library.plugin("MoERouter", PROGRAMS["MoEExperts"].to_bytes())


def test_attribute_must_be_bytes(library: PluginLibrary) -> None:
    data = PROGRAMS["MoERouter"].to_bytes()
    with pytest.raises(PluginError, match="attribute program has TensorRT's field type 5"):
        library.plugin("MoERouter", data, INT32)
    with pytest.raises(PluginError, match="attribute program is missing"):
        library.plugin("MoERouter", data, name="programme")


def test_gpu_without_kernels_is_named(library: PluginLibrary, cuda: FakeCuda) -> None:
    plugin = create(library, PROGRAMS["MoEExperts"])
    cuda.set_sm(90)
    for call in (plugin.attach, lambda: plugin.shape_change(io_of(PROGRAMS["MoEExperts"], 5))):
        with pytest.raises(PluginError, match=r"^MoEExperts: it has kernels for sm86, sm89; this GPU is sm90$"):
            call()
    plugin.close()


def test_builder_needs_no_gpu_and_no_kernels_for_its_own(library: PluginLibrary, cuda: FakeCuda) -> None:
    plugin = library.plugin("MoEExperts", PROGRAMS["MoEExperts"].to_bytes(), phase=BUILD)
    cuda.set_sm(90)
    plugin.attach().close()
    cuda.use(None)
    plugin.attach().close()
    assert (cuda.events(), library.messages()) == ([], "")
    plugin.close()


def test_a_builders_thread_without_a_context_gets_the_primary_one(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = library.plugin("MoEExperts", program.to_bytes(), phase=BUILD)
    cuda.use(None)
    for tokens in (5, 100):
        execute(plugin, program, tokens)
    events = cuda.events()
    assert [event.call for event in events].count("cuDevicePrimaryCtxRetain") == 1
    assert {event.context for event in events if event.call in ON_STREAM} != {0}
    plugin.close()
    assert [event.call for event in cuda.events()] == [*["cuModuleUnload"] * 3, "cuDevicePrimaryCtxRelease"]
    with (
        cuda.failing("cuDevicePrimaryCtxRetain", 2),
        pytest.raises(PluginError, match="cuDevicePrimaryCtxRetain of the first device: CUDA_ERROR_OUT_OF_MEMORY"),
    ):
        execute(library.plugin("MoEExperts", program.to_bytes(), phase=BUILD), program, 5)


def test_misaligned_tensor_is_named(library: PluginLibrary, cuda: FakeCuda) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    inputs, outputs = addresses(program)
    for place, address in ((3, inputs[3] + 8), (4, 0)):
        changed = [address if i == place else given for i, given in enumerate(inputs)]
        with pytest.raises(PluginError) as error:
            plugin.enqueue(io_of(program, 5), changed, outputs, WORKSPACE)
        name = program.inputs[place].name
        assert str(error.value) == f"MoEExperts: input {name} is at address {address} (allowed: multiples of 16)"
    for workspace in (WORKSPACE + 8, 0):
        with pytest.raises(PluginError) as error:
            plugin.enqueue(io_of(program, 5), inputs, outputs, workspace)
        assert str(error.value) == f"MoEExperts: the workspace is at address {workspace} (allowed: multiples of 16)"
    assert executed(cuda) == []
    execute(plugin, program, 4, workspace=0)  # this variant has none
    plugin.close()


@pytest.mark.usefixtures("cuda")
def test_fill_beyond_its_buffer_is_refused(library: PluginLibrary) -> None:
    variant = Variant((at_most(64),), (per_token(8),), (Fill(0, 0, fixed(10)),))
    program = replace(PROGRAMS["MoEExperts"], images=(Image(86, (), (variant,)),))
    plugin = create(library, program)
    execute(plugin, program, 5)
    with pytest.raises(PluginError, match="the program fills 10 words of a buffer of 32 bytes"):
        execute(plugin, program, 4)
    plugin.close()


DRIVER_ERRORS = [
    ("cuModuleLoadData", 0, 209, "cuModuleLoadData of few: CUDA_ERROR_NO_BINARY_FOR_GPU (209)"),
    ("cuModuleLoadData", 2, 2, "cuModuleLoadData of grouped: CUDA_ERROR_OUT_OF_MEMORY (2)"),
    ("cuModuleGetFunction", 1, 500, "cuModuleGetFunction of sort: CUDA_ERROR_NOT_FOUND (500)"),
    ("cuFuncSetAttribute", 0, 1, "cuFuncSetAttribute of grouped: CUDA_ERROR_INVALID_VALUE (1)"),
    ("cuLaunchKernel", 0, 719, "cuLaunchKernel of sort: CUDA_ERROR_LAUNCH_FAILED (719), unspecified launch failure"),
    ("cuLaunchKernel", 1, 12345, "cuLaunchKernel of grouped: unknown error (12345)"),
    ("cuMemsetD32Async", 0, 1, "cuMemsetD32Async of the workspace: CUDA_ERROR_INVALID_VALUE (1)"),
    ("cuCtxGetDevice", 0, 201, "cuCtxGetDevice of the current context: CUDA_ERROR_INVALID_CONTEXT (201)"),
    ("cuDeviceGetAttribute", 1, 1, "cuDeviceGetAttribute of the compute capability: CUDA_ERROR_INVALID_VALUE (1)"),
    ("cuCtxGetCurrent", 0, 3, "no CUDA context is current"),
]


@pytest.mark.parametrize(("call", "successes", "error", "message"), DRIVER_ERRORS)
def test_driver_errors_are_named_and_leave_a_usable_plugin(
    library: PluginLibrary, cuda: FakeCuda, call: str, successes: int, error: int, message: str
) -> None:
    program = PROGRAMS["MoEExperts"]
    plugin = create(library, program)
    with cuda.failing(call, error, successes), pytest.raises(PluginError) as raised:
        execute(plugin, program, 100)
    assert str(raised.value) == f"MoEExperts: {message}"
    cuda.events()
    execute(plugin, program, 100)
    inputs, outputs = addresses(program)
    assert executed(cuda) == expected_calls(program, 86, sizes_at(100), inputs, outputs, WORKSPACE)
    plugin.close()


def test_call_without_a_context_is_named(library: PluginLibrary, cuda: FakeCuda) -> None:
    plugin = create(library, PROGRAMS["MoEExperts"])
    cuda.use(None)
    with pytest.raises(PluginError, match=r"^MoEExperts: no CUDA context is current$"):
        plugin.shape_change(io_of(PROGRAMS["MoEExperts"], 5))
    plugin.close()
