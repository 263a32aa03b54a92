"""What passes require and ensure, as code: it holds after them, not before, and a wrong order is found."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from moevlm.export.backends.cpu.passes.attention import CpuAttention
from moevlm.export.backends.cpu.passes.candidates import CpuCandidates
from moevlm.export.backends.cpu.passes.linear import CpuFloatLinear, CpuLinear
from moevlm.export.backends.cpu.passes.moe import CpuMoE
from moevlm.export.backends.ort.passes.lower_attention import LowerAttention
from moevlm.export.backends.ort.passes.lower_moe import LowerMoE
from moevlm.export.backends.ort.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.backends.ort.passes.quantize_experts import QuantizeExperts
from moevlm.export.backends.tensorrt.passes.native_moe import NativeMoE
from moevlm.export.backends.tensorrt.passes.plugin_attention import PluginPagedAttention, PluginSegmentAttention
from moevlm.export.backends.tensorrt.passes.plugin_candidates import PluginCandidates
from moevlm.export.backends.tensorrt.passes.plugin_moe import PluginMoE
from moevlm.export.backends.tensorrt.passes.typed import Typed
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.formats.integers import IntFormat
from moevlm.export.graph.paged_attention import PAGED_ATTENTION
from moevlm.export.model import CanonicalModel
from moevlm.export.passes.base import Pass, checked, run
from moevlm.export.passes.fuse_skip_norm import FuseSkipNorm
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.export.passes.prune_2_4 import PruneTwoOfFour
from moevlm.export.passes.quantize_embedding import QuantizeEmbedding
from moevlm.export.passes.quantize_linear import QuantizeLinear
from moevlm.runtime.core.errors import PassError
from tests.support.plugin_nodes import named
from tests.support.tiny import TinyCheckpoint

INT8 = IntFormat(8, 16)
TYPED = Typed("float16")
# A pass, what runs before it, and the graph that shows it.
PASSES: list[tuple[Pass, tuple[Pass, ...], str]] = [
    (PruneTwoOfFour(), (), "decoder"),
    (PackProjections(), (), "decoder"),
    (QuantizeLinear(INT8), (), "decoder"),
    (QuantizeEmbedding(INT8), (), "decoder"),
    (FuseSkipNorm(), (), "decoder"),
    (LowerAttention(), (), "decoder"),
    (LowerMoE(), (), "decoder"),
    (QuantizeExperts(INT8), (LowerMoE(),), "decoder"),
    (LowerSegmentAttention(), (), "vision"),
    (CpuLinear(INT8), (), "decoder"),
    (CpuFloatLinear(), (CpuLinear(INT8),), "decoder"),
    (CpuAttention(), (), "decoder"),
    (CpuMoE(INT8), (), "decoder"),
    (CpuCandidates(), (), "decoder"),
    (TYPED, (), "decoder"),
    (PackProjections(PAGED_ATTENTION), (), "decoder"),
    (PluginPagedAttention("float16", "", named), (TYPED,), "decoder"),
    (PluginSegmentAttention("float16", named), (TYPED,), "vision"),
    (PluginCandidates(named), (TYPED,), "decoder"),
    (NativeMoE(), (TYPED,), "decoder"),
    (PluginMoE("float16", "", 32, named), (TYPED,), "decoder"),
]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ir.Model]:
    checkpoint = TinyCheckpoint(text={"moe_intermediate_size": 32}).save(tmp_path_factory.mktemp("graphs") / "c")
    with Checkpoint.open(checkpoint) as source:
        return CanonicalModel.of(source, "auto", ()).graphs


@pytest.mark.parametrize(("step", "before", "graph"), PASSES, ids=lambda value: type(value).__name__)
def test_what_a_pass_ensures_holds_after_it_and_not_before(
    step: Pass, before: tuple[Pass, ...], graph: str, graphs: dict[str, ir.Model]
) -> None:
    model = graphs[graph].clone()
    for earlier in before:
        earlier.apply(model)
    assert not list(step.requires(model))
    assert list(step.ensures(model))
    assert step.apply(model) > 0
    assert not list(step.ensures(model))


ORDERS: dict[str, Callable[[], tuple[Pass, ...]]] = {
    "LowerMoE has taken": lambda: (QuantizeExperts(INT8), LowerMoE()),
    "CpuLinear requires": lambda: (CpuMoE(INT8), CpuLinear(INT8)),
    "CpuFloatLinear requires": lambda: (CpuFloatLinear(), CpuLinear(INT8)),
    "QuantizeLinear requires": lambda: (LowerMoE(), CpuMoE(INT8), QuantizeLinear(INT8)),
    "PruneTwoOfFour requires": lambda: (LowerMoE(), PruneTwoOfFour()),
    "PluginMoE requires": lambda: (PluginMoE("float16", "", 32, named), TYPED),
    "Typed requires": lambda: (CpuMoE(INT8), TYPED),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_wrong_order_is_found_inside_of_checked(name: str, graphs: dict[str, ir.Model]) -> None:
    what = name if name.endswith("requires") else "QuantizeExperts requires"
    with checked(), pytest.raises(PassError, match=f"{what} otherwise, but "):
        run(ORDERS[name](), graphs["decoder"].clone())
