"""The likeliest tokens of each row of logits, found by a TensorRT plugin: a step brings back kilobytes."""

import onnx_ir as ir

from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN, Programs, plugin_node
from moevlm.export.passes.candidates import AddCandidates
from moevlm.plugins.gpu.ops.candidates import CandidatesOp


class PluginCandidates(AddCandidates):
    """logits [L, vocabulary] -> a plugin behind it."""

    domain = DOMAIN

    def __init__(self, programs: Programs) -> None:
        self.programs = programs

    def node(self, logits: ir.Value, vocabulary: int, count: int) -> ir.Node:
        return plugin_node(CandidatesOp(vocabulary, count), [logits], self.programs)
