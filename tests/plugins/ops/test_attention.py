"""The numpy spec of attention: cases computed by hand, goldens, and Hugging Face's own attention."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import masking_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

from moevlm.plugins.ops.attention import attention, cross_attention, rms_norm, rotate, segment_attention
from moevlm.plugins.ops.spec import AttentionSpec
from tests.support.attention_variants import ATTENTIONS, PAGE, STEPS, AttentionVariant, attention_inputs

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "attention.json").read_text())
GOLDEN_TOLERANCE = 1e-6  # goldens hold 7 digits
HF_TOLERANCE = 5e-6  # two computations in float32, and one in float64
OPTIONAL = ("v", "cos", "sin", "value_cache", "q_norm", "k_norm", "sinks", "visible_end")

Array = np.ndarray


def run(variant: AttentionVariant, inputs: dict[str, Array], **changes: object) -> tuple[Array, ...]:
    return attention(**dict.fromkeys(OPTIONAL) | inputs, spec=replace(variant.spec, **changes))


def kept(cache: Array, pages: Array, length: int) -> Array:
    """The first tokens of a sequence [length, heads, D]."""
    rows = [cache[pages[p // PAGE], :, p % PAGE] for p in range(length)]
    return np.stack(rows) if rows else np.zeros((0, cache.shape[1], cache.shape[3]), cache.dtype)


# By hand: one head of two dimensions, no rotation (cos 1, sin 0), scale 1.


def by_hand(q: list, k: list, v: list, sinks: list | None = None, visible: list | None = None, **spec: object) -> Array:
    cos, sin = np.ones((len(q), 1), np.float32), np.zeros((len(q), 1), np.float32)
    pool = np.full((4, 1, PAGE, 2), np.nan, np.float32)
    made = AttentionSpec(1, 1, 2, scale=1.0, **spec)
    q, k, v = (np.array(x, np.float32) for x in (q, k, v))
    sink = None if sinks is None else np.array(sinks, np.float32)
    steps = np.array([0, len(q)], np.int32), np.array([0], np.int32), np.array([[2, 1, 3]], np.int32)
    end = None if visible is None else np.array(visible, np.int32)
    return attention(q, k, v, cos, sin, pool, pool, *steps, None, None, sink, made, visible_end=end)[0]


LOG3 = float(np.log(3))


def test_weights_are_the_softmax_of_scores_and_causal():
    y = by_hand([[1, 0], [1, 0]], [[0, 0], [LOG3, 0]], [[4, 0], [8, 4]])
    np.testing.assert_allclose(y, [[4, 0], [7, 3]], rtol=1e-6)


def test_sink_takes_its_share_and_gives_nothing():
    y = by_hand([[1, 0]], [[LOG3, 0]], [[4, 8]], sinks=[0])
    np.testing.assert_allclose(y, [[3, 6]], rtol=1e-6)


def test_softcap_bends_scores():
    y = by_hand([[1, 0], [1, 0]], [[0, 0], [1e4, 0]], [[0, 0], [4, 4]], softcap=LOG3)
    np.testing.assert_allclose(y[1], [3, 3], rtol=1e-6)


@pytest.mark.parametrize(("window", "last"), [(0, 2.0), (3, 2.0), (2, 2.5), (1, 3.0)])
def test_window_counts_the_token_itself(window, last):
    y = by_hand([[0, 0]] * 3, [[0, 0]] * 3, [[1, 0], [2, 0], [3, 0]], window=window)
    np.testing.assert_allclose(y[2], [last, 0], rtol=1e-6)


@pytest.mark.parametrize(("chunk", "window", "last"), [(0, 0, 2.5), (3, 0, 4.0), (2, 0, 3.5), (2, 1, 4.0), (1, 0, 4.0)])
def test_chunks_are_cut_where_positions_divide(chunk, window, last):
    values = [[float(i), 0] for i in range(1, 5)]
    y = by_hand([[0, 0]] * 4, [[0, 0]] * 4, values, chunk=chunk, window=window)
    np.testing.assert_allclose(y[3], [last, 0], rtol=1e-6)


def test_chunks_are_those_of_hugging_face():
    """The mask of a layer with chunks, also beside padding in front: positions count from a sequence's first token."""
    sees = masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3]))
    for batch, padding in enumerate((0, 3)):
        place = padding + torch.arange(11)
        seen = sees(batch, 0, place[:, None], place[None]).numpy()
        values = np.stack([np.arange(11.0), np.ones(11)], axis=1)
        got = by_hand(np.zeros((11, 2)), np.zeros((11, 2)), values, chunk=4)
        np.testing.assert_allclose(got, seen @ values / seen.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("visible", "window", "seen"),
    [
        ([1, 4, 4, 4, 5], 0, [[1], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5]]),
        ([1, 4, 4, 4, 5], 2, [[1], [1, 2, 3, 4], [2, 3, 4], [3, 4], [4, 5]]),
        ([0, -7, 9, 4, 9], 0, [[1], [1, 2], [1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3, 4, 5]]),
    ],
    ids=["an image", "an image and a window", "too little and too much"],
)
def test_tokens_see_up_to_where_they_are_told_themselves_included(visible, window, seen):
    values = [[float(i), 0] for i in range(1, 6)]
    y = by_hand([[0, 0]] * 5, [[0, 0]] * 5, values, visible=visible, window=window)
    np.testing.assert_allclose(y[:, 0], [np.mean(each) for each in seen], rtol=1e-6)


