"""What feeds forward in a layer, of the decoder or of a tower: dense, or experts."""

from dataclasses import dataclass

from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

_SCORINGS = {"softmax": "softmax", "sigmoid": "sigmoid", "softmax_after_topk": "softmax of the chosen logits"}


@dataclass(frozen=True)
class MLPConfig:
    """A dense feed-forward layer: gated (down(act(gate) * up), no biases) or plain (fc2(act(fc1)), biases)."""

    width: int
    activation: str
    gated: bool = True


@dataclass(frozen=True)
class MoEConfig:
    """A sparse feed-forward layer.

    router_bias: [experts], part of the logits. correction_bias: [experts] added to scores for the choice alone.
    expert_scale: [experts], factor on a chosen expert's weight. expert_biases: both projections of an expert have one.
    shared_width: of an expert that always runs; 0 for none.
    shared_gate: what the shared expert returns is multiplied by the sigmoid of a projection to one number.
    dense_width: of a dense layer beside the experts, each side with norms of its own (Gemma 4); 0 for none.
    image_width: of as many experts again, with a router like this one, that tokens of images go to instead (ERNIE 4.5
    VL); 0 for none.
    """

    experts: int
    width: int
    router: RouterSpec
    expert: ExpertsSpec
    router_bias: bool = False
    correction_bias: bool = False
    expert_scale: bool = False
    expert_biases: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    dense_width: int = 0
    image_width: int = 0

    def __post_init__(self) -> None:
        self.router.check(self.experts)

    @property
    def words(self) -> str:
        """How tokens go to experts, for people, as `families.about` has it."""
        facts = {
            _SCORINGS[self.router.scoring]: True,
            "correction bias": self.correction_bias,
            "groups": self.router.n_group > 1,
            "renormalised": self.router.renormalize and self.router.scoring != "softmax_after_topk",
            "on the expert's input": self.expert.weight_on == "input",
            "a factor for each expert": self.expert_scale,
        }
        beside = {
            "others for images": self.image_width > 0,
            "gated shared expert" if self.shared_gate else "shared experts": self.shared_width > 0,
            "dense layer beside the experts": self.dense_width > 0,
        }
        parts = (", ".join(word for word, true in group.items() if true) for group in (facts, beside))
        return "; ".join(filter(None, parts))
