"""Quantized checkpoints, as published, are read as the definitions of their formats say, to the bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.codes import CodeForm, decode
from moevlm.export.graph.moved_codes import coded
from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.dtypes import E4M3
from tests.support.checkpoints import canonical
from tests.support.published import BLOCKS, FORMATS, WEIGHTS, Published, floats, projections, turn_experts
from tests.support.quantized import fp8_tiles, mxfp4, nvfp4, packed_ints

QWEN, GLM, QWEN35, GEMMA, MISTRAL = "qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe", "gemma4", "mistral3"
LLAMA4, LLAMA4_STORED = "llama4", {"nvfp4": 16, "float32": 50}
OF_GLM = ("fp8-static-fused", "fp8-blocks-fused", "int4-128-zeros", "gptq-128", "awq-32", "nvfp4")
OF_QWEN35 = ("fp8-blocks", "fp8-blocks-fused", "gptq-128", "awq-32", "nvfp4", "nvfp4-compressed")
OF_GEMMA = ("nvfp4", "nvfp4-fused", "nvfp4-compressed", "int4-32", "awq-32")
OF_MISTRAL = ("fp8-static-fused", "nvfp4-compressed")  # latent attention, whose rows are brought into another order
OF_LLAMA4 = ("fp8-channels", "int4-32", "nvfp4-fused", "nvfp4-compressed", "fp8-blocks-fused-transposed")
NAMES = {QWEN: FORMATS, GLM: OF_GLM, QWEN35: OF_QWEN35, GEMMA: OF_GEMMA, MISTRAL: OF_MISTRAL, LLAMA4: OF_LLAMA4}
CASES = [(family, name) for family, names in NAMES.items() for name in names]
LAYER = "model.language_model.layers.1."


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """float32 checkpoints, to be left as they are."""
    root = tmp_path_factory.mktemp("floats")
    return {name: floats(name, root / name) for name in NAMES}


@pytest.fixture
def publish(originals: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes FORMATS[name]: the quantized checkpoint, and the same with decoded values."""

    def write(name: str, model_type: str = QWEN, chosen: Callable[[str], bool] = projections) -> tuple[Path, Path]:
        place = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        return FORMATS[name].publish(
            originals[model_type], place / "quantized", place / "plain", chosen
        ), place / "plain"

    return write


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def model_of(directory: Path) -> CanonicalModel:
    with Checkpoint.open(directory) as checkpoint:
        return CanonicalModel.of(checkpoint)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_published_format_is_read_as_its_definition_says(
    name: str, model_type: str, publish: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moevlm.export.graph.weights.SLICE_BYTES", 40_000)  # slices that begin inside blocks and words
    quantized, plain = publish(name, model_type)
    same(canonical(quantized), canonical(plain))


def test_experts_one_by_one_and_fused_are_one_model(publish: Callable[..., tuple[Path, Path]]) -> None:
    """Rule 1. Groups of a row are the same in both layouts."""
    one_by_one, fused = (publish(name)[0] for name in ("mxfp4-compressed", "mxfp4-compressed-fused"))
    names = [set(load_file(directory / WEIGHTS)) for directory in (one_by_one, fused)]
    assert f"{LAYER}mlp.experts.3.up_proj.weight_packed" in names[0]
    assert f"{LAYER}mlp.experts.gate_up_proj_packed" in names[1]
    same(canonical(one_by_one), canonical(fused))


def test_experts_of_gemma_may_lie_in_a_module_called_moe(publish: Callable[..., tuple[Path, Path]]) -> None:
    """Rule 1: both names are published for one family."""
    quantized, plain = publish("nvfp4-compressed", GEMMA)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name.replace(".experts.", ".moe.experts.")] = tensors.pop(name)

    edit(quantized, rename)
    assert "model.language_model.layers.0.moe.experts.3.up_proj.weight_packed" in load_file(quantized / WEIGHTS)
    same(canonical(quantized), canonical(plain))


def test_experts_may_be_counted_behind_the_name_of_their_part(publish: Callable[..., tuple[Path, Path]]) -> None:
    """Rule 1: as ModelOpt names Qwen3-VL-MoE's."""
    quantized, plain = publish("nvfp4")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[re.sub(r"\.experts\.(\d+)\.(\w+)\.", r".experts.\2.\1.", name)] = tensors.pop(name)

    edit(quantized, rename)
    assert "model.language_model.layers.0.mlp.experts.up_proj.3.weight_scale" in load_file(quantized / WEIGHTS)
    same(canonical(quantized), canonical(plain))


