"""Models of text alone, from a checkpoint to answers: no tower anywhere, images refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.export.build import add_targets, build
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.dry_run import Absent
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.run import check_parity
from moevlm.runtime import load
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, CheckpointError, RequestError, UnsupportedModelError
from moevlm.runtime.loading import load_engine
from tests.support.bundles import copy_bundle, edit_manifest
from tests.support.checkpoints import canonical, refused
from tests.support.command_line import assert_refused, call
from tests.support.fakes.gpu import TARGET, fake_gpu, gpu_bundle
from tests.support.published import FORMATS
from tests.support.tiny import TinyCheckpoint, edit_tensors

# The layers of these are those of families that are tested in full: deepseek_v3, llama4, qwen3_5_moe, gemma4 and
# ernie4_5_vl_moe.
OF_OTHERS = (
    "kimi_k2",
    "llama4_text",
    "glm4_moe_lite",
    "qwen3_next",
    "ernie4_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "gemma4_text",
)
ALONE = ("qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "deepseek_v3", *OF_OTHERS)
each = pytest.mark.parametrize("model_type", ALONE)
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: TinyCheckpoint(name, side_files=True).save(folder / name) for name in ALONE}


@pytest.fixture(scope="module")
def bundle(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of mixtral, on every kind of engine for a CPU."""
    targets = ["reference", "ort-cpu", "cpu:int4"]
    return build(saved["mixtral"], tmp_path_factory.mktemp("alone") / "demo.moevlm", targets).directory


def test_bundle_has_no_trace_of_a_tower(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    assert (model.vision, model.image_token_id, model.deepstack, model.visual_token_ids) == (None, None, 0, ())
    assert not [name for name in opened.manifest.files if "vision" in name or "preprocessor" in name]
    for name, engine in opened.manifest.engines.items():
        assert (engine.vision, engine.graphs) == ("", (engine.decoder,))
        assert engine.cost is not None
        assert (engine.cost.vision_bytes, engine.cost.patch_macs) == (0, 0)
        assert not [path for path in opened.engine_files(name) if "vision" in path]


@pytest.mark.parametrize("target", ["reference", "ort-cpu", "cpu:int4"])
def test_answers_and_refusals_of_every_engine(target: str, bundle: Path) -> None:
    with load(bundle, target, threads=1) as runtime:
        parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
        answers = [
            [t for piece in runtime.generate(m, max_new_tokens=4) for t in piece.token_ids] for m in (HELLO, parts)
        ]
        assert answers[0] == answers[1]
        assert 1 <= len(answers[0]) <= 4
        picture = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}]}]
        with pytest.raises(RequestError, match="the prompt has 1 image, and mixtral takes text alone"):
            runtime.generate(picture)
        video = [{"role": "user", "content": [{"type": "video", "video": [Image.new("RGB", (8, 8))] * 2}]}]
        with pytest.raises(RequestError, match=r"\.type = 'video' \(allowed: text\)$"):
            runtime.generate(video)


def test_commands_say_what_a_model_of_text_alone_is(bundle: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    assert re.search(r"images +none", call("inspect", bundle).out)
    inside = json.loads(call("inspect", bundle, "--json").out)["model"]
    assert (inside["vision"], inside["image_token_id"]) == (None, None)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    for option in ("--image", "--video"):  # before an engine is looked for, and so before it is loaded
        asked = call("run", bundle, "--target", "rtx", option, picture, "--prompt", "What is it?")
        assert_refused(asked, f"{option} {picture}: mixtral takes text alone")
    bench = [
        "bench",
        "latency",
        bundle,
        "--target",
        "cpu:int4",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "2",
        "--repeats",
        "1",
    ]
    assert_refused(
        call(*bench, "--image-size", "8"), "mixtral takes text alone: measure without an image (--image-size 0)"
    )
    assert json.loads(call(*bench, "--json", "-").out)["results"][0]["vision"] is None
    assert "rtx" in call("build", saved["mixtral"], "--dry-run").out
    built = call("build", saved["mixtral"], "-o", tmp_path / "built")
    assert (built.status, "images" in built.out) == (0, False)  # no file is missing for them


@each
def test_every_step_of_parity_on_engines_of_the_cpu(model_type: str, saved: dict[str, Path], tmp_path: Path) -> None:
    built = build(saved[model_type], tmp_path / "bundle", ["cpu:int8", "cpu:int4"]).directory
    report = check_parity(built, saved[model_type], quick=model_type in OF_OTHERS)
    assert [check for check in report.checks if not check.passed] == []
    assert not [check.quantity for check in report.checks if "image" in check.quantity or "patch" in check.quantity]
    assert [check for check in report.checks if "conversations" in check.quantity]


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])  # other tests build plans of the others' layers
def test_plan_of_the_decoder_alone(model_type: str, saved: dict[str, Path], tmp_path: Path) -> None:
    built = build(saved[model_type], tmp_path / "bundle", ["reference"]).directory
    opened = add_targets(built, saved[model_type], ["rtx:sm89"], dtype="fp16", experts="int4")
    engine = opened.manifest.engines["rtx:sm89:fp16-int4"]
    assert (engine.vision, engine.tensorrt.max_patches, engine.tensorrt.max_visual) == ("", 0, 0)
    assert not [name for name in opened.engine_files("rtx:sm89:fp16-int4") if "vision" in name]
    report = json.loads(call("inspect", opened.directory, "--json").out)
    assert next(e for e in report["engines"] if e["target"].startswith("rtx"))["memory"]["vision"] == 0


