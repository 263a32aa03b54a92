"""The body of PagedAttention against the numpy spec, in ONNX Runtime and in onnx's reference evaluator."""

import numpy as np
import onnx
import onnxruntime
import pytest

from moevlm.export.graph.paged_attention import INPUTS, PAGED_ATTENTION, paged_attention_function
from moevlm.export.parity.measures import relative_error
from moevlm.plugins.ops.attention import attention
from moevlm.plugins.ops.spec import DOMAIN, AttentionSpec, attributes
from tests.support.attention_variants import ATTENTIONS, STEPS, AttentionVariant, attention_inputs
from tests.support.runtimes import Array, runtimes

TOLERANCE = 2e-6  # the body is float32, the spec float64


def one_node(variant: AttentionVariant) -> onnx.ModelProto:
    """A checked model whose one node is the op; its inputs are those that the variant has."""
    inputs = attention_inputs(variant, STEPS["decode"])
    present = [name in inputs for name in INPUTS]
    present = present[: max(i for i, there in enumerate(present) if there) + 1]
    function = paged_attention_function(variant.spec, tuple(present))
    names = [name if there else "" for name, there in zip(INPUTS, present, strict=False)]
    node = onnx.helper.make_node(
        PAGED_ATTENTION, names, list(function.output), domain=DOMAIN, **attributes(variant.spec)
    )
    given = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(inputs[name].dtype), [None] * inputs[name].ndim
        )
        for name in names
        if name
    ]
    made = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * (2 if name == "y" else 4))
        for name in function.output
    ]
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "one_node", given, made)
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def expected(variant: AttentionVariant, inputs: dict[str, Array]) -> list[Array]:
    optional = dict.fromkeys(("v", "cos", "sin", "value_cache", "q_norm", "k_norm", "sinks", "visible_end"))
    return [made for made in attention(**optional | inputs, spec=variant.spec) if made is not None]


@runtimes
@pytest.mark.parametrize("name", ATTENTIONS)
def test_body_agrees_with_the_spec(name, runtime):
    variant = ATTENTIONS[name]
    run = runtime(one_node(variant))
    for seed, sequences in enumerate(STEPS.values()):
        inputs = attention_inputs(variant, sequences, seed)
        for ours, theirs in zip(run(None, inputs), expected(variant, inputs), strict=True):
            assert ours.shape == theirs.shape
            assert relative_error(ours, theirs) < TOLERANCE


@runtimes
def test_a_sequence_in_steps_gets_what_it_gets_in_one(runtime):
    variant = ATTENTIONS["everything"]
    run, whole = runtime(one_node(variant)), attention_inputs(variant, ((0, 11), (0, 6)), seed=1)
    whole["visible_end"] = np.array([4, 4, 4, 4, 5, 6, 10, 10, 10, 10, 11, 1, 2, 5, 5, 5, 6], np.int32)
    y, *caches = run(None, whole)
    held = {name: whole[name] for name in ("key_cache", "value_cache")}
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 11)):  # the other sequence has its 6 tokens in the second step
        other = range(11, 17) if start == 4 else range(0)
        rows = [*range(start, stop), *other]
        step = {name: whole[name][rows] for name in ("q", "k", "v", "cos", "sin")}
        step["visible_end"] = whole["visible_end"][rows]
        step["query_start"] = np.array([0, stop - start, len(rows)], np.int32)
        step["context_len"] = np.array([start, 0 if start <= 4 else 6], np.int32)
        got, held["key_cache"], held["value_cache"] = run(None, whole | step | held)
        parts.append(got[: stop - start])
        if other:
            assert relative_error(got[stop - start :], y[11:]) < TOLERANCE
    assert relative_error(np.concatenate(parts), y[:11]) < TOLERANCE
    for ours, theirs in zip(held.values(), caches, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_caches_may_be_written_in_place():
    variant = ATTENTIONS["qwen3_vl_moe"]
    inputs = attention_inputs(variant, STEPS["mixture"], seed=2)
    model = one_node(variant)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding, wanted = session.io_binding(), expected(variant, inputs)
    binding.bind_output("y")
    for name, array in inputs.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name.endswith("_cache"):
            binding.bind_ortvalue_output(f"{name}_out", value)
    session.run_with_iobinding(binding)
    for ours, theirs in zip(binding.get_outputs(), wanted, strict=True):
        assert relative_error(ours.numpy(), theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("spec", "absent"),
    [
        (AttentionSpec(4, 2, 8), {"v", "sinks"}),
        (AttentionSpec(4, 2, 8), {"k_norm", "sinks"}),
        (AttentionSpec(4, 1, 8, value_in_key=True, value_dim=4), {"q_norm", "k_norm", "sinks"}),
        (AttentionSpec(4, 2, 8), {"cos", "sin"}),
        (AttentionSpec(4, 2, 0), {"sinks"}),
        (AttentionSpec(4, 2, 8, value_is_key=True), {"sinks"}),
    ],
    ids=["no_values", "one_norm", "values_twice", "no_tables", "tables_for_nothing", "values_that_are_keys"],
)
def test_inputs_that_do_not_go_together_are_refused(spec, absent):
    with pytest.raises(
        ValueError,
        match=r"PagedAttention with value_in_key = [01], value_is_key = [01], rotary_dim = [08] cannot have the inp",
    ):
        paged_attention_function(spec, tuple(name not in absent for name in INPUTS))
