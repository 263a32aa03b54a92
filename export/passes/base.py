"""What a graph rewrite is, and how a target's list of them is run."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moevlm.export.graph.functions import add_functions

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators


class Pass(ABC):
    """One rewrite of a whole model, in place.

    The docstring of each pass says what it Requires of a model and what it Ensures. A pass reads no weight: where it
    rearranges one, it wraps the initializer's recipe (`moevlm.export.graph.weights`). What it leaves without a user
    stays in the graph until `run` ends.
    """

    @abstractmethod
    def apply(self, model: ir.Model) -> int:
        """Rewrite `model` and return how many rewrites that took: 0 means that the model is as it was."""


class NodePass(Pass):
    """Replaces every node of the main graph that `matches`, each alone, by nodes of the operator set `domain`."""

    domain: str

    @abstractmethod
    def matches(self, node: ir.Node) -> bool:
        """Whether `replace` is for this node."""

    @abstractmethod
    def replace(self, graph: ir.Graph, node: ir.Node) -> None:
        """Put others in its place."""

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if self.matches(node)]
        for node in found:
            self.replace(model.graph, node)
        if found:
            model.graph.opset_imports[self.domain] = 1
        return len(found)


def substitute(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """`new` in the place of `old`, its outputs under the same names."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def run(passes: Iterable[Pass], model: ir.Model) -> dict[str, int]:
    """Apply `passes` in order, drop nodes and initializers that nothing uses any more, give moevlm nodes their bodies.

    Returns the number of rewrites by class name.
    """
    counts: dict[str, int] = {}
    for step in passes:
        name = type(step).__name__
        counts[name] = counts.get(name, 0) + step.apply(model)
    RemoveUnusedNodesPass()(model)
    add_functions(model)
    return counts
