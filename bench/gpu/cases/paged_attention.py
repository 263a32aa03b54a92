"""Attention over pages."""

from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch

from bench import paged_attention
from bench.gpu.cases.base import Arrays, Case, Cases
from bench.paged_attention import Sequences
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES
from moevlm.plugins.gpu.ops.paged_attention import CACHES, PagedAttentionOp
from moevlm.plugins.ops.spec import AttentionSpec

NORMS, SINKS, IMAGES = ({f"has_{name}": True} for name in ("norms", "sinks", "visible_end"))
# Specs, sizes of a key and a value, and optional inputs: each attribute, and models by their sizes.
SPECS: tuple[tuple[AttentionSpec, int, int, dict[str, bool]], ...] = (
    (AttentionSpec(8, 1, 128, epsilon=1e-6), 128, 128, NORMS),  # 8 query heads to a KV head, as Qwen3-VL-30B
    (AttentionSpec(32, 2, 128, epsilon=1e-6), 128, 128, NORMS),  # 16, as Qwen3-VL-235B
    (AttentionSpec(12, 1, 64), 128, 128, {}),  # half rotated, as GLM-4.5V
    (AttentionSpec(4, 4, 64, window=100), 64, 64, SINKS),  # as gpt-oss
    (AttentionSpec(4, 2, 256, window=70, softcap=50.0), 256, 256, {}),  # as Gemma 2
    (AttentionSpec(8, 1, 64, epsilon=1e-6), 256, 256, NORMS),  # as Qwen3.5
    (AttentionSpec(10, 2, 128, chunk=100), 128, 128, {}),  # as Llama 4
    # Gemma 4, where it has a window and where it has none.
    (AttentionSpec(4, 2, 256, scale=0.1, window=70, value_norm=True), 256, 256, NORMS | IMAGES),
    (AttentionSpec(8, 1, 512, scale=0.1, value_is_key=True, value_norm=True), 512, 512, NORMS),
    # Latents of Mistral 4, and of DeepSeek-V3 with some of its heads.
    (AttentionSpec(32, 1, 64, rotary_start=256, scale=0.09, value_in_key=True, value_dim=256), 320, 256, {}),
    (AttentionSpec(16, 1, 64, rotary_start=512, scale=0.07, value_in_key=True, value_dim=512), 576, 512, {}),
    (AttentionSpec(6, 2, 0, scale=0.1), 72, 96, {}),
)
KEPT = (1, 63, 130, 64, 700)  # tokens of sequences that are decoded
MIXED = ((3, 40), (0, 1), (5, 0), (64, 70), (700, 1))
MANY, SHORT = 64, 3  # of more sequences than that, only the first so many kinds, which are short


@dataclass(frozen=True)
class SequencesCall:
    """The tokens that each sequence has, and its new ones."""

    sequences: Sequences

    def __str__(self) -> str:
        shown = ", ".join(f"{kept}+{new}" for kept, new in self.sequences[:3])
        return f"{len(self.sequences)} sequences: {shown}{', ...' if len(self.sequences) > 3 else ''}"


def _some(kinds: Sequences, count: int) -> Sequences:
    return tuple(islice(cycle(kinds if count <= MANY else kinds[:SHORT]), count))


class PagedAttentionCases(Cases):
    """See `Cases`."""

    kind, step = PagedAttentionOp, 6

    def every_op(self) -> list[PagedAttentionOp]:
        """Every dtype with every kind of cache and every spec."""
        kinds = [(dtype, cache) for dtype in ACTIVATION_DTYPES for cache in CACHES]
        return [
            PagedAttentionOp(spec, key_dim, value_dim, dtype, cache, 64, **inputs)
            for dtype, cache in kinds
            for spec, key_dim, value_dim, inputs in SPECS
        ]

    def describe(self, op: PagedAttentionOp) -> str:
        spec = op.spec
        sizes = f"{op.key_dim}" if op.key_dim == op.value_dim else f"{op.key_dim} and {op.value_dim}"
        parts = (
            f"paged attention {spec.heads} heads on {spec.kv_heads} of {sizes} {op.dtype}",
            f" cache {op.cache}" if op.cache else "",
            f" window {spec.window}" if spec.window else "",
            f" chunk {spec.chunk}" if spec.chunk else "",
            f" softcap {spec.softcap:g}" if spec.softcap else "",
            " norms" if op.has_norms else "",
            " sinks" if op.has_sinks else "",
            " images" if op.has_visible_end else "",
        )
        return "".join(parts)

    def calls(self, draft: Draft) -> list[SequencesCall]:
        """Of each number of shares: decode of as many sequences, a prompt of as many tokens, and a mixture of as many
        sequences with a longer prompt.
        """
        limits: dict[str, set[int]] = {"T": set(), "N": {0}}
        for bound in (bound for variant in draft.variants for bound in variant.bounds if len(bound.slopes) == 1):
            ((name, slope),) = bound.slopes.items()
            limits[name].add(-bound.offset // slope)
        counts = sorted({1, *limits["N"], max(limits["N"]) + 1} - {0})
        longer = max(limits["T"], default=0) + 1
        decode = [_some(tuple((kept, 1) for kept in KEPT), n) for n in counts]
        prompts = [((70, tokens),) for tokens in sorted(limits["T"] - {1})]
        mixtures = [((9, longer), *_some(MIXED, n - 1)) for n in counts]
        return [SequencesCall(call) for call in (*decode, *prompts, *mixtures, ((0, 300),), ((500, 130), (0, 33)))]

    def case(self, op: PagedAttentionOp, call: SequencesCall, seed: int) -> Case:
        inputs = paged_attention.draw_inputs(op, call.sequences, seed)

        def deviation(found: Arrays) -> float:
            """y, and caches whose codes and scales are bytes again."""
            y, *caches = found
            names = [tensor.name for tensor in op.inputs if tensor.written]
            stored = [np.ascontiguousarray(c.astype(inputs[name].dtype)) for name, c in zip(names, caches, strict=True)]
            return paged_attention.deviation(op, inputs, [y, *stored])

        given = [torch.from_numpy(inputs[tensor.name]).to(getattr(torch, tensor.dtype)) for tensor in op.inputs]
        return Case(given, deviation)
