"""Experts in groups, of which the best are chosen first: GLM-4.5, DeepSeek-V3 and Mistral 4."""

from moevlm.export.config import MoEConfig
from moevlm.export.families.fields import Fields
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec


def grouped_experts(
    text: Fields, scoring: str, *, groups: int = 1, chosen_groups: int = 1, scale: float = 1.0
) -> MoEConfig:
    """The sparse layers of a text model's fields. scoring: sigmoid, with a correction bias, or softmax.

    groups, chosen_groups, scale: n_group, topk_group and routed_scaling_factor where config.json has none. Raises
    CheckpointError for experts that do not fill the groups.
    """
    experts, n_group = text.aliased("n_routed_experts", "num_local_experts"), text.positive("n_group", groups)
    if experts < 2:  # a group scores by its best two
        raise text.invalid("n_routed_experts", experts, "2 or more")
    if experts % n_group or experts < 2 * n_group:
        raise text.invalid("n_group", n_group, f"a divisor of the {experts} experts up to {experts // 2}")
    text.choice("scoring_func", (scoring,), scoring)
    width = text.positive("moe_intermediate_size")
    return MoEConfig(
        experts=experts,
        width=width,
        router=RouterSpec(
            top_k=text.positive("num_experts_per_tok"),
            scoring=scoring,
            renormalize=text.flag("norm_topk_prob", True),
            epsilon=1e-20,
            scale=text.number("routed_scaling_factor", scale),
            n_group=n_group,
            topk_group=text.positive("topk_group", chosen_groups),
            group_score="top2_sum",
        ),
        expert=ExpertsSpec(activation=text.choice("hidden_act", {"silu": "silu"})),
        correction_bias=scoring == "sigmoid",
        shared_width=width * text.positive("n_shared_experts", 1),
    )