def test_an_engine_on_a_gpu_runs_the_decoder_alone(bundle: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    copied = gpu_bundle(bundle, tmp_path)
    assert Bundle.open(copied).manifest.engines[TARGET].vision == ""
    with fake_gpu(tmp_path) as gpu:
        report = check_parity(copied, saved["mixtral"], [TARGET])
        assert not gpu.held()
    assert [check for check in report.checks if not check.passed] == []
    assert {check.quantity for check in report.checks if check.step == TARGET} >= {"prefill logits", "decode logits"}


def test_an_engine_asked_for_images_says_what_it_is(bundle: Path, tiny_bundle: Path) -> None:
    from moevlm.export.parity.cases import pack, random_cases
    from moevlm.runtime.core.errors import EngineError

    model = Bundle.open(tiny_bundle).manifest.model
    images = pack(random_cases(model, {}, 0), model)
    engine = load_engine(Bundle.open(bundle), "ort-cpu")
    with pytest.raises(EngineError, match="images for a model of text alone"):
        engine.encode(images)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["model"].update(image_token_id=3), "model.image_token_id = 3 (allowed: null without model.vision"),
        (
            lambda m: m["engines"]["ort-cpu"].update(vision=m["engines"]["ort-cpu"]["decoder"]),
            "engines.ort-cpu.vision = ",
        ),
    ],
    ids=["image token", "graph of vision"],
)
def test_a_manifest_with_half_a_tower_is_refused(change: Callable, told: str, bundle: Path, tmp_path: Path) -> None:
    copied = copy_bundle(bundle, tmp_path)
    edit_manifest(copied, change)
    with pytest.raises(BundleError, match=re.escape(told)):
        Bundle.open(copied)


