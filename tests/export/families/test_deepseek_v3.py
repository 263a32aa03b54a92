"""DeepSeek-V3 as published: fp8 in blocks that heads do not respect, experts in int4, a layer for further tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.moved_codes import coded
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.run import check_parity
from moevlm.runtime.core.errors import CheckpointError
from tests.support.checkpoints import canonical, refused
from tests.support.published import FORMATS
from tests.support.tiny import TinyCheckpoint, edit_tensors

# Rows of kv_b_proj: 4 heads of 48 + 40, of which 128 share a scale.
SIZES = {"hidden_size": 256, "moe_intermediate_size": 160, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
SIZES |= {"kv_lora_rank": 160, "q_lora_rank": 136, "qk_nope_head_dim": 48, "qk_rope_head_dim": 24, "v_head_dim": 40}


def every(name: str) -> bool:
    """All projections, as DeepSeek-V3 has them in fp8."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight"))


def experts(name: str) -> bool:
    """Routed experts, as Kimi-K2 has them in int4; attention stays bfloat16."""
    return ".experts." in name


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyCheckpoint("deepseek_v3", text=SIZES).save(tmp_path_factory.mktemp("floats") / "checkpoint")


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("fp8-blocks", every), ("fp8-blocks-float32-scales", every), ("fp8-static-fused", every), ("int4-32", experts)],
    ids=["fp8-blocks", "fp8-blocks-float32-scales", "fp8-static-fused", "int4-32"],
)
def test_quantized_weights_are_the_decoded_ones(
    name: str, chosen: Callable[[str], bool], floats: Path, tmp_path: Path
) -> None:
    def with_fused(tensor: str) -> bool:
        return chosen(tensor) or tensor.endswith((".gate_up_proj", ".down_proj"))

    quantized = FORMATS[name].publish(floats, tmp_path / "q", tmp_path / "plain", with_fused)
    expected, found = canonical(tmp_path / "plain"), canonical(quantized)
    assert expected.keys() == found.keys()
    for parameter, values in expected.items():
        np.testing.assert_allclose(found[parameter], values, rtol=2e-7, err_msg=parameter)


def test_kimi_k2s_integers_stay_as_they_are(tmp_path: Path) -> None:
    """moonshotai/Kimi-K2-Thinking: experts in groups of 32, all else as it is."""
    left = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    form = replace(FORMATS["int4-32"], config=FORMATS["int4-32"].config | {"ignore": left})
    source = TinyCheckpoint("kimi_k2", text=SIZES).save(tmp_path / "floats")
    quantized = form.publish(source, tmp_path / "q", tmp_path / "plain", experts)
    expected, found = canonical(tmp_path / "plain"), canonical(quantized)
    assert all(np.array_equal(found[parameter], values) for parameter, values in expected.items())
    with Checkpoint.open(quantized) as checkpoint:
        weights = CanonicalModel.of(checkpoint).decoder_weights
    for part in ("gate_up", "down"):
        kept = coded(weights[f"layers.1.feed_forward.{part}"])
        assert kept is not None
        assert (kept.form.kind, kept.form.group_size) == ("int4", 32)


def test_engines_of_an_fp8_checkpoint_pass_parity(tmp_path: Path, floats: Path) -> None:
    quantized = FORMATS["fp8-blocks"].publish(floats, tmp_path / "q", tmp_path / "plain", every)
    bundle = build(quantized, tmp_path / "b.moevlm", ["reference", "cpu:int8"])
    report = check_parity(bundle.directory, quantized, quick=True)
    assert [check for check in report.checks if not check.passed] == []
    assert {check.step.split()[-1] for check in report.checks} >= {"reference", "cpu:int8"}


def test_the_layer_for_further_tokens_is_left_out_by_name(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint("deepseek_v3").save(tmp_path / "checkpoint")

    def with_layer(number: int) -> Callable[[dict[str, Any]], None]:
        names = [
            f"model.layers.{number}.{part}.weight" for part in ("eh_proj", "shared_head.head", "self_attn.q_a_proj")
        ]
        return lambda tensors: tensors.update({name: tensors["model.norm.weight"].clone() for name in names})

    edit_tensors(checkpoint, with_layer(61))
    with Checkpoint.open(checkpoint) as source:
        assert list(CanonicalModel.of(source).left_out.values()) == [3]
    edit_tensors(checkpoint, with_layer(4))
    refused(CheckpointError, "model.layers.4.eh_proj.weight", act=lambda: canonical(checkpoint))
