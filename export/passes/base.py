"""What a graph rewrite is, and how a target's list of them is run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moevlm.export.graph.functions import add_functions
from moevlm.plugins.ops.spec import DOMAIN
from moevlm.runtime.core.errors import PassError

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
_DECIDERS = ("MoERouter", "MoE", "QMoE", "GatedDelta")  # of what they read, some stays float32
_checked: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def checked() -> Iterator[None]:
    """Inside of the block `run` holds every pass to what it requires and ensures, which costs time."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


class Pass(ABC):
    """One rewrite of a whole model, in place.

    `requires` and `ensures` say in code what a pass takes for granted of a model, the passes before it included, and
    what it leaves behind; inside of `checked` they are held to every model. A pass reads no weight: where it
    rearranges one, it wraps the initializer's recipe (`moevlm.export.graph.weights`). What it leaves without a user
    stays in the graph until `run` ends.
    """

    def requires(self, model: ir.Model) -> Iterator[str]:  # noqa: ARG002
        """What of `model` this pass cannot take, a line each; nothing by default."""
        yield from ()

    def ensures(self, model: ir.Model) -> Iterator[str]:  # noqa: ARG002
        """What of `model`, rewritten, this pass should not have left, a line each; nothing by default."""
        yield from ()

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


def _hold(what: str, problems: Iterator[str]) -> None:
    for problem in problems:
        raise PassError(f"{what} otherwise, but {problem}")


def left(model: ir.Model, what: str, matches: Callable[[ir.Node], bool]) -> Iterator[str]:
    """A line if there are nodes that match. what: their name, for people."""
    found = [node for node in model.graph if matches(node)]
    if found:
        yield f"there are {len(found)} nodes {what}, first {found[0].name or found[0].outputs[0].name}"


def replaced_deciders(model: ir.Model) -> Iterator[str]:
    """A line if a router or a gated state is no moevlm op any more: what it decides by looks like a projection then."""
    yield from left(model, "that decide", lambda node: node.op_type in _DECIDERS and node.domain != DOMAIN)


def substitute(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """`new` in the place of `old`, its outputs under the same names."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


def run(passes: Iterable[Pass], model: ir.Model) -> dict[str, int]:
    """Apply `passes` in order, drop nodes and initializers that nothing uses any more, give moevlm nodes their bodies.

    Returns the number of rewrites by class name. Raises PassError inside of `checked` where a pass does not get what
    it requires, or does not do what it ensures: a mistake of this program.
    """
    counts: dict[str, int] = {}
    for step in passes:
        name = type(step).__name__
        if _checked.get():
            _hold(f"{name} requires", step.requires(model))
        counts[name] = counts.get(name, 0) + step.apply(model)
        if _checked.get():
            _hold(f"{name} ensures", step.ensures(model))
    RemoveUnusedNodesPass()(model)
    add_functions(model)
    return counts