@pytest.mark.parametrize(("model_type", "stored"), [(QWEN, {"nvfp4": 12, "float32": 58}), (LLAMA4, LLAMA4_STORED)])
def test_fused_fp4_experts_may_be_packed_along_the_first_of_two_axes(
    model_type: str, stored: dict[str, int], publish: Callable[..., tuple[Path, Path]]
) -> None:
    """[E, in / 2, out], as ModelOpt writes experts that are [E, in, out] in the model."""
    quantized, plain = publish("nvfp4-fused", model_type)
    edit(quantized, turn_experts)
    same(canonical(quantized), canonical(plain))
    found = coded(model_of(quantized).decoder_weights["layers.1.feed_forward.down"])
    assert found is not None
    assert found.form == CodeForm("fp4", 16, scales=E4M3)
    assert model_of(quantized).stored_as == stored


def test_gate_and_up_may_have_global_scales_of_their_own(publish: Callable[..., tuple[Path, Path]]) -> None:
    quantized, plain = publish("nvfp4-fused")
    name = f"{LAYER}mlp.experts.gate_up_proj"

    def split(tensors: dict[str, torch.Tensor]) -> None:
        whole = tensors[f"{name}_weight_scale_2"]
        tensors[f"{name}_weight_scale_2"] = torch.stack([whole, 2 * whole], 1)[..., None]

    def double_up(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][:, 320:] *= 2

    edit(quantized, split)
    edit(plain, double_up)
    same(canonical(quantized), canonical(plain))


def test_tensor_on_the_ignore_list_has_no_scale_and_stays(publish: Callable[..., tuple[Path, Path]]) -> None:
    """Rule 2. The shared expert in bfloat16 among int4, as published."""
    quantized, plain = publish("int4-32", GLM, lambda name: projections(name) and "shared_experts" not in name)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "shared_experts" in name]:
            tensors[name] = tensors[name].to(torch.bfloat16)

    edit(quantized, narrow)
    edit(plain, narrow)
    same(canonical(quantized), canonical(plain))
    assert model_of(quantized).stored_as == {"bfloat16": 3, "float32": 42, "int4 in groups of 32": 23}


def test_dtype_decides_tensor_by_tensor_whatever_the_config_says(
    publish: Callable[..., tuple[Path, Path]],
) -> None:
    """Rule 3. A layer in fp8, one projection of it in float32, in a checkpoint whose config says NVFP4."""
    (nvfp4_, plain), (fp8, plain_fp8) = publish("nvfp4"), publish("fp8-blocks")
    for directory, other in ((nvfp4_, fp8), (plain, plain_fp8)):
        theirs = load_file(other / WEIGHTS)
        original = load_file(plain / WEIGHTS)[f"{LAYER}self_attn.q_proj.weight"]

        def mix(tensors: dict[str, torch.Tensor], theirs: Any = theirs, original: Any = original) -> None:
            for name in [name for name in tensors if name.startswith(LAYER)]:
                del tensors[name]
            tensors |= {name: tensor for name, tensor in theirs.items() if name.startswith(LAYER)}
            tensors.pop(f"{LAYER}self_attn.q_proj.weight_scale_inv", None)
            tensors[f"{LAYER}self_attn.q_proj.weight"] = original

        edit(directory, mix)
    same(canonical(nvfp4_), canonical(plain))
    assert model_of(nvfp4_).stored_as == {"float32": 59, "nvfp4": 16, "fp8 in blocks of 128 x 128": 15}


def test_tower_stays_as_it_is_without_an_ignore_list(publish: Callable[..., tuple[Path, Path]]) -> None:
    """Rule 5. The config's group is every Linear; the tower has none of the quantized tensors."""
    quantized, plain = publish("fp8-channels")
    text = (quantized / "config.json").read_text()
    assert '"re:.*visual.*"' in text
    (quantized / "config.json").write_text(text.replace('"re:.*visual.*"', '"lm_head"'))
    same(canonical(quantized), canonical(plain))


