"""Programs as bytes: what is refused, and that nothing crashes."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.plugin_harness import Io, PluginError, PluginLibrary
from moevlm.plugins.gpu.program import MAGIC, Argument, Fill, Image, Kernel, Launch, Program, Variant
from moevlm.plugins.gpu.sizes import ONE, Count, Linear, Sizes, T, Tensor, at_most, fixed, per_token
from tests.plugins.tensorrt.fake_cuda import FakeCuda
from tests.plugins.tensorrt.programs import (
    ROUTER,
    attention_program,
    experts_program,
    mapped_program,
    programs,
    router_program,
    sizes,
)

DATA = experts_program().to_bytes()
KERNEL = Kernel("route", 1, 0, 1, b"fake route 8\0")
INPUT = Argument("input")


def router(variants: tuple[Variant, ...], kernels: tuple[Kernel, ...] = (KERNEL,)) -> Program:
    return Program(ROUTER.name, ROUTER.inputs, ROUTER.outputs, (Image(86, kernels, variants),))


def launching(
    argument: Argument = INPUT,
    grid: Count = ONE,
    kernel: int = 0,
    axis: int = 0,
    bounds: tuple[Linear, ...] = (at_most(64),),
    overlaps: bool = False,
) -> Program:
    sizes = [ONE, ONE, ONE]
    sizes[axis] = grid
    steps = (Launch(kernel, (sizes[0], sizes[1], sizes[2]), (argument,), overlaps),)
    return router((Variant(bounds, (fixed(64),), steps),))


def with_tensor(**changes: object) -> Program:
    program = router_program()
    logits = replace(program.inputs[0], **changes)
    return replace(program, inputs=(logits, program.inputs[1]))


def mapping(sms: tuple[int, ...] = (90,), which: int = 0, **changes: object) -> Program:
    """The program of tensor maps, with one of them changed."""
    program = mapped_program(sms)
    (variant,) = program.images[0].variants
    maps = [*variant.maps]
    maps[which] = replace(maps[which], **changes)
    variants = (replace(variant, maps=tuple(maps)),)
    return replace(program, images=tuple(replace(image, variants=variants) for image in program.images))


LOW = Variant((at_most(64),), (), ())
NEGATIVE = r"at most any number \(allowed: a divisor of 1 or more, no negative number\)"
REFUSED = {
    "input": (launching(Argument("input", 2)), r"input 2 in the program \(it has 2\)"),
    "output": (launching(Argument("output", 2)), r"output 2 in the program \(it has 2\)"),
    "workspace": (launching(Argument("workspace", 1)), r"buffer 1 in the program \(it has 1\)"),
    "kernel": (launching(kernel=1), r"kernel 1 in the program \(it has 1\)"),
    "filled buffer": (
        router((Variant((at_most(64),), (), (Fill(0, 0, ONE),)),)),
        r"buffer 0 in the program \(it has 0\)",
    ),
    "divisor": (launching(grid=per_token(1, 0, 0)), rf"\(0 \+ 1 T\) / 0, {NEGATIVE}"),
    "negative slope": (launching(grid=per_token(-1, 9)), rf"\(9 \+ -1 T\) / 1, {NEGATIVE}"),
    "negative limit": (
        launching(grid=per_token(1, limit=Linear(-1))),
        r"\(0 \+ 1 T\) / 1, at most -1 \(allowed: a divisor",
    ),
    "empty grid": (launching(grid=per_token(0)), r"kernel route of the program has a grid of 0 along x for T = 1"),
    "wide grid": (
        launching(grid=per_token(1 << 26)),
        r"kernel route of the program has a grid of 4294967296 along x for T = 64 \(allowed: 1 to 2147483647\)",
    ),
    "high grid": (
        launching(grid=per_token(1024), axis=1),
        r"a grid of 65536 along y for T = 64 \(allowed: 1 to 65535\)",
    ),
    "deep grid": (
        launching(grid=per_token(1024), axis=2),
        r"a grid of 65536 along z for T = 64 \(allowed: 1 to 65535\)",
    ),
    "overflow": (launching(grid=per_token(1 << 62, 1 << 62)), r"a grid of 9223372036854775807 along x for T = 1"),
    "arguments": (
        router((LOW,), (replace(KERNEL, parameters=2),)),
        None,  # what is not launched may have any number
    ),
    "too few arguments": (
        router((Variant((at_most(64),), (), (Launch(0, (ONE, ONE, ONE), ()),)),)),
        r"kernel route of the program is launched with 0 arguments \(it has 1 parameters\)",
    ),
    "no warps": (router((LOW,), (replace(KERNEL, warps=0),)), r"kernel route of the program has 0 warps"),
    "warps": (router((LOW,), (replace(KERNEL, warps=33),)), r"has 33 warps \(allowed: 1 to 32\)"),
    "no bound": (
        launching(grid=per_token(4096), bounds=()),
        "kernel route of the program has a grid of 4294967296 along x for T = 1048576",
    ),
    "bounds": (launching(grid=per_token(1 << 26), bounds=(at_most(31),)), None),
    "bounds above": (launching(grid=per_token(1, limit=Linear(-64, T=1)), bounds=(Linear(65, T=-1), at_most(99))), "1"),
    "bounds that nothing is within": (launching(grid=per_token(0), bounds=(at_most(0),)), None),
    "overlap": (launching(overlaps=True), r"kernel route of the program overlaps on sm86 \(allowed: from sm90 on\)"),
    "no variant": (router(()), "the program's image for sm86 has no variant"),
    "no image": (replace(router_program(), images=()), "the program has no image"),
    "two images": (router_program((86, 86)), "the program has two images for sm86"),
    "workspace size": (
        router((Variant((at_most(64),), (fixed(1 << 43), fixed(1 << 43)), ()),)),
        "a variant of the program has buffers of over 17592186044416 bytes for T = 64",
    ),
    "rank": (with_tensor(shape=(1,) * 9), r"tensor logits of the program has 9 dimensions \(allowed: up to 8\)"),
    "dimension": (with_tensor(shape=(T, 0)), "tensor logits of the program has a dimension 0"),
    "dimension of a symbol": (
        with_tensor(shape=(T + -1, 8)),
        r"tensor logits of the program has a dimension T \+ -1 \(allowed: 0 to 1099511627776\)",
    ),
    "written output": (
        replace(router_program(), outputs=(Tensor("index", "int32", (T, 2), written=True),)),
        r"output index of the program is marked as written \(allowed: inputs\)",
    ),
    "unknown size of an output": (
        with_tensor(shape=(4, 8)),
        "output expert_index of the program has T in its shape, no input has",
    ),
    "unknown size in a grid": (
        launching(grid=Count(Linear(1, N=2))),
        r"the program has 1 \+ 2 N, but no input has N in its shape",
    ),
    "unknown size in a bound": (
        launching(bounds=(at_most(64), at_most(3, "P"))),
        r"the program has -3 \+ 1 P, but no input has P in its shape",
    ),
    "unknown size of an argument": (
        launching(Argument("symbol", 2)),
        "a kernel of the program takes M, which no input has",
    ),
    "map of an old GPU": (mapping((89,)), r"the program has a tensor map for sm89 \(allowed: from sm90 on\)"),
    "map of a number": (
        mapping(source=Argument("constant", 1)),
        r"a tensor map of the program is of an argument of kind 5 \(allowed: 0 to 2\)",
    ),
    "map of no buffer": (mapping(which=2, source=Argument("workspace", 2)), r"buffer 2 in the program \(it has 2\)"),
    "map index": (launching(Argument("tensor_map", 0)), r"tensor map 0 in the program \(it has 0\)"),
    "dimensions of a map": (
        mapping(inner=(8, 8)),
        r"a tensor map of the program has 3 dimensions and blocks of 2 \(allowed: as many, 2 to 5\)",
    ),
    "one dimension": (mapping(inner=(), block=(64,)), "has 1 dimensions and blocks of 1"),
    "six dimensions": (mapping(inner=(2,) * 4 + (16,), block=(1,) * 5 + (16,)), "has 6 dimensions and blocks of 6"),
    "size of a map": (mapping(inner=(1 << 33,)), r"has a dimension 8589934592 \(allowed: 1 to 4294967296\)"),
    "rows of a map": (mapping(rows=Linear(T=1 << 21)), r"has 0 \+ 2097152 T rows for T = 4096 \(allowed: 1 to"),
    "no rows": (mapping(rows=Linear(-1, T=1)), r"has -1 \+ 1 T rows for T = 1 \(allowed"),
    "falling rows": (mapping(rows=Linear(9000, T=-1)), r"has 9000 \+ -1 T rows for T = 1 \(allowed"),
    "block": (mapping(block=(257, 64)), r"has blocks of 257 \(allowed: 1 to 256\)"),
    "no block": (mapping(block=(0, 64)), r"has blocks of 0 \(allowed: 1 to 256\)"),
    "stride": (mapping(inner=(36,)), r"has rows that lie 72 bytes apart \(allowed: multiples of 16, up to"),
    "long stride": (
        mapping(which=1, inner=(1 << 32, 256)),
        r"has rows that lie 512 bytes apart \(allowed: multiples of 16, up to 1099511627775 in all\)",
    ),
    "narrow block": (mapping(block=(32, 4)), r"has blocks 8 bytes wide with a swizzle of 128 bytes \(allowed"),
    "wide block": (mapping(block=(32, 128)), r"has blocks 256 bytes wide with a swizzle of 128 bytes \(allowed"),
    "swizzle": (mapping(swizzle=16), r"has blocks 128 bytes wide with a swizzle of 16 bytes \(allowed"),
    "symbol": (launching(Argument("symbol", 4)), r"symbol 4 in the program \(it has 4\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(library: PluginLibrary, case: str) -> None:
    program, message = REFUSED[case]
    if message is None:
        library.plugin(program.op, program.to_bytes()).close()
        return
    with pytest.raises(PluginError, match=message) as error:
        library.plugin(program.op, program.to_bytes())
    assert str(error.value).startswith(f"{program.op}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MOEVLMG", r"attribute program is no GPU program \(it does not begin with MOEVLMGP\)"),
        (b"x" + DATA, "attribute program is no GPU program"),
        (MAGIC + struct.pack("<I", 1) + DATA[12:], r"the program has version 1 \(allowed: 2\)"),
        (DATA + b"\0\0", "the program has 2 bytes after its end"),
        (DATA + b"x", "the program has 1 bytes after its end"),
        (DATA.replace(b"x" + struct.pack("<I", 1), b"x" + struct.pack("<I", 5)), "tensor x of the program has dtype 5"),
        (MAGIC + struct.pack("<II", 2, 0xFFFFFFFF), "the program ends at byte 16 in its op"),
        (DATA[:26] + struct.pack("<I", 0xFFFFFFFF), "the program ends within its 4294967295 tensors"),
    ],
)
def test_bytes_that_are_no_program_are_refused(library: PluginLibrary, data: bytes, message: str) -> None:
    with pytest.raises(PluginError, match=f"^MoEExperts: {message}"):
        library.plugin("MoEExperts", data)


def test_a_tensor_may_have_a_name_of_any_length(library: PluginLibrary) -> None:
    inputs = (Tensor("", "float32", (T,)), Tensor("n" * 5000, "float32", ()))
    program = replace(router_program(), inputs=inputs, images=(Image(86, (), (LOW,)),))
    library.plugin("MoERouter", program.to_bytes()).close()


def test_every_truncation_is_refused(library: PluginLibrary) -> None:
    for length in range(1, len(DATA)):
        with pytest.raises(PluginError, match=r"the program ends|is no GPU program"):
            library.plugin("MoEExperts", DATA[:length])


STARTS = (experts_program(), router_program(), attention_program(), mapped_program())


def survive(library: PluginLibrary, cuda: FakeCuda, start: Program, data: bytes, sizes: Sizes) -> None:
    """Refused, or run as whatever program it became; the buffers it was given are only addresses."""
    for op in (start.op, "MoERouter"):
        try:
            plugin = library.plugin(op, data)
        except PluginError as error:
            assert "\n" not in str(error)
            continue
        io = Io.of(start.inputs, start.outputs, sizes)
        try:
            plugin.configure(io)
            plugin.workspace(io)
            plugin.shape_change(io)
            addresses = [1 << 32] * 16
            plugin.enqueue(io, addresses[: len(io.inputs)], addresses[: len(io.outputs)], 1 << 40)
        except PluginError:
            pass
        plugin.close()
    cuda.forget()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_mutation_crashes(shared_library: PluginLibrary, shared_cuda: FakeCuda, data: st.DataObject) -> None:
    shared_cuda.reset()
    start = data.draw(st.sampled_from(STARTS))
    shared_cuda.set_sm(start.images[-1].sm)
    changed = bytearray(start.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        how = data.draw(st.sampled_from(["byte", "word", "long", "cut", "insert"]))
        if how == "byte":
            changed[at] = data.draw(st.integers(0, 255))
        elif how == "word":
            value = data.draw(st.one_of(st.integers(0, 300), st.integers(0, 0xFFFFFFFF)))
            changed[at : at + 4] = struct.pack("<I", value)
        elif how == "long":
            changed[at : at + 8] = struct.pack("<q", data.draw(st.integers(-(1 << 63), (1 << 63) - 1)))
        elif how == "cut":
            del changed[at : at + data.draw(st.integers(1, 20))]
        else:
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    if changed:
        survive(shared_library, shared_cuda, start, bytes(changed), data.draw(sizes()))
    assert shared_cuda.loaded() == 0


@given(program=programs())
@settings(max_examples=50, deadline=None)
def test_every_program_is_read_back(shared_library: PluginLibrary, program: Program) -> None:
    plugin = shared_library.plugin(program.op, program.to_bytes())
    assert plugin.serialized()[0][2] == program.to_bytes()
    plugin.close()
