"""Random prompts for parity: text alone, one image, several of different sizes, all in one ragged batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moevlm.export.parity.tolerances import DECODE_STEPS
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.towers import Grid
from moevlm.runtime.request import vision_inputs
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.vision_inputs import VisionInputs

IMAGES = (0, 1, 2, 3)  # images of the prompts of one batch
QUICK_IMAGES, QUICK_STEPS = (0, 1), 8
# Attention takes keys in blocks of 256, and joins the results of several.
LONG_PROMPT = 270
_SIDE = 5  # the largest side of an image, in visual tokens


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens that follow it, drawn beforehand: every step gets the same ones (teacher forcing).

    prompt: ids with images expanded. whole: the same with more tokens. grids: (h, w) in patches.
    patches: [P, patch_dim] float32 of all its images.
    """

    prompt: Prompt
    whole: Prompt
    grids: list[Grid]
    patches: np.ndarray

    @property
    def continuation(self) -> np.ndarray:
        """[steps] int64, the tokens behind the prompt."""
        return self.whole.ids[len(self.prompt.ids) :]


def random_cases(model: ModelMetadata, config: Mapping[str, Any], seed: int, quick: bool = False) -> list[Case]:
    """One case per entry of IMAGES, or of QUICK_IMAGES, with DECODE_STEPS, or QUICK_STEPS, tokens behind it.

    config: the checkpoint's, for the token ids that mean something to it.
    """
    rng, ordinary = np.random.default_rng(seed), ordinary_ids(model, config)
    steps = QUICK_STEPS if quick else DECODE_STEPS
    return [_case(model, config, ordinary, rng, n, steps) for n in (QUICK_IMAGES if quick else IMAGES)]


def long_cases(model: ModelMetadata, config: Mapping[str, Any], seed: int, capacity: int) -> list[Case]:
    """A case of text alone that no kernel takes in one block; shorter, or none, where a cache has no room for it.

    capacity: the most tokens of prompt and continuation together.
    """
    length = min(LONG_PROMPT, capacity - DECODE_STEPS)
    if length < 1:
        return []
    ids = np.random.default_rng([seed, length]).choice(ordinary_ids(model, config), length + DECODE_STEPS)
    prompt, whole = (Prompt.from_ids(ids[:size], [], model) for size in (length, len(ids)))
    return [Case(prompt, whole, [], _patches(np.random.default_rng(0), [], model))]


def pack(cases: list[Case], model: ModelMetadata) -> VisionInputs | None:
    """All images of all cases in one vision call; None if there are none."""
    grids = [grid for case in cases for grid in case.grids]
    if not grids:
        return None
    return vision_inputs.pack(np.concatenate([case.patches for case in cases]), grids, model.tower)


def _case(
    model: ModelMetadata,
    config: Mapping[str, Any],
    ordinary: np.ndarray,
    rng: np.random.Generator,
    images: int,
    steps: int,
) -> Case:
    config = _described(config)
    ids, grids = list(rng.choice(ordinary, rng.integers(3, 12))), []
    for _ in range(images if model.vision else 0):
        layout = _layout(rng, model)
        grids += layout.grids
        marks = [config.get(f"{tower}_{side}_token_id") for tower in ("vision", "image") for side in ("start", "end")]
        start, end = [mark for mark in marks if mark is not None][:2] or (ordinary[0], ordinary[0])
        ids += [
            start,
            *layout.ids(model),
            end,
            *rng.choice(ordinary, rng.integers(1, 9)),
        ]
    if len(ids) + steps > model.context:
        raise RequestError(f"parity needs a context of {len(ids) + steps}, the model has {model.context}")
    patches = _patches(rng, grids, model)
    whole = [*ids, *rng.choice(ordinary, steps)]
    return Case(Prompt.from_ids(ids, grids, model), Prompt.from_ids(whole, grids, model), grids, patches)


def _layout(rng: np.random.Generator, model: ModelMetadata) -> ImageLayout:
    """In one piece; tiles and an overview where a tower takes one grid alone."""
    if grid := model.tower.grid:
        rows, columns = map(int, rng.integers(1, 3, 2))
        return ImageLayout(grid, rows, columns, grid)
    height, width = map(int, rng.integers(1, _SIDE, 2))
    return ImageLayout((height * model.tower.merge_size, width * model.tower.merge_size))


def ordinary_ids(model: ModelMetadata, config: Mapping[str, Any]) -> np.ndarray:
    """Token ids without those that mean something to the checkpoint."""
    reserved = {
        value for key, value in _described(config).items() if key.endswith("_token_id") and isinstance(value, int)
    }
    reserved |= {*model.visual_token_ids}
    return np.array([i for i in range(model.vocabulary) if i not in reserved])


def _described(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that has the ids of images: itself, or what stands beside a model of speech."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return next((part for part in parts if "image_token_id" in part), config)


def _patches(rng: np.random.Generator, grids: list[Grid], model: ModelMetadata) -> np.ndarray:
    width = model.vision.patch_width if model.vision else 0
    return rng.standard_normal((sum(h * w for h, w in grids), width), np.float32)
