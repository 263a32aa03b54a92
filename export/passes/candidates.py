"""The likeliest tokens of each row of logits, beside the logits: what the backends' passes share."""

from abc import abstractmethod
from collections.abc import Iterator

import onnx_ir as ir

from moevlm.export.passes.base import Pass
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS, CANDIDATES

_DTYPES = (ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.FLOAT)


class AddCandidates(Pass):
    """logits [L, vocabulary] float32 -> a node behind it that finds candidates, whose outputs become the graph's.

    A sampler that reads 256 values of a row in place of 150,000 costs next to nothing.
    """

    domain: str

    @abstractmethod
    def node(self, logits: ir.Value, vocabulary: int, count: int) -> ir.Node:
        """A node whose outputs are the `count` largest logits of each row, their ids, and log-sum-exp."""

    def requires(self, model: ir.Model) -> Iterator[str]:
        """There is a float32 output `logits` of known width."""
        found = next((value for value in model.graph.outputs if value.name == "logits"), None)
        if found is None or found.shape is None or not isinstance(found.shape[-1], int):
            yield "there is no output logits of known width"
        elif found.dtype is not ir.DataType.FLOAT:
            yield f"the output logits is {found.dtype}"

    def ensures(self, model: ir.Model) -> Iterator[str]:
        """candidate_values, candidate_ids and log_sum_exp follow the logits."""
        names = [value.name for value in model.graph.outputs]
        behind = names[names.index("logits") + 1 :]
        if tuple(behind[: len(CANDIDATE_OUTPUTS)]) != CANDIDATE_OUTPUTS:
            yield f"the outputs behind logits are {behind}"

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        at = next(i for i, value in enumerate(graph.outputs) if value.name == "logits")
        logits = graph.outputs[at]
        assert logits.shape is not None
        rows, vocabulary = logits.shape
        assert isinstance(vocabulary, int)
        count = min(CANDIDATES, vocabulary)
        node = self.node(logits, vocabulary, count)
        shapes = ([rows, count], [rows, count], [rows])
        for value, name, shape, dtype in zip(node.outputs, CANDIDATE_OUTPUTS, shapes, _DTYPES, strict=True):
            value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        graph.append(node)
        graph.outputs[at + 1 : at + 1] = node.outputs
        graph.opset_imports[self.domain] = 1
        return 1
