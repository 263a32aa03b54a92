"""Quantized checkpoints in the layouts in which they are published, made of float ones by `tests.support.quantized`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.quantized import Tensors, Writer, awq, fp8_tiles, gptq, int8_rows, mxfp4, nvfp4, packed_ints
from tests.support.tiny import TinyCheckpoint, edit_tensors

WEIGHTS = "model.safetensors"


def projections(name: str) -> bool:
    """The projections of the decoder: neither routers, embeddings nor the vision tower."""
    return "language_model" in name and name.removesuffix(".weight").endswith(
        ("_proj", "_proj_with_mqa", "in_proj_qkv", "in_proj_z")
    )


@dataclass(frozen=True)
class Published:
    """How a checkpoint is published.

    matrices: what writes a weight [N, K]. config: the quantization config. fused: what writes experts [E, N, K]; None
    where each expert's part is a matrix. transposed: fused experts are [E, in, out]. beside: endings of scalars that
    lie beside each weight. bare: tensors of a matrix are named without its `.weight`. file, path: where the config
    stands.
    """

    matrices: Writer
    config: dict[str, Any]
    fused: Writer | None = None
    transposed: bool = False
    beside: tuple[str, ...] = ()
    bare: bool = False
    file: str = "config.json"
    path: tuple[str, ...] = ("quantization_config",)

    def publish(self, source: Path, target: Path, plain: Path, chosen: Callable[[str], bool] = projections) -> Path:
        """A float32 checkpoint as one in this format, at `target`, and as one with the decoded values, at `plain`.

        chosen: names of the tensors that are quantized.
        """
        stored: Tensors = {}
        decoded: Tensors = {}
        tensors = _fuse(load_file(source / WEIGHTS)) if self.fused else _split(load_file(source / WEIGHTS))
        for name, tensor in tensors.items():
            if not chosen(name):
                stored[name] = decoded[name] = tensor.contiguous()
                continue
            turned = self.transposed and tensor.dim() == 3
            writer = self.fused if self.fused and tensor.dim() == 3 else self.matrices
            found, values = writer((tensor.mT if turned else tensor).contiguous().numpy())
            base = name.removesuffix(".weight") if self.bare else name
            stored |= {base + ending: part.contiguous() for ending, part in found.items()}
            stored |= {name.removesuffix(".weight") + ending: torch.tensor(0.5) for ending in self.beside}
            decoded[name] = torch.from_numpy(values).contiguous()
        for directory, content in ((target, stored), (plain, decoded)):
            shutil.copytree(source, directory)
            save_file(content, directory / WEIGHTS, {"format": "pt"})
        _write(target / self.file, self.path, self.config)
        return target


def _write(file: Path, path: tuple[str, ...], config: dict[str, Any]) -> None:
    whole = json.loads(file.read_text()) if file.exists() else {}
    inner = whole
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = config
    file.write_text(json.dumps(whole))


def _split(tensors: Tensors) -> Tensors:
    """Fused experts as a matrix for each expert and part."""
    parts: Tensors = {}
    for name, tensor in tensors.items():
        base, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            parts[name] = tensor
            continue
        names = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for e, expert in enumerate(tensor):
            parts |= {f"{base}.{e}.{n}.weight": p for n, p in zip(names, expert.chunk(len(names)), strict=True)}
    return parts


def _fuse(tensors: Tensors) -> Tensors:
    """Experts that lie one by one as one tensor for all."""
    one = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    found = {name: match for name in tensors if (match := one.fullmatch(name))}
    fused = {name: tensor for name, tensor in tensors.items() if name not in found}
    for base in dict.fromkeys(match[1] for match in found.values()):
        experts = 1 + max(int(match[2]) for match in found.values() if match[1] == base)
        part = [[tensors[f"{base}.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")] for e in range(experts)]
        fused[f"{base}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in part])
        fused[f"{base}.down_proj"] = torch.stack([down for _, _, down in part])
    return fused


def sized(model_type: str) -> dict[str, Any]:
    """Of text_config: blocks of 128 in both directions, some of them cut off, in matrices that are not square."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 320}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    match model_type:
        case "qwen3_vl_moe":
            rope |= {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
            return sizes | {"num_experts": 4, "head_dim": 32, "rope_parameters": rope}
        case "glm4v_moe":
            rope |= {"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}
            return sizes | {"n_routed_experts": 4, "head_dim": 32, "intermediate_size": 384, "rope_parameters": rope}
        case "ernie4_5_vl_moe":
            return {
                "hidden_size": 256,
                "moe_intermediate_size": [320, 192],
                "rope_parameters": rope | {"mrope_section": [24, 24, 16]},
            }
        case "gemma4":
            return sizes | {"num_experts": 4, "intermediate_size": 384}
        case "mistral3" | "kimi_k25":
            return sizes | {"n_routed_experts": 4, "q_lora_rank": 192, "kv_lora_rank": 160}
        case "llama4":
            widths = {"hidden_size": 256, "intermediate_size": 320, "intermediate_size_mlp": 384}
            return widths | {
                "num_local_experts": 4,
                "num_hidden_layers": 2,
                "no_rope_layers": [0, 1],
                "moe_layers": [1],
            }
    return sizes | {"num_experts": 4, "shared_expert_intermediate_size": 320}


def floats(model_type: str, directory: Path, **text: Any) -> Path:
    """A float32 checkpoint of these sizes. text: fields of text_config that differ."""
    text = sized(model_type) | text
    sized_by_text = ("ernie4_5_vl_moe", "gemma4", "kimi_k25", "llama4", "mistral3")  # the width of visual tokens
    vision = {} if model_type in sized_by_text else {"out_hidden_size": text["hidden_size"]}
    saved = TinyCheckpoint(model_type, text=text, vision=vision).save(directory)
    if model_type == "llama4":  # whose experts are [E, in, out]
        edit_tensors(saved, turn_experts)
    return saved


def turn_experts(tensors: Tensors) -> None:
    """The last two axes of all fused experts, exchanged."""
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.dim() == 3:
            raw = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
            tensors[name] = raw.mT.contiguous().view(tensor.dtype)


def _groups(format_: str, weights: dict[str, Any]) -> dict[str, Any]:
    """compressed-tensors: one group for all Linear layers."""
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*visual.*"],
        "kv_cache_scheme": None,
    }


def _int4(group: int, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    return _groups("pack-quantized", weights | {"dynamic": False, "actorder": None, "observer": "minmax"})


def _gptq(group: int, sym: bool, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": sym, "desc_act": False, **more}


SKIPPED = ["lm_head", "model.visual", "model.language_model.layers.*.mlp.gate"]
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*visual*", "*mlp.gate"]}
NVFP4 |= {"producer": {"name": "modelopt"}, "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"]}

_block, _modelopt = fp8_tiles(128, 128, "_scale_inv"), nvfp4("", "_scale", "_scale_2", divides=False)
_fused_modelopt = nvfp4("", "_weight_scale", "_weight_scale_2", divides=False)
_compressed_fp4 = nvfp4("_packed", "_scale", "_global_scale", divides=True)
FORMATS = {
    "fp8-blocks": Published(_block, BLOCKS | {"modules_to_not_convert": SKIPPED}),
    "fp8-blocks-float32-scales": Published(fp8_tiles(128, 128, "_scale_inv", torch.float32), BLOCKS),
    "fp8-blocks-in-text-config": Published(_block, BLOCKS, path=("text_config", "quantization_config")),
    "fp8-blocks-fused": Published(_block, BLOCKS, fused=_block),
    "fp8-blocks-fused-transposed": Published(_block, BLOCKS, fused=_block, transposed=True),
    "fp8-static-fused": Published(
        fp8_tiles(0, 0, "_scale_inv", shape=()),
        STATIC,
        fused=fp8_tiles(0, 0, "_scale_inv"),
        beside=("_activation_scale",),
    ),
    "fp8-channels": Published(fp8_tiles(1, 0, "_scale"), _groups("float-quantized", FP8), beside=(".input_scale",)),
    "int8-channels": Published(
        int8_rows, _groups("int-quantized", FP8 | {"type": "int"}), beside=(".input_zero_point",)
    ),
    "fp8-modelopt": Published(
        fp8_tiles(0, 0, "_scale", torch.float32, ()), {"quant_method": "modelopt", "quant_algo": "FP8"}
    ),
    "mxfp8": Published(fp8_tiles(1, 32, "_scale_inv", torch.uint8), {"quant_method": "fp8", "scale_fmt": "ue8m0"}),
    "int4-32": Published(packed_ints(32), _int4(32, True)),
    "int4-128-zeros": Published(packed_ints(128, zeros=True), _int4(128, False)),
    "int4-32-zeros-fused": Published(packed_ints(32, zeros=True), _int4(32, False), fused=packed_ints(32, zeros=True)),
    "int4-compression-config": Published(packed_ints(32), _int4(32, True), path=("compression_config",)),
    "int8-128-zeros": Published(
        packed_ints(128, zeros=True, bits=8),
        _groups("pack-quantized", _int4(128, False)["config_groups"]["group_0"]["weights"] | {"num_bits": 8}),
    ),
    "gptq-8-bits": Published(gptq(64, bits=8), _gptq(64, True) | {"bits": 8}, bare=True),
    "gptq-128": Published(gptq(128), _gptq(128, True), bare=True),
    "gptq-32-zeros": Published(gptq(32, zeros=True), _gptq(32, False, checkpoint_format="gptq"), bare=True),
    "gptq-v2-zeros": Published(
        gptq(32, zeros=True, offset=0), _gptq(32, False, checkpoint_format="gptq_v2"), bare=True
    ),
    "gptq-act-order": Published(gptq(32, act_order=True), _gptq(32, True) | {"desc_act": True}, bare=True),
    "awq-32": Published(awq(32), AWQ | {"group_size": 32}, bare=True),
    "awq-128": Published(awq(128), AWQ | {"group_size": 128}, bare=True),
    "nvfp4": Published(_modelopt, NVFP4, beside=(".input_scale",)),
    "nvfp4-hf-quant-config": Published(
        _modelopt,
        {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        file="hf_quant_config.json",
        path=("quantization",),
    ),
    "nvfp4-fused": Published(_modelopt, NVFP4, fused=_fused_modelopt, beside=("_input_scale",)),
    "nvfp4-compressed": Published(
        _compressed_fp4, _groups("nvfp4-pack-quantized", FP4), beside=(".input_global_scale",)
    ),
    "nvfp4-compressed-fused": Published(_compressed_fp4, _groups("nvfp4-pack-quantized", FP4), fused=_compressed_fp4),
    "mxfp4-compressed": Published(
        mxfp4("_packed", "_scale"),
        _groups("mxfp4-pack-quantized", FP4 | {"strategy": "group", "group_size": 32}),
    ),
    "mxfp4-compressed-fused": Published(
        mxfp4("_packed", "_scale"),
        _groups("mxfp4-pack-quantized", FP4 | {"strategy": "group", "group_size": 32}),
        fused=mxfp4("_packed", "_scale"),
    ),
    "mxfp4-fused": Published(
        fp8_tiles(128, 128, "_scale_inv"), {"quant_method": "mxfp4"}, fused=mxfp4("_blocks", "_scales")
    ),
}
