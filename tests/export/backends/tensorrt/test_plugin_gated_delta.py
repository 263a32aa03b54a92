"""Graphs with the gated delta rule as TensorRT is given them, held to the canonical ones."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from moevlm.export.backends.tensorrt.passes.pack_delta import PackDelta
from moevlm.export.backends.tensorrt.passes.plugin_attention import PluginPagedAttention
from moevlm.export.backends.tensorrt.passes.plugin_gated_delta import PluginGatedDelta
from moevlm.export.backends.tensorrt.passes.plugin_moe import PluginMoE
from moevlm.export.backends.tensorrt.passes.row_sums import RowSums
from moevlm.export.backends.tensorrt.passes.typed import Typed
from moevlm.export.backends.tensorrt.profiles import max_rows
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.gated_delta import GATED_DELTA
from moevlm.export.graph.paged_attention import PAGED_ATTENTION
from moevlm.export.model import CanonicalModel
from moevlm.export.passes.base import run
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.states import PagedKV, Recurrent
from tests.support.hybrid import save
from tests.support.plan_graphs import (
    STEPS,
    canonical_outputs,
    error,
    evaluate,
    in_question,
    random_step,
    usual_error,
    with_stored_experts,
)
from tests.support.plugin_nodes import named, op_named
from tests.support.tiny import TinyCheckpoint


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ir.Model]:
    path: Path = TinyCheckpoint("qwen3_5_moe").save(tmp_path_factory.mktemp("delta") / "checkpoint")
    with Checkpoint.open(path) as source:
        graph = CanonicalModel.of(source).graphs["decoder"]
        add_functions(graph)
        yield graph


def lowered(canonical: ir.Model, dtype: str) -> ir.Model:
    model = canonical.clone()
    passes = [PackProjections(PAGED_ATTENTION), PackDelta(), *([] if dtype == "float32" else [Typed(dtype)])]
    passes.append(RowSums())
    plugins = [PluginPagedAttention(dtype, "", named), PluginGatedDelta(dtype, named), PluginMoE(dtype, "", 32, named)]
    run([*passes, *plugins], model)
    assert not model.functions
    return model


@pytest.mark.parametrize("step", STEPS)
def test_decoder_with_float32_everywhere_is_the_canonical_one(canonical: ir.Model, step: str) -> None:
    model = lowered(canonical, "float32")
    assert [value.name for value in model.graph.outputs] == ["logits"]
    feeds = random_step(canonical, STEPS[step], np.random.default_rng(0))
    want, got = canonical_outputs(canonical, feeds), evaluate(model, feeds)
    assert got.keys() == want.keys()
    for name in want:
        assert error(*(in_question(name, outputs[name], feeds) for outputs in (got, want))) < 1e-5, name


def test_states_stay_float32_and_activations_do_not(canonical: ir.Model) -> None:
    model = lowered(canonical, "bfloat16")
    kinds = {str(value.name): value.dtype for value in model.graph.inputs}
    kept = {name: kinds[name] for name in kinds if "_state." in name}
    assert len(kept) == 2 and set(kept.values()) == {ir.DataType.FLOAT}
    feeds = random_step(canonical, ((0, 8), (70, 1), (60, 9), (3, 6)), np.random.default_rng(1))
    want, got = canonical_outputs(with_stored_experts(canonical, model), feeds), evaluate(model, feeds)
    for name in want:
        assert usual_error(*(in_question(name, outputs[name], feeds) for outputs in (got, want))) < 0.03, name


def test_qkv_a_b_and_the_gate_are_rows_of_one_product(canonical: ir.Model) -> None:
    model = lowered(canonical, "bfloat16")
    (node,) = [node for node in model.graph if node.op_type == GATED_DELTA]
    product = node.inputs[0].producer()  # type: ignore[union-attr]
    assert product is not None and product.op_type == "Gemm"
    op = op_named(node.attributes["program"].value)
    assert op.beside == op.spec.value_heads * op.spec.value_dim
    split, plugin = sorted((user for user in product.outputs[0].consumers()), key=lambda user: user.op_type != "Split")
    assert plugin is node
    assert [len(value.consumers()) for value in split.outputs] == [0, 0, 0, 2]  # z times its sigmoid


@pytest.mark.usefixtures("hybrid_family")
def test_states_of_another_op_are_refused_by_name(tmp_path: Path) -> None:
    with Checkpoint.open(save(tmp_path / "hybrid", ("wide", "recurrent"))) as source:
        graph = CanonicalModel.of(source).graphs["decoder"]
        allowed = "caches of keys and values, states of the gated delta rule"
        with pytest.raises(BuildError, match=rf"cannot keep recurrence_state.1 \(supported: {allowed}\)$"):
            run([PluginGatedDelta("float32", named)], graph)


def test_projections_that_are_not_one_product_are_joined(canonical: ir.Model) -> None:
    model = canonical.clone()
    run([PluginPagedAttention("float32", "", named), PluginGatedDelta("float32", named)], model)
    (node,) = [node for node in model.graph if node.op_type == GATED_DELTA]
    assert node.inputs[0].producer().op_type == "Concat"  # type: ignore[union-attr]
    assert op_named(node.attributes["program"].value).beside == 0


def test_rows_that_an_engine_takes_keep_tensors_below_2_to_the_31() -> None:
    states = [
        Recurrent(layer=0, name="conv", shape=(3, 8192)),
        Recurrent(layer=0, name="delta", shape=(32, 128, 128)),
        PagedKV(layer=1, kv_heads=2, key_dim=256, value_dim=256),
    ]
    assert max_rows(states) == (2**31 - 1) // (32 * 128 * 128)
    assert max_rows(states[2:]) == 0
