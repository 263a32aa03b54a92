"""The format of experts on a GPU: that of the checkpoint by default, what it takes, and what says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.backends.base import Target
from moevlm.export.backends.registry import known_targets
from moevlm.export.build import suited
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.dry_run import dry_run
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.stored_reference import Storage, stored_model
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BuildError
from tests.support.command_line import call
from tests.support.published import FORMATS
from tests.support.tiny import TinyCheckpoint

Publish = Callable[..., Path]
# Of a published format: the experts' format, their group size, and what is said of them.
KEPT = {
    "int4-32": ("int4", 32, "int4 kept"),
    "int4-128-zeros": ("int4", 128, "int4 kept"),
    "gptq-128": ("int4", 128, "int4 kept"),
    "awq-128": ("int4", 128, "int4 kept"),
    "fp8-blocks": ("fp8", 128, "fp8 kept"),
    "fp8-blocks-fused-transposed": ("fp8", 128, "fp8 kept"),
    "fp8-static-fused": ("fp8", 128, "fp8 kept"),
    "mxfp8": ("fp8", 32, "fp8 kept"),
    "int8-channels": ("int8", 128, "int8 kept"),
    "mxfp4-compressed-fused": ("fp4", 32, "fp4 kept"),
    "nvfp4": ("fp4", 16, "fp4 kept"),
    "nvfp4-compressed-fused": ("fp4", 16, "fp4 kept"),
}
SIZES = {"hidden_size": 256, "moe_intermediate_size": 320, "num_experts": 4}
NOT_KEPT = {
    "gptq-act-order": "int4 in scattered groups to bfloat16",
    "int8-128-zeros": "int8 with zeros to bfloat16",
}


@pytest.fixture(scope="module")
def publish(tmp_path_factory: pytest.TempPathFactory) -> Publish:
    root = tmp_path_factory.mktemp("published")
    known = {"": TinyCheckpoint("qwen3_moe", text=SIZES).save(root / "floats")}

    def make(*parts: tuple[str, str]) -> Path:
        """A checkpoint whose weights with such words in their names are in such a format."""
        made = known[""]
        for format_, word in parts:
            key, given = f"{made.name}+{format_}{word}", made

            def chosen(name: str, word: str = word) -> bool:
                return name.removesuffix(".weight").endswith("_proj") and word in name

            if key not in known:
                known[key] = FORMATS[format_].publish(given, root / key, root / f"{key}-plain", chosen)
            made = known[key]
        return made

    return make


def model_and_target(checkpoint: Path, **options: Any) -> tuple[CanonicalModel, Target]:
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
        (target,) = suited(known_targets(["rtx:sm89"], options), model)
        return model, target


def lowered(checkpoint: Path, **options: Any) -> tuple[str, EngineMetadata]:
    """The name of an engine, and what is known of it once its graphs are lowered.

    What is said before, an engine's bytes above all, is the same.
    """
    model, target = model_and_target(checkpoint, **options)
    engine, _ = target.rehearse(model.graphs, model.config, None)
    before = target.planned(model.config, model.decoder_weights, None)
    assert before is not None
    assert before.cost == engine.cost
    assert (before.dtype, before.group_size, before.tensorrt) == (engine.dtype, engine.group_size, engine.tensorrt)
    return target.name, engine


@pytest.mark.parametrize("name", KEPT)
def test_experts_stay_as_the_checkpoint_holds_them(name: str, publish: Publish) -> None:
    kind, group_size, fate = KEPT[name]
    target, engine = lowered(publish((name, "")))
    assert target == f"rtx:sm89:bf16-{kind}"
    assert engine.tensorrt is not None
    assert (engine.dtype, engine.group_size) == (kind, group_size)
    assert engine.recoded[fate] == 4
    assert f"bf16-{kind}-g{group_size}-v" in engine.tensorrt.experts


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_the_kernels_cannot_hold_becomes_what_the_other_weights_are(name: str, publish: Publish) -> None:
    target, engine = lowered(publish((name, "")))
    assert target == "rtx:sm89:bf16"
    assert engine.recoded.keys() == {NOT_KEPT[name]}


def test_floats_stay_floats_and_a_bare_config_has_none(publish: Publish, tmp_path: Path) -> None:
    checkpoint = publish()
    target, engine = lowered(checkpoint)
    assert (target, engine.recoded) == ("rtx:sm89:bf16", {})
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert dry_run(tmp_path, ["rtx:sm89"]).targets[0].name == target


@pytest.mark.parametrize(
    ("name", "options", "kind", "group_size", "fate"),
    [
        ("int4-32", {"experts": "int8"}, "int8", 32, "int4 to int8"),
        ("int4-32", {"experts": "int4", "group_size": 128}, "int4", 128, "int4 to int4"),
        ("int4-32", {"experts": "same"}, "", 0, "int4 to bfloat16"),
        ("gptq-128", {"experts": "int4"}, "int4", 128, "int4 kept"),
        ("gptq-128", {"experts": "int4", "group_size": 32}, "int4", 32, "int4 kept"),
        ("mxfp4-compressed", {"experts": "fp8"}, "fp8", 32, "fp4 kept as fp8"),
        ("nvfp4", {"experts": "fp4"}, "fp4", 16, "fp4 kept"),
        ("nvfp4", {"experts": "fp4", "group_size": 32}, "fp4", 32, "fp4 to fp4"),
        ("mxfp4-compressed", {"experts": "fp4", "group_size": 16}, "fp4", 16, "fp4 to fp4"),
    ],
)
def test_a_format_that_is_asked_for_wins(
    name: str, options: dict[str, Any], kind: str, group_size: int, fate: str, publish: Publish
) -> None:
    target, engine = lowered(publish((name, "")), **options)
    assert target == f"rtx:sm89:bf16-{kind}".removesuffix("-")
    assert (engine.dtype, engine.group_size) == (kind or "bfloat16", group_size)
    assert fate in engine.recoded


@pytest.mark.parametrize(
    ("parts", "fates"),
    [
        ([("int4-32", "layers.0."), ("fp8-blocks", "layers.1.")], {"int4 kept", "fp8 kept"}),
        ([("nvfp4-compressed", "layers.0."), ("mxfp4-compressed", "layers.1.")], {"fp4 kept"}),
        ([("int4-128-zeros", "layers.0.")], {"int4 kept"}),
        ([("mxfp4-compressed", "layers.0."), ("gptq-act-order", "layers.1.")], {"fp4 kept"}),
    ],
    ids=["two formats", "two of one name", "one layer in floats", "one layer in what no kernel holds"],
)
def test_layers_that_differ_have_each_its_own(parts: list[tuple[str, str]], fates: set[str], publish: Publish) -> None:
    target, engine = lowered(publish(*parts))
    assert target == "rtx:sm89:bf16-mixed"
    assert engine.dtype == "mixed"
    assert engine.group_size > 0
    assert fates <= engine.recoded.keys()
    assert not [fate for fate in engine.recoded if " to " in fate and not fate.endswith("bfloat16")]
    assert engine.tensorrt is not None
    assert engine.tensorrt.experts.startswith("experts/bf16-mixed-v")


def test_a_layer_whose_matrices_have_other_groups_keeps_both_in_the_smaller(publish: Publish) -> None:
    parts = ("fp8-blocks", ".down_proj"), ("mxfp8", ".gate_proj"), ("mxfp8", ".up_proj")
    target, engine = lowered(publish(*parts))
    assert (target, engine.group_size) == ("rtx:sm89:bf16-fp8", 32)
    assert engine.recoded == {"fp8 kept": 4}


def test_parity_takes_the_experts_of_a_mixed_engine_as_they_are(publish: Publish) -> None:
    model, _ = model_and_target(publish(("int4-32", "layers.0."), ("fp8-blocks", "layers.1.")))
    stored = stored_model(model, Storage("", "mixed", 32, "bfloat16"))
    for name in (name for names in model.config.expert_matrices for name in names):
        assert stored.decoder_weights[name] is not model.decoder_weights[name]
        np.testing.assert_array_equal(read(stored.decoder_weights[name]), read(model.decoder_weights[name]))


def test_nvfp4_takes_four_bits_and_a_half(publish: Publish) -> None:
    model, target = model_and_target(publish(("nvfp4", "")))
    engine = target.planned(model.config, model.decoder_weights, None)
    assert engine is not None and engine.cost is not None
    weights = 3 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"]
    rows = 2 * SIZES["moe_intermediate_size"] + SIZES["hidden_size"]
    assert engine.cost.expert_bytes == 2 * (weights * 9 // 16 + 4 * rows)  # two layers


def test_group_size_alone_says_nothing(publish: Publish) -> None:
    with pytest.raises(BuildError, match=r"--group-size has no effect on rtx:sm89 \(.* those of --experts\)"):
        dry_run(publish(("int4-32", "")), ["rtx:sm89"], group_size=128)


def test_the_command_says_what_experts_become(publish: Publish) -> None:
    done = call("build", publish(("gptq-128", "")), "--dry-run", "--target", "rtx:sm89")
    assert "rtx:sm89:bf16-int4, weights made of tensors in codes: 4 int4 kept, 4 int4 to bfloat16" in done.out
    assert "rtx:sm89:bf16-int4 takes " in done.out
