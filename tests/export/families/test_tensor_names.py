"""Tensors to canonical weights: every name and layout on disk, one line for what is missing or left over."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import family_for
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import CheckpointError
from tests.support.checkpoints import FAMILIES, canonical, families, refused
from tests.support.families import TINY
from tests.support.tiny import edit_json, edit_tensors, old_rope, swap_experts


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize(
    "options",
    [{"hub": True}, {"shard_size": "20KB"}, {"hub": True, "shard_size": "20KB"}],
    ids=["as on the hub", "shards", "as on the hub, in shards"],
)
def test_qwen_layouts_on_disk_are_one_canonical_model(
    options: dict[str, Any], saved: dict[str, Path], save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(**options)
    assert (len(list(directory.glob("*.safetensors"))) > 2) == ("shard_size" in options)
    assert_same(canonical(directory), canonical(saved["qwen3_vl_moe"]))


def test_glm_shards_are_one_canonical_model(saved: dict[str, Path], save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="glm4v_moe", shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert_same(canonical(directory), canonical(saved["glm4v_moe"]))


def fuse_experts(tensors: dict[str, torch.Tensor], in_out: bool) -> None:
    """Experts that are stored one by one as one tensor of a layer and part."""
    pattern = r"(.*mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight"
    found = [match for name in tensors if (match := re.fullmatch(pattern, name))]
    for base in {match[1] for match in found}:
        number = sum(match[1] == base for match in found) // 3
        gate, up, down = (
            torch.stack([tensors.pop(f"{base}.{e}.{part}_proj.weight") for e in range(number)])
            for part in ("gate", "up", "down")
        )
        gate_up = torch.cat([gate, up], 1)
        tensors[f"{base}.gate_up_proj"] = gate_up.mT if in_out else gate_up
        tensors[f"{base}.down_proj"] = down.mT if in_out else down


def split_experts(tensors: dict[str, torch.Tensor]) -> None:
    """The reverse, from [E, H, 2I] and [E, I, H]."""
    for name in [name for name in tensors if name.endswith("mlp.experts.gate_up_proj")]:
        base = name.removesuffix(".gate_up_proj")
        gate, up = tensors.pop(name).mT.chunk(2, 1)
        for part, experts in (("gate", gate), ("up", up), ("down", tensors.pop(f"{base}.down_proj").mT)):
            tensors |= {f"{base}.{e}.{part}_proj.weight": expert for e, expert in enumerate(experts)}


LAYOUT_CHANGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None]]] = {
    "qwen3_vl_moe: one by one": ("qwen3_vl_moe", split_experts),
    "glm4v_moe: fused": ("glm4v_moe", lambda tensors: fuse_experts(tensors, in_out=False)),
    "glm4v_moe: fused and transposed": ("glm4v_moe", lambda tensors: fuse_experts(tensors, in_out=True)),
    "qwen3_5_moe: fused": ("qwen3_5_moe", lambda tensors: fuse_experts(tensors, in_out=False)),
    "qwen3_5_moe: fused and transposed": ("qwen3_5_moe", lambda tensors: fuse_experts(tensors, in_out=True)),
}


@pytest.mark.parametrize("name", LAYOUT_CHANGES)
def test_experts_in_any_layout_are_one_canonical_model(
    name: str, saved: dict[str, Path], save_checkpoint: Callable[..., Path]
) -> None:
    model_type, change = LAYOUT_CHANGES[name]
    directory = save_checkpoint(model_type=model_type, hub=model_type == "qwen3_vl_moe")
    before = Checkpoint.open(directory).tensors.keys()
    edit_tensors(directory, change)
    assert Checkpoint.open(directory).tensors.keys() != before
    assert_same(canonical(directory), canonical(saved[model_type]))


def test_each_layer_may_have_a_layout_of_its_own(saved: dict[str, Path], save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(hub=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        one = {name: tensors.pop(name) for name in list(tensors) if "layers.1.mlp.experts" in name}
        split_experts(one)
        tensors |= one

    edit_tensors(directory, change)
    assert_same(canonical(directory), canonical(saved["qwen3_vl_moe"]))


def test_layout_option_is_refused_where_experts_are_not_fused(saved: dict[str, Path]) -> None:
    refused(
        CheckpointError,
        "--expert-layout in_out is for fused experts",
        "experts.0.gate_proj.weight",
        act=lambda: canonical(saved["glm4v_moe"], "in_out"),
    )


TEXT = "model.language_model."
SPELLINGS: dict[str, Callable[[str], str]] = {
    "the base model alone": lambda name: name.removeprefix("model."),
    "the vision tower alone": lambda name: name.removeprefix("model.") if "visual" in name else name,
    "model twice": lambda name: f"model.{name}",
    "model inside the language model": lambda name: name.replace(TEXT, f"{TEXT}model."),
    "language_model.model.model": lambda name: name.replace(TEXT, "language_model.model.model."),
}
# How a prefix that transformers does not know is told.
WRONG_PREFIXES: dict[str, tuple[Callable[[str], str], str]] = {
    "adapter": (lambda name: f"base_model.model.{name}", "all tensors start with base_model.model., which must be"),
    "older": (
        lambda name: name.replace(TEXT, "language_model.model."),
        "are there under the prefix language_model.model. instead of model.language_model.",
    ),
    "text alone": (lambda name: name.replace(TEXT, ""), f"are there without the prefix {TEXT}"),
}


def rename(directory: Path, spell: Callable[[str], str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {spell(name): tensors.pop(name) for name in list(tensors)}
        tensors |= renamed

    edit_tensors(directory, change)


# transformers finds no experts there.
MORE_THAN_TRANSFORMERS = [("qwen3_5_moe", "model twice")]


@pytest.mark.parametrize(
    ("model_type", "spelling"),
    [
        (model_type, spelling)
        for model_type in FAMILIES
        for spelling in (*SPELLINGS, *WRONG_PREFIXES)
        if (model_type, spelling) not in MORE_THAN_TRANSFORMERS
    ],
)
def test_prefixes_are_those_that_transformers_accepts(
    model_type: str, spelling: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    directory = Path(shutil.copytree(saved[model_type], tmp_path / "copy"))
    spell, told = WRONG_PREFIXES[spelling] if spelling in WRONG_PREFIXES else (SPELLINGS[spelling], "")
    rename(directory, spell)
    _, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert bool(info["missing_keys"]) == bool(told)
    if told:
        refused(CheckpointError, "the checkpoint lacks tensor model.", " more", told, act=lambda: canonical(directory))
    else:
        assert_same(canonical(directory), canonical(saved[model_type]))


def test_missing_tensors_are_counted_without_a_prefix_where_none_explains_them(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(saved["qwen3_vl_moe"], tmp_path / "copy"))
    rename(directory, lambda name: name.replace("self_attn", "attention"))
    with pytest.raises(
        CheckpointError, match=r"lacks tensor model\.language_model\.layers\.0\.self_attn.* and 11 more$"
    ):
        canonical(directory)


FLOAT32_ON_THE_HUB = "e_score_correction_bias"  # among half precision


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_widened_value_by_value(
    dtype: str, model_type: str, save_checkpoint: Callable[..., Path]
) -> None:
    wide, rounded = save_checkpoint(model_type=model_type), save_checkpoint(model_type=model_type, dtype=dtype)

    def narrow_and_widen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if not name.endswith(FLOAT32_ON_THE_HUB):
                tensors[name] = tensor.to(getattr(torch, dtype)).float()

    kept: dict[str, torch.Tensor] = {}
    edit_tensors(
        wide, lambda tensors: kept.update({n: t for n, t in tensors.items() if n.endswith(FLOAT32_ON_THE_HUB)})
    )
    edit_tensors(wide, narrow_and_widen)
    edit_tensors(rounded, lambda tensors: tensors.update(kept))
    assert_same(canonical(rounded), canonical(wide))


def test_gate_rows_come_before_up_rows(saved: dict[str, Path]) -> None:
    """Hugging Face's own module on the same tensors says which half is which."""
    from transformers import AutoModelForImageTextToText

    for name in FAMILIES:
        directory = saved[name]
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
        experts = model.model.language_model.layers[1].mlp.experts
        weights = canonical(directory)
        for part in ("gate_up", "down"):
            np.testing.assert_array_equal(
                weights[f"decoder.layers.1.feed_forward.{part}"],
                getattr(experts, f"{part}_proj").detach().numpy(),
                err_msg=name,
            )


