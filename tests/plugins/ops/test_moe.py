"""Router and experts in numpy: worked examples, cases computed by hand, goldens, and Hugging Face's own modules."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.glm4v_moe import modeling_glm4v_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama4 import modeling_llama4
from transformers.models.mistral4 import modeling_mistral4
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

from bench import variants
from moevlm.plugins.ops.experts import activate, experts, gelu_tanh, linear
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "moe.json").read_text())
# Goldens hold 7 digits; exp and tanh differ in the last bit from one libm to the next.
GOLDEN_TOLERANCE = 1e-6
# Two float32 computations of the same sums.
HF_TOLERANCE = 2e-6


def f32(*values: object) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, np.float32)


# Worked examples.


def test_embedding_lookup_is_a_one_hot_product():
    table = f32([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    ids = np.array([2, 0, 2])
    looked_up = linear(np.eye(4, dtype=np.float32)[ids], table.T)
    assert looked_up.tolist() == [[7, 8, 9], [1, 2, 3], [7, 8, 9]]


def test_linear_multiplies_by_the_rows_of_its_weight_and_adds_the_bias():
    assert linear(f32([5, 6]), f32([[1, 2], [3, 4]]), f32([7, 8])).tolist() == [24, 47]


@pytest.mark.parametrize(("x", "relu"), [(-2, 0), (0, 0), (3, 3)])
def test_a_steep_silu_is_a_relu(x, relu):
    spec = ExpertsSpec("silu", gated=False)
    up, down = f32([[[1024]]]), f32([[[1 / 1024]]])
    assert experts(f32([[x]]), np.array([[0]]), f32([[1]]), up, down, spec).tolist() == [[relu]]


def test_two_experts_giving_10_and_20_with_weights_0_6_and_0_4_give_14():
    gives = f32([[10], [20]])
    zero = np.zeros((2, 2, 1), np.float32), np.zeros((2, 1, 1), np.float32)
    biases = {"gate_up_bias": np.zeros((2, 2), np.float32), "down_bias": gives}
    y = experts(f32([[1]]), np.array([[0, 1]]), f32([[0.6, 0.4]]), *zero, ExpertsSpec(), **biases)
    assert y[0, 0] == pytest.approx(14, rel=1e-6)


# Routing, by hand. log(p) as logits makes softmax give p back.


def test_softmax_router_keeps_or_renormalizes_the_chosen_probabilities():
    logits = np.log(f32([[0.1, 0.4, 0.2, 0.3]]))
    index, weight = route(logits, RouterSpec(top_k=2))
    assert index.tolist() == [[1, 3]]
    np.testing.assert_allclose(weight, [[4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_allclose(route(logits, RouterSpec(2, renormalize=False))[1], [[0.4, 0.3]], rtol=1e-6)
    scaled = RouterSpec(2, epsilon=0.1, scale=3.0)
    np.testing.assert_allclose(route(logits, scaled)[1], [[1.5, 1.125]], rtol=1e-6)


def test_softmax_after_topk_is_over_the_chosen_logits_alone():
    index, weight = route(f32([[0, np.log(3), -5, np.log(9)]]), RouterSpec(2, scoring="softmax_after_topk"))
    assert index.tolist() == [[3, 1]]
    np.testing.assert_allclose(weight, [[0.75, 0.25]], rtol=1e-6)


def test_correction_bias_changes_the_choice_and_not_the_weight():
    logits = np.log(f32([[1, 3, 1 / 3]]))  # sigmoid: 0.5, 0.75, 0.25
    index, weight = route(logits, RouterSpec(2, scoring="sigmoid", renormalize=False), f32([0, -1, 0.5]))
    assert index.tolist() == [[2, 0]]  # choice scores 0.5, -0.25, 0.75
    np.testing.assert_allclose(weight, [[0.25, 0.5]], rtol=1e-6)


def test_expert_scale_is_a_factor_on_the_weights_and_changes_no_choice():
    logits = np.log(f32([[0.1, 0.4, 0.2, 0.3]]))
    index, weight = route(logits, RouterSpec(top_k=2, scale=7.0), None, f32([100, 0.5, 100, -2]))
    assert index.tolist() == [[1, 3]]
    np.testing.assert_allclose(weight, [[2, -6]], rtol=1e-6)


@pytest.mark.parametrize(("group_score", "chosen"), [("max", [0, 1]), ("top2_sum", [2, 3])])
def test_group_scores_choose_different_groups(group_score, chosen):
    logits = np.log(f32([[0.36, 0.04, 0.31, 0.29]]))
    spec = RouterSpec(2, n_group=2, topk_group=1, group_score=group_score)
    assert route(logits, spec)[0].tolist() == [chosen]


def test_expert_of_a_masked_group_is_never_chosen_even_by_negative_choice_scores():
    spec = RouterSpec(2, scoring="sigmoid", n_group=2, topk_group=1)
    index, _ = route(f32([[0, 0, 0, 0]]), spec, f32([-3, -9, -4, -4]))
    assert index.tolist() == [[0, 1]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_after_topk"])
def test_ties_go_to_the_lower_index(scoring):
    logits = f32([[0, 1, 0, 1, 1, 0], [2, 2, 2, 2, 2, 2]])
    assert route(logits, RouterSpec(4, scoring=scoring))[0].tolist() == [[1, 3, 4, 0], [0, 1, 2, 3]]
    # Many experts too: an unstable sort keeps the order of a few.
    logits = f32([np.arange(256) % 3])
    assert route(logits, RouterSpec(4, scoring=scoring))[0].tolist() == [[2, 5, 8, 11]]


def test_results_have_the_ops_types_for_zero_tokens_too():
    for tokens in (0, 2):
        index, weight = route(np.zeros((tokens, 8), np.float32), variants.MODELS["deepseek_v3"])
        assert (index.shape, index.dtype, weight.shape, weight.dtype) == (
            (tokens, 2),
            np.int32,
            (tokens, 2),
            np.float32,
        )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RouterSpec(9), "top_k = 9"),
        (RouterSpec(5, n_group=4, topk_group=2), "top_k = 5"),
        (RouterSpec(1, n_group=3), "n_group = 3"),
        (RouterSpec(1, n_group=8, group_score="top2_sum"), "top2_sum"),
    ],
)
def test_router_that_cannot_choose_among_8_experts_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        route(np.zeros((1, 8), np.float32), spec)


# Experts, by hand.


def test_clamped_swiglu_limits_gate_above_and_up_on_both_sides():
    spec = ExpertsSpec("swiglu_clamped", alpha=2.0, limit=1.0)
    projected = f32([[5, -3, 0.5, 4, -9, 0.25]])  # gates 5, -3, 0.5; ups 4, -9, 0.25
    gates, ups = np.array([1, -3, 0.5]), np.array([2, 0, 1.25])
    np.testing.assert_allclose(activate(projected, spec), [gates / (1 + np.exp(-2 * gates)) * ups], rtol=1e-6)


def test_gelu_is_the_tanh_form():
    erf_form, tanh_form = 0.1586552539, 0.1588080094
    got = 1 - gelu_tanh(np.array(1.0))
    assert abs(got - tanh_form) < 1e-9 < abs(got - erf_form)


def test_weight_on_the_input_is_not_weight_on_the_output():
    x, index, weight = f32([[2]]), np.array([[0]]), f32([[0.5]])
    one = np.ones((1, 1, 1), np.float32)
    on_input = experts(x, index, weight, one, one, ExpertsSpec(gated=False, weight_on="input"))
    on_output = experts(x, index, weight, one, one, ExpertsSpec(gated=False))
    np.testing.assert_allclose(on_input, [[1 / (1 + np.exp(-1))]], rtol=1e-6)
    np.testing.assert_allclose(on_output, [[1 / (1 + np.exp(-2))]], rtol=1e-6)


def test_gate_rows_stand_before_up_rows():
    gate_up = f32([[[0], [0], [3], [5]]])  # both gates are 0, and so is silu(0) * up
    assert experts(f32([[1]]), np.array([[0]]), f32([[1]]), gate_up, f32([[[1, 1]]]), ExpertsSpec()) == 0


# Goldens.


@pytest.mark.parametrize("given", ["no_bias", "bias", "expert_scale"])
@pytest.mark.parametrize("name", GOLDENS["router"])
def test_router_golden(name, given):
    inputs = variants.router_inputs(3, given == "bias", seed=20, has_scale=given == "expert_scale")
    index, weight = route(spec=(variants.ROUTERS | variants.MODELS)[name], **inputs)
    golden = GOLDENS["router"][name][given]
    assert index.tolist() == golden["index"]
    np.testing.assert_allclose(weight, golden["weight"], rtol=GOLDEN_TOLERANCE)


@pytest.mark.parametrize("has_biases", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("name", GOLDENS["experts"])
def test_experts_golden(name, has_biases):
    index, weight = route(variants.router_inputs(3, False, seed=20)["logits"], variants.MODELS["gpt_oss"])
    spec = variants.BLOCKS[name]
    weights = variants.expert_weights(spec, has_biases, hidden=4, inner=3, seed=20)
    y = experts(variants.hidden_states(3, hidden=4, seed=20), index, weight, spec=spec, **weights)
    golden = GOLDENS["experts"][name]["bias" if has_biases else "no_bias"]
    np.testing.assert_allclose(y, golden, rtol=GOLDEN_TOLERANCE, atol=GOLDEN_TOLERANCE)


def test_every_variant_has_a_golden():
    assert GOLDENS["router"].keys() == (variants.ROUTERS | variants.MODELS).keys()
    assert GOLDENS["experts"].keys() == variants.BLOCKS.keys()


# Hugging Face.

HIDDEN, INNER, TOKENS = 12, 6, 17


def hf_config(module: object, name: str, **fields: object) -> object:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "intermediate_size": INNER, "hidden_act": "silu"}
    sizes |= {"num_attention_heads": 4, "num_experts_per_tok": 2}
    return getattr(module, name)(**(sizes | fields))


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.normal_(0, 0.6, generator=generator)
    return module.eval()


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


ROUTER_CASES = {
    "qwen3_vl_moe": (
        lambda: modeling_qwen3_vl_moe.Qwen3VLMoeTextTopKRouter(
            hf_config(modeling_qwen3_vl_moe, "Qwen3VLMoeTextConfig", num_experts=8)
        ),
        variants.MODELS["qwen3_vl_moe"],
    ),
    "glm4v_moe": (
        lambda: modeling_glm4v_moe.Glm4vMoeTextTopkRouter(
            hf_config(
                modeling_glm4v_moe,
                "Glm4vMoeTextConfig",
                n_routed_experts=8,
                routed_scaling_factor=2.5,
                n_group=4,
                topk_group=2,
                norm_topk_prob=True,
            )
        ),
        variants.MODELS["deepseek_v3"],  # GLM's router is DeepSeek-V3's
    ),
    "deepseek_v2": (
        lambda: modeling_deepseek_v2.DeepseekV2TopkRouter(
            hf_config(
                modeling_deepseek_v2,
                "DeepseekV2Config",
                n_routed_experts=8,
                routed_scaling_factor=2.0,
                topk_method="group_limited_greedy",
                n_group=4,
                topk_group=2,
            )
        ),
        variants.MODELS["deepseek_v2"],
    ),
    "mistral4": (
        lambda: modeling_mistral4.Mistral4TopkRouter(
            hf_config(
                modeling_mistral4,
                "Mistral4Config",
                n_routed_experts=8,
                routed_scaling_factor=1.0,
                n_group=2,
                topk_group=1,
                norm_topk_prob=True,
            )
        ),
        variants.MODELS["mistral4"],
    ),
    "gpt_oss": (
        lambda: modeling_gpt_oss.GptOssTopKRouter(hf_config(modeling_gpt_oss, "GptOssConfig", num_local_experts=8)),
        variants.MODELS["gpt_oss"],
    ),
}


@pytest.mark.parametrize("model", ROUTER_CASES)
def test_route_agrees_with_hugging_face(model):
    make, spec = ROUTER_CASES[model]
    router = randomize(make())
    logits, hf_weight, hf_index = router(torch.from_numpy(variants.hidden_states(TOKENS, HIDDEN)))
    bias = getattr(router, "e_score_correction_bias", None)
    index, weight = route(numpy(logits), spec, None if bias is None else numpy(bias))
    # Hugging Face leaves the order of the chosen open (sorted=False).
    order, hf_order = np.argsort(index, axis=1), np.argsort(numpy(hf_index), axis=1)
    np.testing.assert_array_equal(np.take_along_axis(index, order, 1), np.take_along_axis(numpy(hf_index), hf_order, 1))
    got, want = np.take_along_axis(weight, order, 1), np.take_along_axis(numpy(hf_weight), hf_order, 1)
    np.testing.assert_allclose(got, want, rtol=HF_TOLERANCE)


def test_gemma4_router_is_softmax_with_factors_for_experts():
    config = hf_config(modeling_gemma4, "Gemma4TextConfig", num_experts=8, top_k_experts=2)
    router = randomize(modeling_gemma4.Gemma4TextRouter(config))
    x = torch.from_numpy(variants.hidden_states(TOKENS, HIDDEN))
    logits = router.proj(router.norm(x) * router.scale * HIDDEN**-0.5)
    _, hf_weight, hf_index = router(x)
    index, weight = route(numpy(logits), RouterSpec(2), None, numpy(router.per_expert_scale))
    np.testing.assert_array_equal(index, numpy(hf_index))
    np.testing.assert_allclose(weight, numpy(hf_weight), rtol=HF_TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 2])
def test_llama4_block_is_sigmoid_routing_with_the_weight_on_the_input(top_k):
    config = hf_config(modeling_llama4, "Llama4TextConfig", num_local_experts=8, num_experts_per_tok=top_k)
    block = randomize(modeling_llama4.Llama4TextMoe(config))
    x = torch.from_numpy(variants.hidden_states(TOKENS, HIDDEN))
    out, logits = block(x)
    routed = numpy(out - block.shared_expert(x))
    index, weight = route(numpy(logits), RouterSpec(top_k, scoring="sigmoid", renormalize=False))
    gate_up, down = (numpy(w).swapaxes(1, 2) for w in (block.experts.gate_up_proj, block.experts.down_proj))
    y = experts(numpy(x), index, weight, gate_up, down, ExpertsSpec(weight_on="input"))
    np.testing.assert_allclose(y, routed, atol=HF_TOLERANCE * np.abs(routed).max())


def test_gpt_oss_experts_are_clamped_swiglu():
    config = hf_config(modeling_gpt_oss, "GptOssConfig", num_local_experts=8, swiglu_limit=0.5)
    module = randomize(modeling_gpt_oss.GptOssExperts(config))
    index, weight = route(variants.router_inputs(TOKENS)["logits"], variants.MODELS["gpt_oss"])
    x = variants.hidden_states(TOKENS, HIDDEN)
    want = numpy(module(torch.from_numpy(x), torch.from_numpy(index).long(), torch.from_numpy(weight)))
    # On disk gate and up take turns, and the matrices stand transposed.
    gate_up, bias = numpy(module.gate_up_proj).swapaxes(1, 2), numpy(module.gate_up_proj_bias)
    gate_up, bias = (np.concatenate([w[:, 0::2], w[:, 1::2]], axis=1) for w in (gate_up, bias))
    down, down_bias = numpy(module.down_proj).swapaxes(1, 2), numpy(module.down_proj_bias)
    spec = ExpertsSpec("swiglu_clamped", alpha=1.702, limit=0.5)
    y = experts(x, index, weight, gate_up, down, spec, bias, down_bias)
    np.testing.assert_allclose(y, want, atol=HF_TOLERANCE * np.abs(want).max())


def test_qwen3_vl_moe_experts_are_gated_silu():
    config = hf_config(modeling_qwen3_vl_moe, "Qwen3VLMoeTextConfig", num_experts=8)
    module = randomize(modeling_qwen3_vl_moe.Qwen3VLMoeTextExperts(config))
    index, weight = route(variants.router_inputs(TOKENS)["logits"], variants.MODELS["qwen3_vl_moe"])
    x = variants.hidden_states(TOKENS, HIDDEN)
    want = numpy(module(torch.from_numpy(x), torch.from_numpy(index).long(), torch.from_numpy(weight)))
    y = experts(x, index, weight, numpy(module.gate_up_proj), numpy(module.down_proj), ExpertsSpec())
    np.testing.assert_allclose(y, want, atol=HF_TOLERANCE * np.abs(want).max())
