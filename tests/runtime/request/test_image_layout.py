"""Images in pieces: their token ids are those that transformers' processors write, their pixels those of the image."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.models.aria.processing_aria import AriaProcessor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llama4.processing_llama4 import Llama4Processor
from transformers.models.pixtral import image_processing_pil_pixtral

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.manifest import ImageMarks, ModelMetadata, RopeMetadata
from moevlm.runtime.core.towers import Grid, GridTower, QueryTower, VisionMetadata
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.image_limits import ImageLimits
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.images.qwen2_vl import Qwen2VLImages
from moevlm.runtime.request.positions import rope_positions
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.prompt_builder import PromptBuilder
from tests.runtime.request.test_chat import IMAGE as PLACEHOLDER
from tests.runtime.request.test_chat import MODEL as CHAT_MODEL
from tests.runtime.request.test_chat import TOKENIZER
from tests.support.paged_engine import MODEL

INTERNVL = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
PIXTRAL_MODULE = "transformers.models.pixtral"  # whose processor needs torchvision, for its image processor
PIXTRAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
LLAMA4 = (
    *("<|patch|>", "<|image|>", "<|image_start|>", "<|image_end|>"),
    *("<|tile_x_separator|>", "<|tile_y_separator|>"),
)
COUNTED = RopeMetadata(dim=4, theta=1e4)
TILE = 8, 8  # patches, 16 visual tokens


def tokenizer(tokens: tuple[str, ...], **names: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    core.add_tokens([AddedToken(token, special=True) for token in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=names)


def processor(kind: type, *arguments: Any, **named: Any) -> Any:
    """transformers' own, whose image processor is not asked: it may need torchvision."""
    own = {"check_argument_for_proper_class": lambda *_: None}
    return type("Unchecked", (kind,), own)(*arguments, **named)


def model_of(tokens: tuple[str, ...], vision: VisionMetadata = MODEL.vision, **marks: str) -> ModelMetadata:
    ids = {mark: (1 + tokens.index(token),) for mark, token in marks.items()}
    return msgspec.structs.replace(
        MODEL, image_token_id=1, image_marks=ImageMarks(**ids), ropes=(COUNTED,), vision=vision
    )


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("overview", [True, False])
def test_ids_of_tiles_are_those_of_internvls_processor(rows: int, columns: int, overview: bool) -> None:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    text = tokenizer(INTERNVL, **names, context_image_token="<IMG_CONTEXT>")
    theirs = processor(InternVLProcessor, None, text, None, image_seq_length=16)
    layout = ImageLayout(TILE if overview or not rows else None, rows, columns if rows else 0, TILE)
    written = theirs.replace_image_token({"num_patches": [len(layout.grids)]}, 0)
    model = model_of(INTERNVL, begin="<img>", end="</img>")
    assert layout.ids(model) == text.encode(written)
    assert layout.ids(model).count(1) == layout.tokens(model.vision)


@pytest.mark.parametrize("grid", [(2, 2), (2, 6), (6, 2), (4, 8)])
def test_ids_of_rows_are_those_of_pixtrals_processor(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{PIXTRAL_MODULE}.image_processing_pixtral", image_processing_pil_pixtral)
    kind = importlib.import_module(f"{PIXTRAL_MODULE}.processing_pixtral").PixtralProcessor
    text = tokenizer(PIXTRAL)
    theirs = processor(
        kind, None, text, patch_size=4, spatial_merge_size=2, image_token="[IMG]",
        image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]",
    )  # fmt: skip
    written = theirs.replace_image_token({"image_sizes": [(4 * grid[0], 4 * grid[1])]}, 0)
    model = model_of(PIXTRAL, row_break="[IMG_BREAK]", end="[IMG_END]")
    assert ImageLayout(grid).ids(model) == text.encode(written)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (3, 1), (2, 3)])
def test_ids_of_tiles_with_separators_are_those_of_llama4s_processor(rows: int, columns: int) -> None:
    text = tokenizer(LLAMA4)
    theirs = processor(Llama4Processor, None, text, patch_size=4)
    pixels = np.zeros((1, 3, 32, 32))
    written = theirs.replace_image_token({"aspect_ratios": [(rows, columns)], "pixel_values": pixels}, 0)
    names = zip(("begin", "end", "tile_break", "tile_row_end"), LLAMA4[2:], strict=True)
    model = model_of(LLAMA4, placeholder="<|image|>", overview="<|image|>", **dict(names))
    whole = rows * columns == 1
    layout = ImageLayout(TILE) if whole else ImageLayout(TILE, rows, columns, TILE)
    assert layout.ids(model) == text.encode(written)
    assert (model.image_placeholder, model.image_token_id) == (2, 1)


@pytest.mark.parametrize(("side", "queries"), [(490, 128), (980, 256)])
def test_ids_of_an_image_of_one_number_of_tokens_are_those_of_arias_processor(side: int, queries: int) -> None:
    text = tokenizer(("<|img|>",), image_token="<|img|>")
    pixels = {"pixel_values": np.zeros((1, 3, side, side)), "num_crops": 1}
    written = processor(AriaProcessor, None, text).replace_image_token(pixels, 0)
    tower = QueryTower(
        **{"patch_size": 14, "merge_size": 1, "channels": 3, "head_dim": 8, "rope_theta": 0.0},
        queries=queries,
        side=70,
        position_grid=70,
    )
    for grid in ((1, 70), (70, 24)):
        ids = ImageLayout(grid).ids(model_of(("<|img|>",), tower))
        assert ids == text.encode(written) == [1] * tower.tokens(grid)


