"""Chat templates to Python by Jinja's compiler, with calls of the environment for all that makes or compares values."""

from __future__ import annotations

from types import CodeType
from typing import Any

from jinja2 import Environment, meta, nodes
from jinja2.compiler import CodeGenerator, Frame, operators

from moevlm.runtime.core.errors import BundleError

MAX_SOURCE = 1 << 18
# What chat templates are made of. Jinja's other statements read files or switch the escaping of HTML on.
_KNOWN = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.NSRef),
    *(nodes.Assign, nodes.AssignBlock, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock),
    *(nodes.With, nodes.Scope, nodes.ExprStmt, nodes.Break, nodes.Continue, nodes.Call, nodes.Filter, nodes.Test),
    *(nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr, nodes.Concat, nodes.CondExpr),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword),
)


class TemplateCode:
    """A compiled template.

    variables: names that it reads from outside, without those that it sets itself and never tests for being defined.
    literals: the texts written in it.
    """

    def __init__(self, source: str, environment: Environment) -> None:
        """Raises BundleError for a template that is malformed, too large, or uses what no chat template needs."""
        if len(source) > MAX_SOURCE:
            raise BundleError(f"chat_template.jinja has {len(source)} characters (allowed: up to {MAX_SOURCE})")
        tree = environment.parse(source)
        self.literals: list[str] = []
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, _KNOWN):
                raise BundleError(f"chat_template.jinja, line {node.lineno}: {type(node).__name__} is not supported")
            text = node.value if isinstance(node, nodes.Const) else getattr(node, "data", None)
            if isinstance(text, str):
                self.literals.append(text)
        # On a tree of its own: looking for them folds constants, out of the sight of our compiler.
        read = meta.find_undeclared_variables(environment.parse(source))
        self.variables = frozenset(read - (_set_in(tree) - _tested_in(tree)))
        self.code: CodeType = environment.compile(tree)


def _set_in(tree: nodes.Template) -> set[str]:
    return {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}


def _tested_in(tree: nodes.Template) -> set[str]:
    """Names whose value is asked for with care: `x is defined`, `x is undefined`, `x | default(...)`."""
    tests = [node.node for node in tree.find_all(nodes.Test) if node.name in ("defined", "undefined")]
    filters = [node.node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d")]
    return {node.name for node in (*tests, *filters) if isinstance(node, nodes.Name)}


class Compiler(CodeGenerator):
    """Writes a call of the environment where Jinja writes Python's own operator or display."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self._iterated: set[int] = set()

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.literal({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def _output_const_repr(self, group: Any) -> str:
        return f"environment.literal({super()._output_const_repr(group)})"

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.tilde((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._wrapped("made", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._wrapped("made", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._wrapped("made", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._wrapped("touched", self.visit, node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._wrapped("touched", self.visit, operand.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self.write("environment.getitem(")
        self.visit(node.node, frame)
        self.write(", ")
        if isinstance(node.arg, nodes.Const):
            self.write(repr(node.arg.value))
        else:
            self.visit(node.arg, frame)
        self.write(")")

    def visit_Slice(self, node: nodes.Slice, frame: Frame) -> None:
        self.write("slice(")
        for part in (node.start, node.stop, node.step):
            if part is None:
                self.write("None")
            else:
                self.visit(part, frame)
            self.write(", ")
        self.write(")")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        self._iterated.add(id(node.iter))
        super().visit_For(node, frame)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if id(node) not in self._iterated:
            return super().visit(node, *args, **kwargs)
        self._iterated.discard(id(node))
        self._wrapped("counted", self.visit, node, *args)
        return None

    def _wrapped(self, name: str, visit: Any, node: nodes.Node, frame: Frame) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")
