"""Dense layers pruned to 2:4."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from moevlm.export.formats.encoded import pruned
from moevlm.export.graph.weights import WeightTensor, weight_of
from moevlm.export.passes.base import Pass, left
from moevlm.export.passes.pack_projections import is_projection
from moevlm.plugins.ops.spec import DOMAIN


class PruneTwoOfFour(Pass):
    """Weights of dense layers -> the same initializers with the two smallest of every four along the input axis zero.

    Routers, routed experts, embeddings of tokens and patches, and the head stay as they are; so does a matrix whose
    width is no multiple of four, which no sparse kernel takes.
    """

    def requires(self, model: ir.Model) -> Iterator[str]:
        """The canonical graph: standard operators and moevlm's."""
        yield from left(model, "of other domains", lambda node: node.domain not in ("", DOMAIN))

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """Every weight that `prunable` names is 2:4, by its first row."""
        for value in prunable(model):
            kept = np.count_nonzero(weight_of(value).rows(0, 1).reshape(-1, 4), axis=1)
            if (kept > 2).any():
                yield f"{value.name} has more than two of four"

    def apply(self, model: ir.Model) -> int:
        found = prunable(model)
        for value in found:
            value.const_value = WeightTensor(str(value.name), pruned(weight_of(value)))
        return len(found)


def prunable(model: ir.Model) -> list[ir.Value]:
    """The initializers [N, K] that `PruneTwoOfFour` takes, all of whose users are dense layers."""
    graph = model.graph
    dense = [node for node in graph if is_projection(node) and not _is_first_or_last(graph, node)]
    weights = dict.fromkeys(value for node in dense if (value := node.inputs[1]) is not None)
    users = set(dense)
    return [
        value
        for value in weights
        if weight_of(value).shape[1] % 4 == 0 and all(user in users for user in value.consumers())
    ]


def pruned_count(model: ir.Model) -> int:
    """How many weights `PruneTwoOfFour` sets to zero."""
    return sum(weight_of(value).shape[0] * weight_of(value).shape[1] for value in prunable(model)) // 2


def _is_first_or_last(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether it embeds an input of the graph, or makes the logits."""
    return node.inputs[0] in graph.inputs or node.outputs[0].name == "logits"