def test_a_preprocessor_beside_text_alone_is_named_and_left_out(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint("mixtral", side_files=True).save(tmp_path / "checkpoint")
    (checkpoint / "preprocessor_config.json").write_text('{"image_processor_type": "X"}')
    notes: list[str] = []
    build(checkpoint, tmp_path / "bundle", note=notes.append)
    assert "preprocessor_config.json has no part in a model of text alone" in notes


# config.json on the hub, without what is of no account.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x22B": {
        **{"model_type": "mixtral", "hidden_act": "silu", "hidden_size": 6144, "intermediate_size": 16384},
        **{"max_position_embeddings": 65536, "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 32768},
        **{"num_hidden_layers": 56, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
        **{"rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False, "router_aux_loss_coef": 0.001},
        **{"router_jitter_noise": 0.0, "bos_token_id": 1, "eos_token_id": 2, "output_router_logits": False},
    },
    "Qwen3-Coder-30B-A3B": {
        **{"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144},
        **{"max_position_embeddings": 262144, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "max_window_layers": 28},
        **{"sliding_window": None, "use_sliding_window": False, "use_qk_norm": True, "qkv_bias": False},
        **{"rope_theta": 1e7, "rope_scaling": None, "rms_norm_eps": 1e-6, "vocab_size": 151936},
        **{"shared_expert_intermediate_size": 0, "eos_token_id": 151645, "tie_word_embeddings": False},
    },
    "GLM-4.5": {
        **{"model_type": "glm4_moe", "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 12288},
        **{"max_position_embeddings": 131072, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128},
        **{"num_hidden_layers": 92, "n_routed_experts": 160, "n_shared_experts": 1, "moe_intermediate_size": 1536},
        **{"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3, "use_qk_norm": True},
        **{"routed_scaling_factor": 2.5, "norm_topk_prob": True, "partial_rotary_factor": 0.5, "rope_theta": 1e6},
        **{"rope_scaling": None, "attention_bias": True, "num_nextn_predict_layers": 1, "vocab_size": 151552},
        **{"rms_norm_eps": 1e-5, "eos_token_id": [151329, 151336, 151338], "tie_word_embeddings": False},
    },
    "Kimi-K2-Instruct": {
        **{"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu"},
        **{"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "hidden_size": 7168},
        **{"attention_bias": False, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1},
        **{"first_k_dense_replace": 1, "intermediate_size": 18432, "moe_intermediate_size": 2048, "moe_layer_freq": 1},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 61},
        **{"n_group": 1, "topk_group": 1, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid"},
        **{"topk_method": "noaux_tc", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 5e4},
        "rope_scaling": {
            **{"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
            **{"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        **{"vocab_size": 163840, "eos_token_id": 163585, "tie_word_embeddings": False, "num_nextn_predict_layers": 0},
    },
}
PUBLISHED["ERNIE-4.5-21B-A3B"] = {
    **{"model_type": "ernie4_5_moe", "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288},
    **{"num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    **{"moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2, "moe_intermediate_size": 1536},
    **{"moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_layer_interval": 1, "moe_gate": "topk"},
    **{"moe_capacity": [64, 64, 64], "moe_use_aux_free": True, "use_bias": False, "num_nextn_predict_layers": 1},
    **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "vocab_size": 103424, "eos_token_id": 2},
    "tie_word_embeddings": True,
}
PUBLISHED["ERNIE-4.5-300B-A47B"] = PUBLISHED["ERNIE-4.5-21B-A3B"] | {
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 54, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "moe_k": 8, "moe_num_shared_experts": 0, "moe_intermediate_size": 3584},
    **{"moe_layer_start_index": 3, "moe_layer_end_index": 53, "tie_word_embeddings": False},
}
PUBLISHED |= {
    "Qwen3-Next-80B-A3B-Instruct": {
        **{"model_type": "qwen3_next", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120},
        **{"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
        **{"full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
        **{"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "mlp_only_layers": []},
        **{"shared_expert_intermediate_size": 512, "norm_topk_prob": True, "decoder_sparse_step": 1},
        **{"max_position_embeddings": 262144, "partial_rotary_factor": 0.25, "rope_theta": 1e7, "rope_scaling": None},
        **{"rms_norm_eps": 1e-6, "vocab_size": 151936, "use_sliding_window": False, "tie_word_embeddings": False},
        **{"eos_token_id": 151645, "router_aux_loss_coef": 0.001},
    },
    "GLM-4.7-Flash": {
        **{"model_type": "glm4_moe_lite", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240},
        **{"num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 768},
        **{"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256},
        **{"n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 1536},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 1.8, "num_nextn_predict_layers": 1},
        **{"max_position_embeddings": 202752, "partial_rotary_factor": 1.0, "rope_theta": 1e6, "rope_scaling": None},
        **{"rms_norm_eps": 1e-5, "vocab_size": 154880, "attention_bias": False, "tie_word_embeddings": False},
        **{"eos_token_id": [154820, 154827, 154829]},
    },
}
BILLIONS = {
    "Mixtral-8x22B": (140.6, 39.2),
    "Qwen3-Coder-30B-A3B": (30.5, 3.4),
    "GLM-4.5": (352.8, 33.6),
    "Kimi-K2-Instruct": (1026.4, 32.9),
    "Qwen3-Next-80B-A3B-Instruct": (79.7, 3.9),
    "GLM-4.7-Flash": (29.9, 3.9),
    "ERNIE-4.5-21B-A3B": (21.8, 3.4),
    "ERNIE-4.5-300B-A47B": (299.5, 47.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood_whole_and_have_the_parameters_that_are_stated(name: str) -> None:
    model = CanonicalModel.of_config(PUBLISHED[name], Absent).metadata()
    found = tuple(round(n / 1e9, 1) for n in (model.parameters, model.active_parameters))
    assert found == BILLIONS[name]
    assert model.vision is None


REFUSED = [
    ("ernie4_5_moe", {"use_bias": True}, "use_bias = true (supported: false)"),
    ("ernie4_5_moe", {"moe_norm_min": 0.5}, "moe_norm_min = 0.5 (supported: 1e-12)"),
    ("ernie4_5_moe", {"moe_k": 9}, "moe_k = 9 (allowed: 1 to the 8 experts"),
    ("qwen3_next", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 (supported: 1)"),
    ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers = [0] (allowed: none, for every layer has experts)"),
    ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_key_heads = 2 (allowed: a divisor"),
    (
        "glm4_moe_lite",
        {"mlp_layer_types": ["dense"]},
        'mlp_layer_types = ["dense"] (supported: 2 times dense or sparse',
    ),
    (
        "llama4_text",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}},
        "use_qk_norm = true (allowed: false where cosine and sine have a factor, here 1.20794",
    ),
    ("gpt_oss", {"swiglu_limit": None}, "swiglu_limit = null (allowed: "),
    ("deepseek_v3", {"n_group": None}, "n_group = null (allowed: "),
    ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method = "greedy" (supported: noaux_tc)'),
    ("deepseek_v3", {"kv_lora_rank": 1 << 15}, "kv_lora_rank = 32768 (allowed: an integer from 1 to 16384)"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = true (supported: false)"),
    ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm = false (supported: true)"),
    ("qwen3_moe", {"hidden_act": "gelu"}, 'hidden_act = "gelu" (supported: silu)'),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 (allowed: 1 to the 8 experts"),
    ("qwen3_moe", {"layer_types": ["linear_attention"] * 2}, 'layer_types = ["linear_attention", "linear_attention"]'),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 (allowed: 1 to the 8 experts"),
    ("mixtral", {"attn_logit_softcapping": 30.0}, "unsupported field in config.json: attn_logit_softcapping = 30.0"),
    ("glm4_moe", {"n_group": 3}, "n_group = 3 (allowed: a divisor of the 8 experts up to 4)"),
    (
        "glm4_moe",
        {"partial_rotary_factor": 0.2, "rope_parameters": {"rope_theta": 1e4}},
        "head_dim = 16 (allowed: an even",
    ),
    ("glm4_moe", {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, 'rope_parameters.rope_type = "su" (supp'),
]


@pytest.mark.parametrize(
    ("model_type", "changes", "told"), REFUSED, ids=[f"{m}: {next(iter(c))}" for m, c, _ in REFUSED]
)
def test_what_is_not_supported_is_named_at_the_top(
    model_type: str, changes: dict[str, Any], told: str, saved: dict[str, Path]
) -> None:
    config = json.loads((saved[model_type] / "config.json").read_text()) | changes
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(told)):
        family_for(config).config(config)


PREFIXES: dict[str, Callable[[str], str]] = {
    "the base model alone": lambda name: name.removeprefix("model."),
    "its prefix twice": lambda name: f"model.{name}" if name.startswith("model.") else name,
}


@each
@pytest.mark.parametrize("change", PREFIXES.values(), ids=PREFIXES)
def test_prefixes_of_published_checkpoints(
    model_type: str, change: Callable[[str], str], saved: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = TinyCheckpoint(model_type).save(tmp_path / "checkpoint")

    def renamed(tensors: dict[str, Any]) -> None:
        given = dict(tensors)
        tensors.clear()
        tensors.update({change(name): tensor for name, tensor in given.items()})

    edit_tensors(checkpoint, renamed)
    expected, found = canonical(saved[model_type]), canonical(checkpoint)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


HUB = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def named_alike(name: str) -> str:
    """A name of Mixtral's on the hub as other families have it."""
    for usual, hub in HUB.items():
        name = name.replace(f".{hub}.weight", f".{usual}.weight")
    return name.replace(".block_sparse_moe.", ".mlp.")


def test_mixtral_lies_on_the_hub_as_transformers_saves_it(saved: dict[str, Path]) -> None:
    with Checkpoint.open(saved["mixtral"]) as source:
        names = set(source.tensors)
    layer = "model.layers.0.block_sparse_moe."
    assert {f"{layer}gate.weight", *(f"{layer}experts.7.{part}.weight" for part in HUB.values())} <= names


@pytest.mark.parametrize("layout", ["per expert", "fused", "turned"])
def test_other_layouts_of_mixtrals_experts_are_the_same_model(
    layout: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    """One by one under the names of other families; fused as transformers holds them; and with the axes turned."""
    import torch

    checkpoint = TinyCheckpoint("mixtral").save(tmp_path / "checkpoint")

    def changed(tensors: dict[str, Any]) -> None:
        given = {named_alike(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        if layout == "per expert":
            tensors.update(given)
            return
        for layer in range(2):
            base = f"model.layers.{layer}.mlp.experts"
            parts = {
                part: torch.stack([given.pop(f"{base}.{e}.{part}_proj.weight") for e in range(8)])
                for part in ("gate", "up", "down")
            }
            fused = {"gate_up": torch.cat([parts["gate"], parts["up"]], 1), "down": parts["down"]}
            turned = layout == "turned"
            given |= {f"{base}.{n}_proj": t.transpose(1, 2) if turned else t for n, t in fused.items()}
        tensors.update(given)

    edit_tensors(checkpoint, changed)
    expected, found = canonical(saved["mixtral"]), canonical(checkpoint)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_glms_layers_for_further_tokens_are_left_out_by_name(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint("glm4_moe").save(tmp_path / "checkpoint")

    def with_layer(number: int) -> Callable[[dict[str, Any]], None]:
        name = f"model.layers.{number}.enorm.weight"
        return lambda tensors: tensors.update({name: tensors["model.norm.weight"].clone()})

    edit_tensors(checkpoint, with_layer(46))
    with Checkpoint.open(checkpoint) as source:
        left = CanonicalModel.of(source).left_out
    assert list(left.values()) == [1]
    edit_tensors(checkpoint, with_layer(3))
    refused(CheckpointError, "model.layers.3.enorm.weight", act=lambda: canonical(checkpoint))


NEXT_TOKENS = {
    "glm4_moe_lite": "model.layers.47.eh_proj.weight",
    "qwen3_next": "mtp.fc.weight",
    "ernie4_5_moe": "model.mtp_linear_proj.0.weight",
}


@pytest.mark.parametrize("model_type", NEXT_TOKENS)
def test_tensors_that_predict_further_tokens_are_left_out_by_name(
    model_type: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = TinyCheckpoint(model_type).save(tmp_path / "checkpoint")
    edit_tensors(
        checkpoint, lambda tensors: tensors.update({NEXT_TOKENS[model_type]: tensors["model.norm.weight"].clone()})
    )
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
    assert list(model.left_out.values()) == [1]
    expected, found = canonical(saved[model_type]), canonical(checkpoint)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_older_spelling_of_config_json_is_the_same_model(saved: dict[str, Path]) -> None:
    new = json.loads((saved["qwen3_moe"] / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "max_window_layers": 2}
    old |= {"sliding_window": None, "num_experts": old.pop("num_local_experts", old.get("num_experts"))}
    assert family_for(old).config(old) == family_for(new).config(new)


QUANTIZED = [
    ("mixtral", "awq-32"),
    ("mixtral", "gptq-128"),
    ("qwen3_moe", "fp8-blocks"),
    ("qwen3_moe", "nvfp4"),
    ("glm4_moe", "int4-32"),
    ("ernie4_5_moe", "int4-32"),
    ("qwen3_next", "fp8-blocks"),
]
SIZES = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 384},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 320},
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 320, "intermediate_size": 384},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 320, "intermediate_size": 384},
    # Rows of in_proj_qkvz: 2 key heads of 40 + 40 + 48 + 48, of which 128 share a scale.
    "qwen3_next": {
        **{"num_experts": 4, "moe_intermediate_size": 160, "linear_key_head_dim": 40, "linear_value_head_dim": 24},
    },
}


PROJECTIONS = ("_proj.weight", "_qkvz.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def projection(name: str) -> bool:
    """Of the decoder's layers, experts' parts among them; routers stay as they are."""
    return ".layers." in name and name.endswith(PROJECTIONS)


@pytest.mark.parametrize(("model_type", "name"), QUANTIZED, ids=[f"{model}: {name}" for model, name in QUANTIZED])
def test_quantized_checkpoints_are_read_under_their_published_names(model_type: str, name: str, tmp_path: Path) -> None:
    text = SIZES[model_type] | {"hidden_size": 256, "head_dim": 32}
    floats = TinyCheckpoint(model_type, text=text, side_files=True).save(tmp_path / "floats")
    stored = FORMATS[name].publish(floats, tmp_path / "stored", tmp_path / "decoded", projection)
    expected, found = canonical(tmp_path / "decoded"), canonical(stored)
    assert expected.keys() == found.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key], key)
    if name == "awq-32":
        bundle = build(stored, tmp_path / "bundle", ["cpu:int4"]).directory
        assert check_parity(bundle, stored, quick=True).passed