def test_rotation_starts_where_the_spec_says_and_leaves_the_rest():
    x = np.array([[[1, 2, 3, 4, 5]]], np.float32)
    quarter = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)  # 90 degrees
    assert rotate(x, *quarter, start=1).tolist() == [[[1, -3, 2, 4, 5]]]


# Pages.


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_each_sequence_of_a_step_gets_what_it_gets_alone_and_contiguous(name, step):
    """The same sequence by itself, its tokens so far in one page that is as long as they are."""
    variant, inputs = ATTENTIONS[name], attention_inputs(ATTENTIONS[name], STEPS[step], seed=3)
    y, *caches = run(variant, inputs)
    for n, (context, length) in enumerate(STEPS[step]):
        if not length:
            continue
        rows = slice(*inputs["query_start"][n : n + 2])
        alone = {key: inputs[key][rows] for key in ("q", "k", "v", "cos", "sin", "visible_end") if key in inputs}
        alone |= {key: inputs[key] for key in ("q_norm", "k_norm", "sinks") if key in inputs}
        for key in {"key_cache", "value_cache"} & inputs.keys():
            past = kept(inputs[key], inputs["page_table"][n], context)
            room = np.zeros((length, *past.shape[1:]), np.float32)
            alone[key] = np.concatenate([past, room]).swapaxes(0, 1)[None]
        places = {"query_start": [0, length], "context_len": [context], "page_table": [[0]]}
        got, *held = run(variant, alone | {key: np.array(value) for key, value in places.items()})
        np.testing.assert_allclose(y[rows], got, rtol=1e-6, atol=1e-7)
        for pool, own in zip(caches, held, strict=True):
            if pool is not None and own is not None:
                mine = kept(pool, inputs["page_table"][n], context + length)
                np.testing.assert_array_equal(mine, own[0].swapaxes(0, 1))


def test_pages_of_nobody_stay_as_they_are():
    variant, inputs = ATTENTIONS["qwen3_vl_moe"], attention_inputs(ATTENTIONS["qwen3_vl_moe"], STEPS["mixture"])
    _, key_cache, value_cache = run(variant, inputs)
    others = [page for page in range(len(key_cache)) if page not in inputs["page_table"][inputs["page_table"] > 0]]
    assert 0 in others and len(others) > 1
    np.testing.assert_array_equal(key_cache[others], inputs["key_cache"][others])
    np.testing.assert_array_equal(value_cache[others], inputs["value_cache"][others])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_golden(name):
    y = run(ATTENTIONS[name], attention_inputs(ATTENTIONS[name], STEPS["mixture"], seed=20))[0]
    np.testing.assert_allclose(y, GOLDENS[name], rtol=GOLDEN_TOLERANCE, atol=GOLDEN_TOLERANCE)


def test_every_variant_has_a_golden():
    assert GOLDENS.keys() == ATTENTIONS.keys()


# Hugging Face: one sequence of 11 tokens.

