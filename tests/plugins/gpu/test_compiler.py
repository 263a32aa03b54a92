"""Kernels compiled for every GPU, on a machine that has none."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from triton import knobs
from triton.language import constexpr

from moevlm.plugins.gpu import compiler, devices
from moevlm.plugins.gpu.compiler import CompileError, compile_drafts, compile_program, resources
from moevlm.plugins.gpu.constants import as_constant, as_constants
from moevlm.plugins.gpu.devices import DEVICES, device
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.program import Kernel, Launch, Program
from moevlm.plugins.gpu.resources import Resources
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.dtypes import E4M3
from tests.plugins.gpu import program_reader
from tests.plugins.gpu import toy_kernels as toy
from tests.plugins.gpu.interpreter import Interpreter

CUBIN = {"magic": b"\x7fELF", "machine": 190}  # EM_CUDA


def toys(*sms: int, **options: object) -> Program:
    return compile_drafts([toy.draft(sm, **options) for sm in sms], toy.__name__)


def cubin_sm(image: bytes) -> int:
    """The compute capability in a cubin's ELF header: its flags hold it, in another byte since ABI version 8."""
    assert image[:4] == CUBIN["magic"]
    assert int.from_bytes(image[18:20], "little") == CUBIN["machine"]
    flags = int.from_bytes(image[48:52], "little")
    return flags >> 8 & 0xFF if image[8] >= 8 else flags & 0xFF