def test_global_scale_multiplies_in_modelopt_and_divides_in_compressed_tensors(
    publish: Callable[..., tuple[Path, Path]],
) -> None:
    """Rule 6. The same bytes, with the inverse of the global scale under the other's names."""
    modelopt, _ = publish("nvfp4")
    other, _ = publish("nvfp4-compressed")
    theirs = load_file(modelopt / WEIGHTS)
    for name in [name for name in theirs if name.endswith("_scale_2")]:
        theirs[name] = torch.tensor(2.0**-10)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        for name, tensor in theirs.items():
            if name.endswith("_scale_2"):
                tensors[name.replace("_scale_2", "_global_scale")] = torch.tensor(2.0**10)
            else:
                tensors[name + "_packed" if f"{name}_scale_2" in theirs else name] = tensor

    edit(modelopt, lambda tensors: tensors.update(theirs))
    edit(other, rename)
    same(canonical(modelopt), canonical(other))
    values = canonical(modelopt)["decoder.layers.0.attention.q.weight"]
    packed = theirs["model.language_model.layers.0.self_attn.q_proj.weight"]
    scale = theirs["model.language_model.layers.0.self_attn.q_proj.weight_scale"].float()
    number = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6][int(packed[0, 0]) & 15]
    assert values[0, 0] == number * float(scale[0, 0]) / 1024


def test_scales_of_caches_and_activations_are_counted_by_name(publish: Callable[..., tuple[Path, Path]]) -> None:
    """Rule 7, and rule 4 for what nothing reads."""
    quantized, plain = publish("nvfp4")
    scales = {f"model.language_model.layers.{i}.self_attn.{kv}_proj.{kv}_scale": 0.01 for i in range(2) for kv in "kv"}
    edit(quantized, lambda tensors: tensors.update({name: torch.tensor(value) for name, value in scales.items()}))
    same(canonical(quantized), canonical(plain))
    assert model_of(quantized).left_out == {"input_scale": 32, ".k_scale": 2, ".v_scale": 2}


def test_scales_of_layers_that_are_left_out_are_left_out_with_them(
    publish: Callable[..., tuple[Path, Path]],
) -> None:
    """Rule 4: an fp8 layer for multi-token prediction, which transformers does not load."""
    quantized, plain = publish("fp8-blocks", GLM)
    layer = "model.language_model.layers.46.eh_proj.weight"
    extra = {layer: torch.zeros(256, 512, dtype=torch.float8_e4m3fn), f"{layer}_scale_inv": torch.ones(2, 4)}
    edit(quantized, lambda tensors: tensors.update(extra))
    same(canonical(quantized), canonical(plain))
    assert model_of(quantized).left_out == {"model.layers.46": 1}


FORMS = {
    "fp8-blocks": CodeForm("fp8", 128, 1, scales="bfloat16"),  # gate and up have 2.5 blocks of rows each
    "fp8-blocks-fused": CodeForm("fp8", 128, 128, scales="bfloat16"),
    "fp8-blocks-fused-transposed": CodeForm("fp8", 128, 128, scales="bfloat16"),
    "fp8-channels": CodeForm("fp8", 256, scales="bfloat16"),
    "mxfp8": CodeForm("fp8", 32, scales="bfloat16"),
    "int4-32": CodeForm("int4", 32, scales="bfloat16"),
    "int4-128-zeros": CodeForm("int4", 128, zeros=True, scales="bfloat16"),
    "gptq-128": CodeForm("int4", 128, scales="float16"),
    "awq-32": CodeForm("int4", 32, zeros=True, scales="float16"),
    "nvfp4": CodeForm("fp4", 16, scales=E4M3),
    "mxfp4-fused": CodeForm("fp4", 32, scales="bfloat16"),
}