# 2 * moe_intermediate_size == hidden_size makes gate_up square, moe_intermediate_size == hidden_size makes down square.
SQUARE = {"gate_up": {"moe_intermediate_size": 16}, "down": {"moe_intermediate_size": 32}}
squares = pytest.mark.parametrize("square", SQUARE)


@squares
def test_square_experts_of_a_fresh_save_are_read_as_their_sibling_lies(
    square: str, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(text=SQUARE[square])
    assert_same(canonical(directory), canonical(directory, "out_in"))


@squares
def test_square_experts_as_on_the_hub_are_refused_until_the_option_says(
    square: str, save_checkpoint: Callable[..., Path]
) -> None:
    fresh, hub = save_checkpoint(text=SQUARE[square]), save_checkpoint(text=SQUARE[square], hub=True)
    refused(
        CheckpointError,
        f"layers.0.mlp.experts.{square}_proj is square",
        "--expert-layout out_in or in_out",
        act=lambda: canonical(hub),
    )
    assert_same(canonical(hub, "in_out"), canonical(fresh))
    refused(CheckpointError, "has shape", "the config asks for", act=lambda: canonical(hub, "out_in"))
    refused(CheckpointError, "has shape", "the config asks for", act=lambda: canonical(fresh, "in_out"))


def test_layout_option_is_one_of_three(saved: dict[str, Path]) -> None:
    refused(
        CheckpointError,
        'expert_layout = "sideways"',
        "auto, out_in, in_out",
        act=lambda: canonical(saved["qwen3_vl_moe"], "sideways"),
    )


A_TENSOR = {
    "qwen3_vl_moe": ["lm_head.weight", "model.language_model.layers.1.mlp.experts.down_proj", "model.visual.pos_embed"],
    "glm4v_moe": [
        "model.language_model.layers.1.mlp.gate.e_score",
        "layers.1.mlp.experts.7.up_proj",
        "downsample.bias",
    ],
    "qwen3_5_moe": [
        "layers.0.linear_attn.conv1d.weight",
        "layers.0.linear_attn.A_log",
        "layers.0.input_layernorm.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.1.mlp.shared_expert_gate.weight",
    ],
}
CASES = [(family, name) for family, names in A_TENSOR.items() for name in names]


@pytest.mark.parametrize(("model_type", "part"), CASES)
def test_missing_tensor_is_named(model_type: str, part: str, save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type=model_type)
    removed = []

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        removed.extend(name for name in tensors if part in name)
        for name in removed:
            tensors.pop(name)

    edit_tensors(directory, remove)
    assert len(removed) == 1
    refused(CheckpointError, f"the checkpoint lacks tensor {removed[0]}", act=lambda: canonical(directory))


@pytest.mark.parametrize(("model_type", "part"), CASES)
def test_tensor_of_another_shape_is_named_with_both_shapes(
    model_type: str, part: str, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(model_type=model_type)
    changed = []

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = tensors[name][:-1]
            changed.append((name, tensors[name].shape))

    edit_tensors(directory, shorten)
    ((name, shape),) = changed
    refused(
        CheckpointError,
        f"tensor {name} has shape {list(shape)}, the config asks for",
        act=lambda: canonical(directory),
    )


def test_gate_and_up_rows_of_one_expert_are_of_equal_number(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="glm4v_moe")
    expert = "model.language_model.layers.1.mlp.experts.3."

    def move_two_rows(tensors: dict[str, torch.Tensor]) -> None:
        rows = torch.cat([tensors[f"{expert}gate_proj.weight"], tensors[f"{expert}up_proj.weight"]])
        tensors[f"{expert}gate_proj.weight"], tensors[f"{expert}up_proj.weight"] = rows[:22], rows[22:]

    edit_tensors(directory, move_two_rows)
    refused(
        CheckpointError,
        f"tensor {expert}gate_proj.weight has shape [22, 32], the config asks for [24, 32]",
        act=lambda: canonical(directory),
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_vl_moe", "model.visual.patch_embed.proj.weight"),
        ("qwen3_vl_moe", "model.language_model.layers.0.mlp.experts.gate_up_proj"),
        ("glm4v_moe", "model.visual.downsample.weight"),
        ("glm4v_moe", "model.language_model.layers.1.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_tensor_of_another_rank_is_refused_by_name(
    model_type: str, name: str, rank: int, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(model_type=model_type)
    flat = torch.zeros(()) if rank == 0 else torch.zeros(7, 5)
    edit_tensors(directory, lambda tensors: tensors.update({name: flat}))
    refused(CheckpointError, f"tensor {name} has shape {list(flat.shape)}", act=lambda: canonical(directory))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "bool"])
@pytest.mark.parametrize(("model_type", "part"), CASES)
def test_quantized_tensor_is_refused_by_name_and_dtype(
    model_type: str, part: str, dtype: str, save_checkpoint: Callable[..., Path]
) -> None:
    directory = save_checkpoint(model_type=model_type)
    changed = []

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        changed.extend(name for name in tensors if part in name)
        for name in changed:
            tensors[name] = tensors[name].to(getattr(torch, dtype))

    edit_tensors(directory, quantize)
    refused(
        CheckpointError,
        f"tensor {changed[0]} has dtype {dtype}",
        "supported: bfloat16, float16, float32, float64",
        act=lambda: canonical(directory),
    )


@families
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_tied_head_that_is_stored_again_equals_the_embedding_or_is_refused(
    stored: str, model_type: str, save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moevlm.export.graph.weights.SLICE_BYTES", 1000)  # several slices
    directory = save_checkpoint(model_type=model_type, top={"tie_word_embeddings": True}, dtype="bfloat16")
    alone = canonical(directory)

    def add(change: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            head = tensors["model.language_model.embed_tokens.weight"].to(getattr(torch, stored), copy=True)
            head[-1, -1] += change
            tensors["lm_head.weight"] = head

        return edit

    edit_tensors(directory, add(0))
    assert_same(canonical(directory), alone)
    edit_tensors(directory, add(1))
    refused(
        CheckpointError,
        "tensor lm_head.weight differs from the embedding",
        "tie_word_embeddings",
        act=lambda: canonical(directory),
    )


def left_out(directory: Path) -> Mapping[str, int]:
    with Checkpoint.open(directory) as checkpoint:
        return CanonicalModel.of(checkpoint).left_out


@families
def test_tensors_that_transformers_does_not_load_are_left_out_and_counted(
    model_type: str, saved: dict[str, Path], save_checkpoint: Callable[..., Path]
) -> None:
    directory, text = save_checkpoint(model_type=model_type), "model.language_model."
    extra = [f"{text}layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    expected = {"rotary_emb.inv_freq": 2}
    if model_type == "glm4v_moe":
        extra += [f"{text}layers.46.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")]
        expected["model.layers.46"] = 3
    if model_type == "qwen3_5_moe":
        parts = (
            "fc.weight",
            "norm.weight",
            "layers.0.mlp.experts.gate_up_proj",
            "layers.0.mlp.experts.7.up_proj.weight",
        )
        extra += [f"mtp.{name}" for name in parts]
        expected["mtp"] = 4
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(8) for name in extra}))
    assert_same(canonical(directory), canonical(saved[model_type]))
    assert left_out(directory) == expected
    assert left_out(saved[model_type]) == {}


@families
def test_patterns_of_tensors_to_leave_out_are_those_of_transformers(model_type: str) -> None:
    import transformers

    theirs = getattr(transformers, TINY[model_type].model)._keys_to_ignore_on_load_unexpected or ()
    ours = family_for({"model_type": model_type}).left_out
    assert set(ours) == {r"rotary_emb\.inv_freq", *theirs}  # the first is in the loader itself


def test_layers_beyond_the_models_are_not_hidden(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type="glm4v_moe")
    extra = "model.language_model.layers.2.input_layernorm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({extra: torch.zeros(32)}))
    refused(CheckpointError, "without a place in the model: 1 tensor", extra, act=lambda: canonical(directory))


@families
def test_tensor_without_a_place_is_refused_by_name(model_type: str, save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint(model_type=model_type)
    extra = "model.language_model.layers.0.self_attn.sinks"
    edit_tensors(directory, lambda tensors: tensors.update({extra: torch.zeros(4)}))
    refused(
        CheckpointError,
        "without a place in the model: 1 tensor of the checkpoint",
        extra,
        act=lambda: canonical(directory),
    )


def test_correction_biases_and_norms_are_not_mixed_up(saved: dict[str, Path]) -> None:
    """Tensors of one shape cannot be told apart by shape: each has the value that is stored under its own name."""
    with Checkpoint.open(saved["glm4v_moe"]) as checkpoint:
        tensors = {name: read(weight) for name, weight in checkpoint.tensors.items()}
    weights, layer = canonical(saved["glm4v_moe"]), "model.language_model.layers.1."
    for ours, theirs in {
        "attention_norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "attention.k.weight": "self_attn.k_proj.weight",
        "attention.v.bias": "self_attn.v_proj.bias",
        "feed_forward.correction_bias": "mlp.gate.e_score_correction_bias",
        "feed_forward.shared.gate.weight": "mlp.shared_experts.gate_proj.weight",
        "feed_forward.shared.up.weight": "mlp.shared_experts.up_proj.weight",
    }.items():
        np.testing.assert_array_equal(weights[f"decoder.layers.1.{ours}"], tensors[layer + theirs])


def test_hub_helpers_really_change_the_files(save_checkpoint: Callable[..., Path]) -> None:
    """The comparisons above mean something only if the two sides differ on disk."""
    fresh, hub = save_checkpoint(), save_checkpoint()
    edit_tensors(hub, swap_experts)
    edit_json(hub / "config.json", old_rope)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    shapes = [Checkpoint.open(directory).weight(name).shape for directory in (fresh, hub)]
    assert shapes == [(8, 48, 32), (8, 32, 48)]
    assert "rope_parameters" not in (hub / "config.json").read_text()