class Tiled(Qwen2VLImages):
    """Cuts what is larger than a tile into as many tiles as its sides say."""

    def _layout(self, height: int, width: int, limits: ImageLimits) -> ImageLayout:
        del limits
        rows, columns = (max(1, side // 32) for side in (height, width))
        return ImageLayout(TILE) if rows * columns == 1 else ImageLayout(TILE, rows, columns, TILE)


def tiled() -> Tiled:
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    return Tiled({"image_processor_type": "Qwen2VLImageProcessor", **sizes}, MODEL.vision)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_tiles_are_parts_of_the_image_row_by_row_and_its_overview_is_last() -> None:
    image, ours = noise(96, 64), tiled()
    pieces = ours.fit(image)
    assert [ours.grid(piece) for piece in pieces] == ours.layout(image).grids == [TILE] * 7
    rows = [np.concatenate([np.asarray(piece) for piece in pieces[i : i + 3]], axis=1) for i in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), image)  # of this size nothing is resized
    np.testing.assert_array_equal(pieces[-1], image.resize((32, 32), Image.Resampling.BICUBIC))


def test_a_layout_by_header_is_that_of_the_upright_image() -> None:
    image = noise(96, 64)
    image.getexif()[0x0112] = 6
    layout = tiled().layout(image)
    assert (layout.rows, layout.columns) == (3, 2)
    assert layout.grids == [tiled().grid(piece) for piece in tiled().fit(tiled().open(image))]


def test_rows_of_an_image_may_lie_apart_where_a_mark_says_so() -> None:
    model = model_of(PIXTRAL, row_break="[IMG_BREAK]")
    ids = np.array([7, *ImageLayout((4, 6)).ids(model), 7])
    assert ids.tolist() == [7, 1, 1, 1, 2, 1, 1, 1, 7]
    positions, following = rope_positions(ids, [(4, 6)], model)
    np.testing.assert_array_equal(positions, [range(9)] * 3)
    assert following == 9
    torn = np.array([1, 1, 7, 1, 2, 1, 1, 1])
    for grids in ([(4, 6)], [(2, 4), (4, 4)]):
        with pytest.raises(RequestError, match=r"tokens of image \d are not in one piece"):
            rope_positions(torn, grids, model)


def test_each_tile_has_rows_and_columns_of_its_own_on_three_axes() -> None:
    model = msgspec.structs.replace(model_of(LLAMA4, tile_break="<|image|>"), ropes=MODEL.ropes)
    grid = 4, 4
    ids = ImageLayout(None, 1, 2, grid).ids(model)
    assert ids == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    positions, following = rope_positions(np.array(ids), [grid, grid], model)
    tile = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    np.testing.assert_array_equal(positions, np.concatenate([tile, np.full((3, 1), 2), tile + 3], axis=1))
    assert following == 5


def test_all_tokens_of_an_image_take_the_place_of_what_the_template_writes() -> None:
    visual, begin, end = (TOKENIZER.added[token] for token in ("<|im_start|>", "<|vision_start|>", "<|vision_end|>"))
    marks = ImageMarks(placeholder=(PLACEHOLDER,), begin=(begin,), overview=(PLACEHOLDER,), tile_row_end=(end,))
    model = msgspec.structs.replace(CHAT_MODEL, image_token_id=visual, image_marks=marks, ropes=(COUNTED,))
    template = ChatTemplate("{{ 'a<|image_pad|>b' }}{{ messages[0].content[1].text }}")
    builder = PromptBuilder(model, TOKENIZER, template, tiled())
    parts = [{"type": "image", "image": noise(64, 32)}, {"type": "text", "text": "c<|im_start|>"}]
    prompt = builder.build([{"role": "user", "content": parts}])
    before, behind = (TOKENIZER.encode(text) for text in ("a", "bc"))
    image = [begin, *[visual] * 32, end, PLACEHOLDER, *[visual] * 16]
    assert prompt.ids.tolist()[: len(before + image + behind)] == before + image + behind
    assert prompt.image_tokens == 48  # what a user typed is no visual token
    assert len(prompt.images) == 3


class OneGrid(GridTower, frozen=True, kw_only=True, tag="one grid"):
    @property
    def grid(self) -> Grid:
        return TILE


@pytest.mark.parametrize(
    ("grids", "refusal"),
    [([TILE], None), ([(8, 4)], r"grids = \[\(8, 4\)\] \(allowed: \(8, 8\)\)")],
    ids=["good", "bad"],
)
def test_a_tower_of_tiles_takes_their_grid_alone(grids: list[Grid], refusal: str | None) -> None:
    vision = msgspec.convert(msgspec.structs.asdict(MODEL.vision), OneGrid)
    model = model_of(INTERNVL, vision)
    ids = ImageLayout(grids[0]).ids(model)
    if refusal is None:
        assert Prompt.from_ids(ids, grids, model).image_tokens == 16
        return
    with pytest.raises(RequestError, match=refusal):
        Prompt.from_ids(ids, grids, model)
