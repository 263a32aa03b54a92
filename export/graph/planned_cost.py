"""What an engine with dense weights of one dtype will cost, from the model's config alone; nothing is traced."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from moevlm.export.config import ModelConfig, MoEConfig, VisionConfig
from moevlm.export.graph.cost import token_macs
from moevlm.export.modules.decoder import Decoder
from moevlm.export.modules.gated_delta import GatedDelta
from moevlm.export.modules.layers import ImageExperts, MoE
from moevlm.export.modules.vision import vision_tower
from moevlm.export.modules.vision.base import PER_PATCH, TABLES
from moevlm.runtime.core.engine_metadata import CostMetadata

_FLOAT32 = 4  # bytes


def planned_cost(
    config: ModelConfig, weight: int, router_weight: int, expert_bytes: Callable[[tuple[str, str], MoEConfig], int]
) -> CostMetadata:
    """As `cost` will find it in the lowered graphs.

    weight, router_weight: bytes of a stored weight; the convolutions before the delta rule stay float32. expert_bytes:
    of a bank of experts, as they are stored; see `ModelConfig.expert_matrices`.
    """
    with torch.device("meta"):
        decoder = Decoder(config.decoder)
    sparse = [module for module in decoder.modules() if isinstance(module, MoE)]
    of_images = [moe for moe in sparse if isinstance(moe, ImageExperts)]
    of_text = [moe for moe in sparse if not isinstance(moe, ImageExperts)]
    names = {module: (f"{name}.gate_up", f"{name}.down") for name, module in decoder.named_modules()}

    def bytes_of_one(banks: Sequence[MoE]) -> int:
        return sum(expert_bytes(names[moe], moe.config) // moe.config.experts for moe in banks)

    routed = [parameter for moe in sparse for parameter in moe.of_experts]
    routers = sum(moe.router.weight.numel() for moe in sparse)
    delta = [module for module in decoder.modules() if isinstance(module, GatedDelta)]
    convolutions = sum(module.conv.numel() for module in delta)
    head = config.decoder.vocabulary * config.decoder.hidden
    tables = [decoder.embedding, *([] if decoder.head is None else [decoder.head])]
    dense = sum(size for _, size in _matrices(decoder, (*routed, *tables)))
    return CostMetadata(
        dense_bytes=(dense - routers - convolutions) * weight + routers * router_weight + convolutions * _FLOAT32,
        expert_bytes=bytes_of_one(of_text),
        image_expert_bytes=bytes_of_one(of_images),
        head_bytes=head * weight,
        dense_macs=dense,
        expert_macs=sum((moe.gate_up.numel() + moe.down.numel()) // moe.config.experts for moe in of_text),
        head_macs=head,
        state_macs=sum(module.spec.state_macs for module in delta),
        **_of_vision(config.vision, decoder.embedding.numel(), weight),
    )


def _of_vision(vision: VisionConfig | None, table: int, weight: int) -> dict[str, int]:
    """The costs of images, and the bytes of all tables. table: elements of the decoder's."""
    if vision is None:
        return {"vision_bytes": 0, "patch_macs": 0, "patch_pair_macs": 0, "lookup_bytes": table * weight}
    with torch.device("meta"):
        module = vision_tower(vision)
    tables = {name: one for name, one in module.named_parameters() if name in TABLES}
    patches, tower = dict(_matrices(module, [*tables.values()])), vision.metadata()
    looked_up = tables["position_embedding"].numel() if "position_index" in tower.inputs else 0
    places, width = sum(one.numel() for one in tables.values()), vision.heads * vision.head_dim
    return {
        "vision_bytes": (sum(patches.values()) + places - looked_up) * weight,
        "patch_macs": sum(
            size if name.startswith(PER_PATCH) else token_macs(size, tower) for name, size in patches.items()
        )
        + 2 * tower.queries * width,
        "patch_pair_macs": vision.depth * 2 * width,
        "image_macs": tower.queries * sum(n for name, n in patches.items() if not name.startswith(PER_PATCH)),
        "lookup_bytes": (table + looked_up) * weight,
    }


def _matrices(module: nn.Module, left_out: Sequence[nn.Parameter]) -> Iterator[tuple[str, int]]:
    """Name and elements of each matrix of a module."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and all(parameter is not other for other in left_out):
            yield name, parameter.numel()
