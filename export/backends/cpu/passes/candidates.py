"""The likeliest tokens of each row of logits, found by moevlm's own CPU kernel."""

import onnx_ir as ir

from moevlm.export.passes.candidates import AddCandidates
from moevlm.runtime.backends.libraries import DOMAIN as CPU
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS


class CpuCandidates(AddCandidates):
    """logits [L, vocabulary] -> moevlm.cpu::Candidates behind it."""

    domain = CPU

    def node(self, logits: ir.Value, vocabulary: int, count: int) -> ir.Node:  # noqa: ARG002 - the kernel sees it
        return ir.node("Candidates", [logits], {"count": count}, domain=CPU, num_outputs=len(CANDIDATE_OUTPUTS))