FORWARDS = {
    "plain": (modeling_qwen3_vl_moe, {}),
    "qwen3_vl_moe": (modeling_qwen3_vl_moe, {}),
    "window": (modeling_qwen3_vl_moe, {}),
    "softcap": (modeling_gemma2, {"softcap": 1.5}),
    "gpt_oss": (modeling_gpt_oss, {}),
    "gemma4": (modeling_gemma4, {}),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_attention_agrees_with_hugging_face(name):
    variant, (module, options) = ATTENTIONS[name], FORWARDS[name]
    spec, inputs = variant.spec, attention_inputs(ATTENTIONS[name], STEPS["prefill"], seed=4)
    q, k, v = (
        torch.from_numpy(inputs[key].reshape(1, 11, heads, 8).swapaxes(1, 2).copy())
        for key, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
    )
    if variant.norms:
        norm = modeling_qwen3_vl_moe.Qwen3VLMoeTextRMSNorm(8, spec.epsilon)
        for x, gain in ((q, "q_norm"), (k, "k_norm")):
            norm.weight.data = torch.from_numpy(inputs[gain])
            x.copy_(norm(x).detach())
    if spec.value_norm:
        v = modeling_gemma4.Gemma4RMSNorm(8, spec.epsilon, with_scale=False)(v)
    cos, sin = (torch.from_numpy(inputs[key]).repeat(1, 2)[None] for key in ("cos", "sin"))
    q, k = modeling_qwen3_vl_moe.apply_rotary_pos_emb(q, k, cos, sin)
    position = np.arange(11)
    behind = position[:, None] - position
    end = inputs.get("visible_end", position + 1)
    seen = ((behind >= 0) | (position < end[:, None])) & (behind < (spec.window or 11))
    mask = torch.from_numpy(np.where(seen, 0, -np.inf).astype(np.float32))[None, None]
    layer = SimpleNamespace(num_key_value_groups=spec.heads // spec.kv_heads, training=False)
    if variant.sinks:
        layer.sinks = torch.from_numpy(inputs["sinks"])
    scale = spec.scale or 8**-0.5
    want = module.eager_attention_forward(layer, q, k, v, mask, scaling=scale, dropout=0.0, **options)[0]
    np.testing.assert_allclose(run(variant, inputs)[0], want[0].flatten(1).numpy(), atol=HF_TOLERANCE)


def test_norm_agrees_with_torch():
    x, gain = np.random.RandomState(1).standard_normal((2, 5, 8)), np.linspace(1, 2, 8)
    want = torch.nn.functional.rms_norm(torch.from_numpy(x), (8,), torch.from_numpy(gain), 1e-3)
    np.testing.assert_allclose(rms_norm(x, gain, 1e-3), want.numpy(), rtol=1e-12)


# Attention among the patches of an image.


def test_images_see_their_own_patches_alone_and_all_of_them():
    random, heads, dim = np.random.RandomState(5), 2, 4
    q, k, v = (random.standard_normal((9, heads * dim)).astype(np.float32) for _ in range(3))
    angle = random.uniform(0, 6, (9, dim // 2))
    cos, sin = np.cos(angle), np.sin(angle)
    y = segment_attention(q, k, v, cos, sin, np.array([0, 4, 4, 9]), heads)
    for rows in (slice(0, 4), slice(4, 9)):
        split = [torch.from_numpy(x[rows].reshape(-1, heads, dim)) for x in (q, k, v)]
        turned = [torch.from_numpy(rotate(x.numpy(), cos[rows], sin[rows])) for x in split[:2]]
        parts = [x.double().transpose(0, 1) for x in (*turned, split[2])]
        want = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)
        np.testing.assert_allclose(y[rows], want.numpy(), rtol=1e-5, atol=1e-6)


def test_without_tables_patches_are_not_rotated():
    q, k, v = np.random.RandomState(6).standard_normal((3, 7, 8)).astype(np.float32)
    still, start = (np.ones((7, 2)), np.zeros((7, 2))), np.array([0, 3, 7])
    y = segment_attention(q, k, v, None, None, start, 2)
    np.testing.assert_array_equal(y, segment_attention(q, k, v, *still, start, 2))


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_the_same_queries_see_the_patches_of_each_image(queries):
    random, heads, dim = np.random.RandomState(7), 2, 4
    q, k, v = (random.standard_normal((rows, heads * dim)).astype(np.float32) for rows in (queries, 10, 10))
    y = cross_attention(q, k, v, np.array([0, 4, 5, 10]), heads)
    assert (y.shape, y.dtype) == ((3, queries, heads * dim), np.float32)
    for found, rows in zip(y, (slice(0, 4), slice(4, 5), slice(5, 10)), strict=True):
        split = [torch.from_numpy(x).double().unflatten(1, (heads, dim)).transpose(0, 1) for x in (q, k[rows], v[rows])]
        want = torch.nn.functional.scaled_dot_product_attention(*split).transpose(0, 1).flatten(1)
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-6)


def test_of_no_images_the_queries_see_nothing():
    q, none = np.ones((3, 8), np.float32), np.zeros((0, 8), np.float32)
    assert cross_attention(q, none, none, np.array([0]), 2).shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 4, "kv_heads": 3, "rotary_dim": 8}, "kv_heads = 3"),
        ({"heads": 4, "kv_heads": 2, "rotary_dim": 7}, "rotary_dim = 7"),
        ({"heads": 4, "kv_heads": 2, "rotary_dim": -2}, "rotary_dim = -2"),
        ({"heads": 4, "kv_heads": 2, "rotary_dim": 8, "window": -1}, "window = -1"),
        ({"heads": 4, "kv_heads": 2, "rotary_dim": 8, "chunk": -1}, "chunk = -1"),
        ({"heads": 4, "kv_heads": 1, "rotary_dim": 8, "value_in_key": True}, "value_dim = 0"),
        ({"heads": 4, "kv_heads": 1, "rotary_dim": 8, "value_dim": 8}, "value_dim = 8"),
        (
            {"heads": 4, "kv_heads": 1, "rotary_dim": 8, "value_in_key": True, "value_dim": 8, "value_norm": True},
            "value_norm = true",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spec_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)
