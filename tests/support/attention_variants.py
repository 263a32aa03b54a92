"""The variants of paged attention, and inputs for them: what each implementation is tested with.

Inputs come from `RandomState`, whose stream numpy has frozen (NEP 19), so a seed in a golden stays the same data.
"""

from dataclasses import dataclass

import numpy as np

from bench.visible_end import visible_ends
from moevlm.plugins.ops.spec import AttentionSpec

PAGE = 4  # tokens, so that a few of them take several pages


@dataclass(frozen=True)
class AttentionVariant:
    """A spec, the sizes of a head, and which optional inputs a node has. value_dim: of v; 0 where it is in the key.

    images: some tokens of a step see each other, as `visible_end` says.
    """

    spec: AttentionSpec
    key_dim: int = 8
    value_dim: int = 8
    norms: bool = False
    sinks: bool = False
    images: bool = False


ATTENTIONS: dict[str, AttentionVariant] = {
    "plain": AttentionVariant(AttentionSpec(4, 4, 8)),
    "grouped": AttentionVariant(AttentionSpec(6, 2, 8)),
    "one_kv_head": AttentionVariant(AttentionSpec(4, 1, 8)),
    "qwen3_vl_moe": AttentionVariant(AttentionSpec(4, 2, 8, epsilon=0.05), norms=True),
    "glm4v_moe": AttentionVariant(AttentionSpec(4, 2, 4)),
    "no_rotation": AttentionVariant(AttentionSpec(4, 2, 0, epsilon=0.05), norms=True),
    "window": AttentionVariant(AttentionSpec(4, 2, 8, window=5)),
    "softcap": AttentionVariant(AttentionSpec(4, 2, 8, softcap=1.5)),
    "gpt_oss": AttentionVariant(AttentionSpec(4, 2, 8, window=3), sinks=True),
    "gemma4": AttentionVariant(
        AttentionSpec(4, 2, 8, scale=1.0, window=5, epsilon=0.05, value_norm=True), norms=True, images=True
    ),
    "gemma4, values from keys": AttentionVariant(
        AttentionSpec(4, 2, 4, epsilon=0.05, value_is_key=True, value_norm=True), norms=True
    ),
    "chunk": AttentionVariant(AttentionSpec(4, 2, 8, chunk=6)),
    "window in a chunk": AttentionVariant(AttentionSpec(4, 1, 8, window=3, chunk=7)),
    "values are keys": AttentionVariant(AttentionSpec(4, 1, 8, value_is_key=True)),
    "images without a window": AttentionVariant(AttentionSpec(4, 1, 8), images=True),
    "everything": AttentionVariant(
        AttentionSpec(
            4, 2, 4, rotary_start=2, scale=0.5, window=6, softcap=2.0, epsilon=0.05, value_norm=True, chunk=8
        ),
        value_dim=6,
        norms=True,
        sinks=True,
        images=True,
    ),
    "mla": AttentionVariant(
        AttentionSpec(4, 1, 4, rotary_start=8, scale=0.25, value_in_key=True, value_dim=8), key_dim=12, value_dim=0
    ),
}
"""Every attribute and optional input; models by their names. Epsilons show in the result."""

STEPS: dict[str, tuple[tuple[int, int], ...]] = {
    "prefill": ((0, 11),),
    "decode": ((13, 1),),
    "mixture": ((0, 5), (9, 1), (4, 7), (16, 1), (3, 2)),
    "with empty sequences": ((2, 0), (5, 3), (0, 0), (7, 1), (6, 0)),
}
"""Steps as (tokens kept, tokens in the step) of each sequence."""


def attention_inputs(
    variant: AttentionVariant, sequences: tuple[tuple[int, int], ...], seed: int = 0
) -> dict[str, np.ndarray]:
    """The op's inputs by name, those that are absent left out. Pages lie in random order and hold what others left."""
    random, spec = np.random.RandomState(seed), variant.spec
    contexts, lengths = zip(*sequences, strict=True)
    tokens, needed = sum(lengths), [-(-(context + length) // PAGE) for context, length in sequences]
    pages = 1 + sum(needed) + 2
    table = np.zeros((len(sequences), max(1, *needed, 0) + 1), np.int32)
    order = iter(1 + random.permutation(pages - 1))
    for n, count in enumerate(needed):
        table[n, :count] = [next(order) for _ in range(count)]
    angle = random.uniform(0, 6, (tokens, spec.rotary_dim // 2))
    inputs = {
        "q": 2 * random.standard_normal((tokens, spec.heads * variant.key_dim)),
        "k": random.standard_normal((tokens, spec.kv_heads * variant.key_dim)),
        "v": random.standard_normal((tokens, spec.kv_heads * variant.value_dim)),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "key_cache": random.standard_normal((pages, spec.kv_heads, PAGE, variant.key_dim)),
        "value_cache": random.standard_normal((pages, spec.kv_heads, PAGE, variant.value_dim)),
        "q_norm": random.uniform(0.5, 1.5, variant.key_dim),
        "k_norm": random.uniform(0.5, 1.5, variant.key_dim),
        "sinks": random.standard_normal(spec.heads),
    }
    absent = {"value_cache"} if spec.value_in_key else set()
    absent |= set() if spec.has_values else {"v"}
    absent |= set() if spec.rotary_dim else {"cos", "sin"}
    absent |= set() if variant.norms else {"q_norm", "k_norm"}
    absent |= set() if variant.sinks else {"sinks"}
    visible = {"visible_end": visible_ends(sequences, random)} if variant.images else {}
    return {name: array.astype(np.float32) for name, array in inputs.items() if name not in absent} | {
        "query_start": np.cumsum([0, *lengths]).astype(np.int32),
        "context_len": np.array(contexts, np.int32),
        "page_table": table,
        **visible,
    }