@pytest.mark.parametrize("name", FORMS)
def test_codes_follow_joined_stacked_and_turned_weights(name: str, publish: Callable[..., tuple[Path, Path]]) -> None:
    model = model_of(publish(name)[0])
    assert coded(model.decoder_weights["layers.1.feed_forward.router.weight"]) is None
    for part, form in (("gate_up", FORMS[name]), ("down", None)):
        weight = model.decoder_weights[f"layers.1.feed_forward.{part}"]
        found = coded(weight)
        assert found is not None
        assert found.shape == weight.shape
        assert form in (None, found.form)
        codes = found.codes(1, 3)
        groups = -(-weight.shape[2] // found.form.group_size)
        assert codes.codes.shape == (2, weight.shape[1], groups, found.form.group_size)
        assert codes.codes.dtype == np.uint8
        assert codes.scales.shape == codes.codes.shape[:-1]
        assert (codes.zeros is not None) == found.form.zeros
        assert (codes.levels is not None) == (found.form.scales == E4M3)
        if codes.levels is not None:
            of_groups = codes.levels.groups.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            np.testing.assert_array_equal(of_groups * codes.levels.rows[..., None], codes.scales)
        np.testing.assert_array_equal(decode(codes, found.form, weight.shape[2]), weight.rows(1, 3))
        blocks = codes.scales[:, : weight.shape[1] // found.form.block_rows * found.form.block_rows]
        blocks = blocks.reshape(2, -1, found.form.block_rows, groups)
        assert (blocks == blocks[:, :, :1]).all()


def test_codes_follow_query_and_gate_rows_that_lie_by_heads(publish: Callable[..., tuple[Path, Path]]) -> None:
    quantized, plain = publish("gptq-128", QWEN35)
    expected = canonical(plain)
    layer = next(i for i in range(4) if f"decoder.layers.{i}.attention.gate.weight" in expected)
    for part in ("q", "gate"):
        found = coded(model_of(quantized).decoder_weights[f"layers.{layer}.attention.{part}.weight"])
        assert found is not None
        values = expected[f"decoder.layers.{layer}.attention.{part}.weight"][3:]
        np.testing.assert_array_equal(decode(found.codes(3, len(values) + 3), found.form, 256), values)


def test_stated_sizes_beyond_a_weight_take_no_memory(originals: dict[str, Path], tmp_path: Path) -> None:
    config = BLOCKS | {"weight_block_size": [1 << 20, 1 << 20]}
    published = Published(fp8_tiles(0, 0, "_scale_inv"), config)
    directory = published.publish(originals[QWEN], tmp_path / "quantized", tmp_path / "plain")
    same(canonical(directory), canonical(tmp_path / "plain"))
    found = coded(model_of(directory).decoder_weights["layers.0.attention.q.weight"])
    assert found is not None
    assert found.codes(0, 2).codes.shape == (2, 1, 256)


def test_scattered_groups_decode_and_have_no_codes(publish: Callable[..., tuple[Path, Path]]) -> None:
    weight = model_of(publish("gptq-act-order")[0]).decoder_weights["layers.0.attention.q.weight"]
    assert coded(weight) is None
    assert read(weight).dtype == np.float32


def test_transformers_dequantizes_to_the_same_weights(tmp_path: Path) -> None:
    """What it reads of these formats: fp8 of experts that lie one by one, in whole blocks."""
    import transformers

    whole = floats(GLM, tmp_path / "whole", moe_intermediate_size=384, intermediate_size=512)
    directory = FORMATS["fp8-blocks"].publish(whole, tmp_path / "quantized", tmp_path / "plain")
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    theirs, ours = model.state_dict(), canonical(directory)
    for part, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        expected = theirs[f"{LAYER}mlp.experts.{name}"].numpy()
        np.testing.assert_array_equal(ours[f"decoder.layers.1.feed_forward.{part}"], expected)
    expected = theirs[f"{LAYER}self_attn.k_proj.weight"].numpy()
    np.testing.assert_array_equal(ours["decoder.layers.1.attention.k.weight"], expected)


@pytest.mark.parametrize(
    ("format_", "writer", "weights"),
    [
        ("pack-quantized", packed_ints(32), {"num_bits": 4, "type": "int", "group_size": 32}),
        ("pack-quantized", packed_ints(32, True), {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}),
        (
            "pack-quantized",
            packed_ints(32, True, bits=8),
            {"num_bits": 8, "type": "int", "group_size": 32, "symmetric": False},
        ),
        ("float-quantized", fp8_tiles(1, 0, "_scale"), {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("mxfp4-pack-quantized", mxfp4("_packed", "_scale"), {"num_bits": 4, "type": "float", "group_size": 32}),
        (
            "nvfp4-pack-quantized",
            nvfp4("_packed", "_scale", "_global_scale", divides=True),
            {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
        ),
    ],
    ids=["int4", "int4-zeros", "int8-zeros", "fp8", "mxfp4", "nvfp4"],
)
def test_writers_agree_with_the_package_compressed_tensors(format_: str, writer: Any, weights: dict[str, Any]) -> None:
    """The tests above rest on the writers: these decode to the values that the formats' own package finds."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors, values = writer(np.random.default_rng(0).standard_normal((64, 128), np.float32))
    named = {f"weight{ending}": tensor for ending, tensor in tensors.items()}
    if "weight_scale" in named and named["weight_scale"].dtype == torch.bfloat16:
        named["weight_scale"] = named["weight_scale"].float()  # whose dtype is that of the result
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**{"strategy": "group"} | weights))
    theirs = BaseCompressor.get_value_from_registry(format_).decompress(named, scheme)["weight"].float().numpy()
    if "nvfp4" in format_:  # which rounds its scales to bfloat16
        np.testing.assert_allclose(theirs, values, rtol=2**-8)
    else:
        np.testing.assert_array_equal(theirs, values)
