"""What an engine will take of a GPU, from a model's config alone: against lowered graphs, and by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.random_checkpoint import config as config_json
from moevlm.export.backends.tensorrt.engine_target import TensorRTTarget
from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.backends.tensorrt.product import RTX, TENSORRT
from moevlm.export.build import build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.cli.build_command import _say_memory
from moevlm.export.config import ModelConfig
from moevlm.export.families import family_for
from moevlm.export.graph.cost import cost
from moevlm.export.model import CanonicalModel
from moevlm.runtime.cli.memory_text import memory_text
from moevlm.runtime.core.engine_metadata import CostMetadata, EngineMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.perf.memory import MemoryReport, memory_report
from tests.support.hybrid import save

DOCS = Path(__file__).parents[4] / "docs/gpu.md"
LARGEST_IMAGE = 65536  # patches


def published(layers: int, hidden: int, width: int, heads: int) -> ModelConfig:
    """A Qwen3-VL-MoE of 128 experts, as its config.json on the hub says."""
    values: dict[str, Any] = config_json(layers, hidden, experts=128, top_k=8, width=width, vocabulary=151936)
    values["text_config"] |= {"num_attention_heads": heads, "max_position_embeddings": 262144}
    values["vision_config"] |= {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
    values["vision_config"]["deepstack_visual_indexes"] = [8, 16, 24]
    return family_for(values).config(values)


def report_of(config: ModelConfig, target: TensorRTTarget) -> MemoryReport:
    report = memory_report(config.metadata(), target.planned(config, {}, LARGEST_IMAGE))
    assert report is not None
    return report


LARGE = published(94, 4096, 1536, 64)  # Qwen3-VL-235B-A22B
ON_H200 = TensorRTTarget(TENSORRT, (90,), Options(experts="int4", group_size=128))


def test_the_largest_model_on_one_h200_by_hand() -> None:
    report, experts, value = report_of(LARGE, ON_H200), 94 * 128 * 3 * 4096 * 1536, 2
    assert report.experts == experts // 2 + experts // 128 * value
    attention = 4096 * (64 + 4 + 4) * 128 + 64 * 128 * 4096
    router, embedding = 4096 * 128, 151936 * 4096
    position_table = 2304 * 1152
    dense = (94 * attention + 2 * embedding + position_table) * value + 94 * router * 4
    assert report.dense == dense
    assert report.page == 64 * 94 * 4 * (128 + 128) * value
    patches, tokens = LARGEST_IMAGE, 2048 + 64
    images = patches * ((2 * 1152 + 2 * 4304) * value + 1536 * 4)
    assert images > tokens * (2 * 4096 + 8 * (1536 + 4096)) * value
    assert report.workspace == images + (2 * patches // 4 + tokens) * 4 * 4096 * value + 64 * 151936 * 4
    (h200,) = [fit for fit in report.gpus if fit.gpu == "H200"]
    left = 143771 * 2**20 - report.fixed
    assert (h200.fits, h200.host_layers) == (True, 0)
    assert h200.tokens == (left // report.page - 1) * 64
    read = dense - (embedding + position_table) * value + 8 * report.experts // 128 + 1024 * report.page // 64
    assert h200.decode == pytest.approx(4.8e12 / read, rel=1e-6)
    (h100,) = [fit for fit in report.gpus if fit.gpu == "H100"]
    assert h100.fits
    assert 0 < h100.host_layers < 94
    assert 8192 <= h100.tokens < 8192 + report.experts / 94 / report.page * 64
    link = h100.host_layers / 94 * 8 * report.experts / 128
    assert h100.decode == pytest.approx(1 / ((read - link) / 3.35e12 + link / 63e9), rel=1e-6)


def test_the_page_on_gpus_shows_these_numbers() -> None:
    """Its example is the command line's own text, and each number in the lines around it is one of the report's."""
    text, report = DOCS.read_text(), report_of(LARGE, ON_H200)
    shown = memory_text("trt:sm90:bf16-int4", report, LARGE.metadata())
    assert shown in text
    (h200,) = [fit for fit in report.gpus if fit.gpu == "H200"]
    others = [
        report_of(LARGE, replace(ON_H200, options=replace(ON_H200.options, **change)))
        for change in ({"kv_cache": "int8"}, {"group_size": 32})
    ]
    weights = report.dense + report.experts + report.vision
    sizes = (h200.memory, report.experts, weights, h200.memory - weights, report.driver, report.workspace)
    for size in (*sizes, others[1].experts):
        assert f"{size / 1e9:.1f} GB" in text, size
    with_int8, in_small_groups = (fit for one in others for fit in one.gpus if fit.gpu == "H200")
    assert in_small_groups.host_layers == 1
    for count in (h200.tokens, with_int8.tokens, (h200.memory - weights) // report.page * 64):
        assert f"{count // 1000},000 tokens" in " ".join(text.split()), count
    assert f"{report.page // 64:,} bytes" in text


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "aria", "qwen3_5_moe"])
@pytest.mark.parametrize(("experts", "group_size"), [("same", 32), ("int4", 32), ("int8", 128)])
def test_planned_sizes_are_those_of_the_lowered_graphs(save_checkpoint, family, experts, group_size) -> None:
    assert_planned(save_checkpoint(model_type=family), Options(experts=experts, group_size=group_size))


@pytest.mark.usefixtures("hybrid_family")
@pytest.mark.parametrize("experts", ["same", "int4"])
def test_planned_sizes_count_biases_of_experts(experts: str, tmp_path: Path) -> None:
    plain, biased = (
        assert_planned(save(tmp_path / kind, (kind,)), Options(experts=experts)) for kind in ("windowed", "unturned")
    )
    assert biased.expert_bytes == plain.expert_bytes + 2 * (2 * 24 + 32)  # bfloat16
    assert biased.expert_macs == plain.expert_macs == 3 * 24 * 32


@pytest.mark.usefixtures("hybrid_family")
def test_planned_sizes_count_the_matrices_of_heads(tmp_path: Path) -> None:
    found = assert_planned(save(tmp_path / "checkpoint", ("latent",)), Options())
    heads, latent, projections = 4, 32, 32 * (24 + 32 + 16) + 24 * 4 * 24 + 4 * 12 * 32
    router = 8 * 32
    assert found.dense_macs == heads * latent * (8 + 12) + projections + router


def assert_planned(checkpoint: Path, options: Options) -> CostMetadata:
    """The cost of an engine of this checkpoint, planned and of its graphs."""
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
        target = TensorRTTarget(RTX, (86, 89), options)
        lowered = target.lower(model.graphs, lambda _: b"")
        found = cost(model.graphs, lowered, model.config.tower)
        assert target.planned(model.config, model.decoder_weights, None).cost == found
        return found


class Stopped(Exception):
    pass


def test_a_build_says_what_fits_before_it_begins(save_checkpoint, tmp_path, capsys) -> None:
    """The command's own function is called, and then nothing more is built."""

    def planned(model: ModelMetadata, engines: Mapping[str, EngineMetadata]) -> None:
        _say_memory(model, engines)
        raise Stopped

    checkpoint, stages = save_checkpoint(side_files=True), []
    with pytest.raises(Stopped):
        build(
            checkpoint,
            tmp_path / "b",
            ["ort-cpu", "rtx:sm89"],
            planned=planned,
            progress=lambda what, *_: stages.append(what),
        )
    assert not (tmp_path / "b").exists()
    assert stages == ["reading the tokenizer"]
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("rtx:sm89:bf16 takes 1.3 GB of a GPU: ")
    assert [name for name in ("RTX 4090", "L4 ", "L40S", "RTX 3090", "ort-cpu") if name in told.err] == [
        "RTX 4090",
        "L4 ",
        "L40S",
    ]


def test_engines_on_the_cpu_plan_nothing(save_checkpoint, tmp_path) -> None:
    build(save_checkpoint(), tmp_path / "b", ["ort-cpu"], planned=lambda *_: pytest.fail("planned"))
