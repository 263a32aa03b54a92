"""The kernels: Triton functions, one source for every GPU and dtype, run-time parameters first, then constants.

Two constants are other ones where Triton's interpreter launches: INTERPRETED is true, as it has no arithmetic in
bfloat16, so everything is float32 there between a load and a store; OVERLAPS is false, as launches never overlap.
"""

from moevlm.plugins.gpu.kernels.attention.cross import cross_attention
from moevlm.plugins.gpu.kernels.attention.decode import decode
from moevlm.plugins.gpu.kernels.attention.merge import merge
from moevlm.plugins.gpu.kernels.attention.prefill import prefill
from moevlm.plugins.gpu.kernels.attention.segment import rotate_patches, segment_attention
from moevlm.plugins.gpu.kernels.attention.write import write_pages
from moevlm.plugins.gpu.kernels.delta.chunks import delta_chunks
from moevlm.plugins.gpu.kernels.delta.convolve import convolve
from moevlm.plugins.gpu.kernels.delta.recurrent import delta_recurrent
from moevlm.plugins.gpu.kernels.delta.scan import delta_scan
from moevlm.plugins.gpu.kernels.moe.few import few_down, few_gate_up, single_down
from moevlm.plugins.gpu.kernels.moe.fp8 import fp8_down, fp8_gate_up, quantize_rows
from moevlm.plugins.gpu.kernels.moe.grouped import combine, grouped_down, grouped_gate_up
from moevlm.plugins.gpu.kernels.moe.permutation import count_rows, place_rows, sort_rows, start_rows
from moevlm.plugins.gpu.kernels.moe.persistent import persistent_down, persistent_gate_up
from moevlm.plugins.gpu.kernels.moe.router import route
from moevlm.plugins.gpu.kernels.sampling.candidates import choose_logits, group_logits

__all__ = [
    "choose_logits",
    "combine",
    "convolve",
    "count_rows",
    "cross_attention",
    "decode",
    "delta_chunks",
    "delta_recurrent",
    "delta_scan",
    "few_down",
    "few_gate_up",
    "group_logits",
    "fp8_down",
    "fp8_gate_up",
    "grouped_down",
    "grouped_gate_up",
    "merge",
    "persistent_down",
    "persistent_gate_up",
    "place_rows",
    "prefill",
    "rotate_patches",
    "quantize_rows",
    "route",
    "segment_attention",
    "single_down",
    "sort_rows",
    "start_rows",
    "write_pages",
]
