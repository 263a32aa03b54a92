"""The per-patch tables equal what Hugging Face's vision towers compute inside."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeVisionConfig
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionEmbeddings, Glm4vMoeVisionRotaryEmbedding
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionRotaryEmbedding
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.request.images.grid_tables import pack_grids
from moevlm.runtime.request.vision_inputs import pack

QWEN = GridTower(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    channels=3,
    head_dim=72,
    rope_theta=10_000.0,
    position_grid=48,
    position_resampling="bilinear",
    deepstack=3,
)
GLM = msgspec.structs.replace(QWEN, patch_size=14, head_dim=128, position_grid=24, position_resampling="bicubic")
FAMILIES = pytest.mark.parametrize("metadata", [QWEN, GLM], ids=["qwen", "glm"])


def random_grids(merge: int, seed: int = 5) -> list[tuple[int, int]]:
    """Small, elongated and large grids, both sides multiples of the merge."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, (12, 2)) * merge
    return [(merge, merge), (merge, 90 * merge), (48, 48), (24, 24), *((int(h), int(w)) for h, w in sizes)]


def thw(grids: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([(1, h, w) for h, w in grids])


def resampled(grids: list[tuple[int, int]], metadata: GridTower, table: torch.Tensor) -> np.ndarray:
    """[P, hidden]: what the vision graph makes of the taps."""
    tables = pack_grids(grids, metadata)
    return np.einsum("pt,pth->ph", tables.position_weight, table.numpy()[tables.position_index])


@pytest.mark.parametrize("merge", [1, 2, 3])
@FAMILIES
def test_taps_equal_hugging_faces_interpolation_table(metadata: GridTower, merge: int) -> None:
    metadata = msgspec.structs.replace(metadata, merge_size=merge)
    grids = [(h * merge, w * merge) for h, w in random_grids(1)]
    tables = pack_grids(grids, metadata)
    bilinear = metadata.position_resampling == "bilinear"
    index, weight = get_vision_interpolation_indices_and_weights(
        thw(grids),
        metadata.position_grid,
        metadata.position_resampling,
        align_corners=bilinear,
        spatial_merge_size=merge,
    )
    assert (tables.position_index.dtype, tables.position_weight.dtype) == (np.int64, np.float32)
    if bilinear:
        np.testing.assert_array_equal(tables.position_index, index)
        np.testing.assert_allclose(tables.position_weight, weight, rtol=0, atol=1e-6)
    # Half-pixel coordinates that are a table row up to rounding may be put on either side of it, with the same sum.
    table = np.random.default_rng(4).uniform(-1, 1, (metadata.position_grid**2, 3))
    ours = np.einsum("pt,pth->ph", tables.position_weight, table[tables.position_index])
    theirs = np.einsum("pt,pth->ph", weight.numpy(), table[index.numpy()])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_bicubic_positions_equal_glm_embeddings_module() -> None:
    config = Glm4vMoeVisionConfig(hidden_size=8, num_heads=2, patch_size=14, image_size=14 * GLM.position_grid)
    module = Glm4vMoeVisionEmbeddings(config)
    grids = random_grids(2)
    places = get_vision_position_ids(thw(grids), 2)
    lengths = [h * w for h, w in grids]
    with torch.no_grad():
        wanted = module(torch.zeros(sum(lengths), 8), lengths, thw(grids), places[:, 0], places[:, 1])
    ours = resampled(grids, GLM, module.position_embedding.weight.detach())
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


@FAMILIES
def test_positions_equal_a_plain_resize_of_the_table(metadata: GridTower) -> None:
    side = metadata.position_grid
    table = torch.from_numpy(np.random.default_rng(1).standard_normal((side * side, 5)).astype(np.float32))
    options: dict[str, Any] = {"mode": metadata.position_resampling, "align_corners": metadata is QWEN}
    raster = msgspec.structs.replace(metadata, merge_size=1)
    for grid in [(1, 1), (2, 7), (side, side), (3 * side, 5), (31, 62)]:
        wanted = F.interpolate(table.T.reshape(1, 5, side, side), size=grid, **options)
        np.testing.assert_allclose(
            resampled([grid], raster, table), wanted.reshape(5, -1).T, rtol=0, atol=5e-5, err_msg=str(grid)
        )


@FAMILIES
def test_weights_of_a_patch_sum_to_one(metadata: GridTower) -> None:
    weight = pack_grids(random_grids(2), metadata).position_weight
    np.testing.assert_allclose(weight.sum(axis=1, dtype=np.float64), 1, rtol=0, atol=1e-6)


@FAMILIES
def test_rope_equals_hugging_faces_rotary_module(metadata: GridTower) -> None:
    hidden = {"hidden_size": metadata.head_dim * 2, "num_heads": 2}
    module = (
        Qwen3VLMoeVisionRotaryEmbedding(Qwen3VLMoeVisionConfig(**hidden))
        if metadata is QWEN
        else Glm4vMoeVisionRotaryEmbedding(Glm4vMoeVisionConfig(**hidden))
    )
    grids = random_grids(2)
    places = get_vision_position_ids(thw(grids), 2)
    half = metadata.head_dim // 2
    tables = pack_grids(grids, metadata)
    for ours, theirs in zip((tables.rope_cos, tables.rope_sin), module(torch.zeros(1), places), strict=True):
        assert (ours.dtype, ours.shape) == (np.float32, (len(places), half))
        np.testing.assert_allclose(ours, theirs[:, :half], rtol=0, atol=1.2e-7)


@FAMILIES
def test_images_begin_at_hugging_faces_sequence_boundaries(metadata: GridTower) -> None:
    grids = random_grids(2)
    patches = np.zeros((sum(h * w for h, w in grids), metadata.patch_width), np.float32)
    image_start = pack(patches, grids, metadata).image_start
    assert image_start.dtype == np.int32
    np.testing.assert_array_equal(image_start, get_vision_cu_seqlens(thw(grids)))


@FAMILIES
def test_packed_tables_are_the_single_tables_one_after_the_other(metadata: GridTower) -> None:
    grids = random_grids(2)
    singles = [pack_grids([grid], metadata) for grid in grids]
    for name, packed in pack_grids(grids, metadata)._asdict().items():
        np.testing.assert_array_equal(packed, np.concatenate([getattr(one, name) for one in singles]), err_msg=name)


@FAMILIES
def test_no_grid_gives_tables_of_no_rows(metadata: GridTower) -> None:
    tables = pack_grids([], metadata)
    taps = 4 if metadata is QWEN else 16
    shapes = [(0, taps), (0, taps), (0, metadata.head_dim // 2), (0, metadata.head_dim // 2)]
    assert [table.shape for table in tables] == shapes
    assert [table.dtype for table in tables] == [np.int64, np.float32, np.float32, np.float32]


def test_unknown_resampling_is_refused_by_name() -> None:
    with pytest.raises(BundleError, match=r'position_resampling = "nearest" \(supported: bicubic, bilinear\)'):
        pack_grids([(2, 2)], msgspec.structs.replace(QWEN, position_resampling="nearest"))
