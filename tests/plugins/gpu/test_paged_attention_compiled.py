"""PagedAttention's kernels compiled: what they take of a GPU, and that their loops wait for no key, value or scale."""

import pytest

from moevlm.plugins.gpu.compiler import KERNELS, compile_program, resources
from moevlm.plugins.gpu.devices import REGISTERS_PER_BLOCK
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.ops.spec import AttentionSpec
from tests.plugins.gpu.loop_loads import lowered, waiting_loads

QWEN3 = AttentionSpec(32, 4, 128)
# Every generation of Triton's pipelining, and every layout of a cache.
COPIES = [(80, ""), (86, "int8"), (90, "fp8"), (100, "int8"), (120, "")]


@pytest.mark.parametrize(("sm", "cache"), COPIES)
def test_keys_values_and_scales_are_copied_ahead(sm: int, cache: str) -> None:
    op = PagedAttentionOp(QWEN3, 128, 128, cache=cache, has_norms=True)
    kernels = {spec.function: spec for spec in op.draft(sm).kernels}
    assert waiting_loads(KERNELS, kernels["prefill"], sm) == []
    # Before it walks the pages, decode reads the new tokens, of which there is one, in a loop too.
    assert [load for load in waiting_loads(KERNELS, kernels["decode"], sm) if "pages.py" in load] == []


def test_kernels_fit_their_gpu_keep_their_registers_and_decode_fits_twice() -> None:
    op = PagedAttentionOp(QWEN3, 128, 128, has_norms=True)
    program = compile_program(op, [86])
    assert (program.op, program.inputs, program.outputs) == ("PagedAttention", op.inputs, op.outputs)
    found = resources(op, [86])
    assert {kernel.entry for kernel in found} == {"write_pages", "decode", "merge", "prefill"}
    assert all(kernel.spilled == 0 for kernel in found)
    for kernel in (each for each in found if each.entry == "decode"):  # of 100 KiB, 1 KiB of each block is CUDA's
        assert 2 * (kernel.shared + 1024) <= 100 * 1024
        assert 2 * kernel.registers * 32 * kernel.warps <= REGISTERS_PER_BLOCK


WIDE = {
    "qwen3_5": PagedAttentionOp(AttentionSpec(16, 2, 64), 256, 256, has_norms=True),
    "gemma4": PagedAttentionOp(
        AttentionSpec(16, 2, 512, scale=1.0, value_is_key=True, value_norm=True), 512, 512, cache="int8", has_norms=True
    ),
    "mistral4": PagedAttentionOp(
        AttentionSpec(32, 1, 64, rotary_start=256, scale=0.1, value_in_key=True, value_dim=256), 320, 256
    ),
    "deepseek_v3": PagedAttentionOp(
        AttentionSpec(128, 1, 64, rotary_start=512, scale=0.1, value_in_key=True, value_dim=512), 576, 512, cache="fp8"
    ),
}


@pytest.mark.parametrize(
    ("model", "sm"),
    [("qwen3_5", 86), ("gemma4", 80), ("gemma4", 120), ("mistral4", 86), ("deepseek_v3", 90), ("deepseek_v3", 100)],
)
def test_wide_heads_keep_their_registers(model: str, sm: int) -> None:
    assert {kernel.entry: kernel.spilled for kernel in resources(WIDE[model], [sm])} == dict.fromkeys(
        ("write_pages", "decode", "merge", "prefill"), 0
    )


def test_images_of_wide_heads_cost_loops_nothing() -> None:
    spec = AttentionSpec(16, 8, 256, scale=1.0, window=1024, value_norm=True)
    op = PagedAttentionOp(spec, 256, 256, has_norms=True, has_visible_end=True)
    assert all(kernel.spilled == 0 for kernel in resources(op, [86]))
    kernels = {spec.function: spec for spec in op.draft(90).kernels}
    assert waiting_loads(KERNELS, kernels["prefill"], 90) == []


def test_launches_of_a_step_overlap_and_kernels_wait_before_they_touch_memory() -> None:
    draft = PagedAttentionOp(QWEN3, 128, 128, has_norms=True).draft(90)
    for variant in draft.variants:
        assert [step.overlaps for step in variant.steps] == [False] + [True] * (len(variant.steps) - 1)
    for spec in {spec.function: spec for spec in draft.kernels}.values():
        before, after = lowered(KERNELS, spec, 90, "ptx").split("griddepcontrol.wait", 1)
        assert not [word for word in ("ld.global", "st.", "cp.async") if word in before]
        assert "st." in after