def cubin_parameters(image: bytes) -> int:
    """How many parameters the kernel of a cubin has, by the cubin itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-elf", file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.count("EIATTR_KPARAM_INFO")


@pytest.fixture(scope="module")
def everywhere() -> Program:
    """The toy program for every GPU."""
    return toys(*DEVICES)


def test_a_real_op_fits_its_gpu() -> None:
    sm = 100
    op = ExpertsOp(ExpertsSpec(), experts=6, top_k=2, hidden=80, inner=48, weights="int8", has_biases=True)
    program = compile_program(op, [sm])
    assert (program.op, program.inputs, program.outputs) == ("MoEExperts", op.inputs, op.outputs)
    (image,) = program.images
    assert [variant.max_tokens for variant in image.variants][:2] == [1, 8]
    for kernel, taken in zip(image.kernels, resources(op, [sm]), strict=True):
        assert cubin_sm(kernel.image) == sm
        assert cubin_parameters(kernel.image) == kernel.parameters
        assert (taken.entry, taken.warps, taken.image) == (kernel.entry, kernel.warps, len(kernel.image))
        assert taken.shared >= kernel.shared
        assert taken.spilled == 0
    assert program_reader.read(program.to_bytes()) == asdict(program)


def test_a_router_is_one_kernel_everywhere() -> None:
    program = compile_program(RouterOp(RouterSpec(top_k=3), 10), [75, 90])
    assert [[kernel.entry for kernel in image.kernels] for image in program.images] == [["route"], ["route"]]
    assert [resource.sm for resource in resources(RouterOp(RouterSpec(top_k=3), 10), [75, 90])] == [75, 90]


def test_every_gpu_gets_its_own_machine_code(everywhere: Program) -> None:
    assert [image.sm for image in everywhere.images] == [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121]
    for image in everywhere.images:
        assert [cubin_sm(kernel.image) for kernel in image.kernels] == [image.sm, image.sm]
        assert [kernel.warps for kernel in image.kernels] == [4, 2]
        assert image.kernels[0].image != image.kernels[1].image


def test_launches_give_every_parameter_that_the_machine_code_has(everywhere: Program) -> None:
    for image in everywhere.images:
        counted = [cubin_parameters(kernel.image) for kernel in image.kernels]
        assert counted == [kernel.parameters for kernel in image.kernels]
        for variant in image.variants:
            launches = [step for step in variant.steps if isinstance(step, Launch)]
            assert [len(launch.arguments) for launch in launches] == [counted[launch.kernel] for launch in launches]
            kinds = [[argument.kind for argument in launch.arguments] for launch in launches]
            assert kinds[0][:3] == ["input", "workspace", "symbol"]
            assert {kind for launch in kinds for kind in launch[3:]} <= {"null"}


def test_bytes_of_a_program_say_all_of_it(everywhere: Program) -> None:
    assert program_reader.read(everywhere.to_bytes()) == asdict(everywhere)


def test_two_builds_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builds = []
    for number in range(2):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / str(number)))
        monkeypatch.setattr(compiler, "_done", {})
        builds.append(toys(80, 100).to_bytes())
    assert builds[0] == builds[1]


def test_matrix_products_use_each_gpu_s_own_memory() -> None:
    drafts = [toy.draft(sm, kernels=(toy.MATMUL, toy.SCALE)) for sm in DEVICES]
    compiled = compiler._compile(compiler._tasks(drafts, toy.__name__), lambda *_: None)
    found = {sm: each.resources for (_, spec, sm), each in compiled.items() if spec == toy.MATMUL}
    assert set(found) == set(DEVICES)
    for sm, measured in found.items():
        assert (measured.columns > 0) == (sm in (100, 103, 110))  # fifth-generation tensor cores alone have it
        assert 8 * 1024 <= measured.shared <= device(sm).shared
        assert measured.registers > 32
    # Triton has no tensor-core path for Turing: every product is a fused multiply-add, and its registers run out.
    assert {sm for sm, measured in found.items() if measured.spilled} == {75}


@pytest.mark.parametrize("sm", [90, 100, 120])
def test_tensor_maps_are_described_as_the_kernel_takes_them(sm: int) -> None:
    program = compile_drafts([toy.mapped_draft(sm)], toy.__name__)
    ((kernel,), (variant,)) = program.images[0].kernels, program.images[0].variants
    assert [(each.block, each.swizzle) for each in variant.maps] == [((32, 64), 128), ((1, 64, 64), 128)]
    (step,) = variant.steps
    assert isinstance(step, Launch)
    assert len(step.arguments) == kernel.parameters == cubin_parameters(kernel.image)
    given, nulls = ["tensor_map", *["null"] * 4, "tensor_map", *["null"] * 6, "output", "symbol"], ["null"] * 2
    assert [argument.kind for argument in step.arguments] == given + nulls
    assert program_reader.read(program.to_bytes()) == asdict(program)


def test_a_kernel_that_needs_more_than_a_tensor_map_is_refused() -> None:
    with pytest.raises(CompileError, match=r"mapped for sm_89: 2 tensor maps on SM89 \(allowed: from SM90 on\)$"):
        compile_drafts([toy.mapped_draft(89)], toy.__name__)
    read = r"measured for sm_90a: parameter 1 is read \(allowed: of tensordesc<fp16\[32,64\]>, its map alone\)$"
    with pytest.raises(CompileError, match=read):
        compile_drafts([toy.mapped_draft(90, toy.MEASURED)], toy.__name__)


def test_tensor_maps_are_arrays_in_the_interpreter(triton_interpreter: Interpreter) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float16) for shape in ((40, 64), (3, 64, 64)))
    y = triton_interpreter.call(toy.interpret_mapped, x, w)
    np.testing.assert_allclose(y, x.astype(np.float32) @ w.astype(np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sm", [89, 90, 120])
def test_products_of_e4m3_fit_the_gpus_that_have_them(sm: int) -> None:
    op = ExpertsOp(ExpertsSpec(), experts=6, top_k=2, hidden=256, inner=256, weights="fp8", group_size=128)
    draft = op.draft(sm)
    kernels = {spec.function: spec for spec in draft.kernels}  # of each function the last, with the largest tile
    used = [kernels[name] for name in ("quantize_rows", "fp8_gate_up", "fp8_down")]
    compiled = compiler._compile([(compiler.KERNELS, spec, sm) for spec in used], lambda *_: None)
    assert [one.resources.spilled for one in compiled.values()] == [0, 0, 0]


@pytest.mark.parametrize(("group_size", "scales"), [(16, E4M3), (32, "")])
def test_e2m1_numbers_of_gate_and_up_fit_the_registers(group_size: int, scales: str) -> None:
    sizes = {"experts": 6, "top_k": 2, "hidden": 256, "inner": 256}
    op = ExpertsOp(ExpertsSpec(), **sizes, weights="fp4", group_size=group_size, scales=scales)
    used = [spec for spec in op.draft(80).kernels if spec.function.endswith("gate_up")]
    compiled = compiler._compile([(compiler.KERNELS, spec, 80) for spec in used], lambda *_: None)
    assert [one.resources.spilled for one in compiled.values()] == [0] * len(used) == [0] * 5


def test_a_kernel_is_compiled_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    toys(86)
    monkeypatch.setattr(compiler, "_Worker", None)
    assert toys(86) == toys(86)


def test_equal_kernels_of_a_draft_are_stored_once() -> None:
    image = toys(86, kernels=(toy.SCALE, toy.SCALE)).images[0]
    assert len(image.kernels) == 1
    assert [step.kernel for step in image.variants[0].steps if isinstance(step, Launch)] == [0, 0]


def test_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sm = 70 \(allowed: 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121\)$"):
        toys(70)


def test_bfloat16_is_refused_where_the_gpu_has_none() -> None:
    with pytest.raises(ValueError, match=r"^Toy.x is bfloat16 on SM75 \(allowed: float16, float32\)$"):
        toys(80, 75, dtype="bfloat16")


def test_drafts_of_different_ops_are_refused() -> None:
    with pytest.raises(ValueError, match="the draft for SM86 is of another op than that for SM80"):
        compile_drafts([toy.draft(80), replace(toy.draft(86), op="Other")], toy.__name__)


def test_a_kernel_that_does_not_compile_is_named_in_one_line() -> None:
    with pytest.raises(CompileError, match=r"^cannot compile calls_never for sm_86: this kernel never compiles$"):
        toys(86, kernels=(toy.BROKEN, toy.SCALE))


def test_wrong_constants_are_named() -> None:
    wrong = replace(toy.SCALE, constants=(("BLOCK", 128),))
    with pytest.raises(CompileError, match=r"scale is specialised to x, y, n, BLOCK \(its parameters: .*FACTOR\)"):
        toys(86, kernels=(wrong, toy.SCALE))


def test_too_few_arguments_are_refused() -> None:
    draft = toy.draft(86)
    fill, first, second = draft.variants[0].steps
    short = replace(draft.variants[0], steps=(fill, first, replace(second, arguments=second.arguments[:2])))
    with pytest.raises(CompileError, match=r"scale has 5 parameters \(its launch gives 2"):
        compile_drafts([replace(draft, variants=(short,))], toy.__name__)


def test_a_compiler_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, sys\nprint('first', 'last words', sep='\\n', file=sys.stderr, flush=True)\nos.abort()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CompileError, match=r"^cannot compile scale for sm_86: the compiler ended \(-6\): last words$"):
        compile_drafts([toy.draft(86)], "deadly")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shared", 99 * 1024 + 1, r"k does not fit sm_86: 101377 bytes of shared memory \(allowed: up to 101376\)"),
        ("registers", 256, "256 registers of a thread"),
        ("warps", 64, "2048 threads"),
        ("columns", 513, "513 columns of tensor memory"),
    ],
)
def test_a_kernel_over_a_limit_is_refused(field: str, value: int, message: str) -> None:
    fits = Resources("k", 86, warps=4, registers=255, spilled=0, shared=99 * 1024, columns=0, image=1)
    fits.check()
    with pytest.raises(ValueError, match=message):
        replace(fits, **{field: value}).check()


def test_registers_of_a_whole_block_are_counted() -> None:
    fits = Resources("k", 90, warps=8, registers=255, spilled=0, shared=0, columns=0, image=1)
    fits.check()
    with pytest.raises(ValueError, match="131072 registers of a block"):
        replace(fits, warps=16).check()


def test_shared_memory_beyond_the_gpu_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(toy.MATMUL, constants=(("BLOCK", 256), ("INNER", 64)), warps=8)
    monkeypatch.setitem(devices.DEVICES, 86, replace(DEVICES[86], shared=32 * 1024))
    with pytest.raises(ValueError, match=r"^matmul does not fit sm_86: \d+ bytes of shared memory"):
        toys(86, kernels=(wide, toy.SCALE))


def test_kernels_report_their_image_and_shared_memory(everywhere: Program) -> None:
    kernel: Kernel = everywhere.images[0].kernels[0]
    measured = compiler._done[toy.__name__, toy.SCALE, 75].resources
    assert (measured.entry, measured.warps, measured.image) == (kernel.entry, kernel.warps, len(kernel.image))


def test_attributes_of_a_constant_are_constants() -> None:
    spec = as_constant(RouterSpec(top_k=3, scale=2.5))
    assert isinstance(spec.top_k, constexpr)
    assert (spec.top_k.value, spec.scale.value, spec.scoring.value) == (3, 2.5, "softmax")
    assert spec == as_constant(RouterSpec(top_k=3, scale=2.5)) != as_constant(RouterSpec(top_k=4))
    assert hash(spec) == hash(as_constant(RouterSpec(top_k=3, scale=2.5)))
    assert repr(spec) == repr(RouterSpec(top_k=3, scale=2.5))
    assert as_constants({"n": 3, "spec": RouterSpec(top_k=3)})["n"] == 3
