"""Where each token of a prompt stands on the (time, height, width) axes, and the decoder's rotary tables from it."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.core.manifest import ModelMetadata, QueryScaleMetadata, RopeMetadata
from moevlm.runtime.core.rotary import inverse_frequencies

# Tokens per step of the table computation: the angles of one step stay in the L2 cache.
_CHUNK = 4096


def rope_positions(ids: np.ndarray, grids: Sequence[tuple[int, int]], model: ModelMetadata) -> tuple[np.ndarray, int]:
    """Place a prompt's tokens on the three axes of multimodal rope (Qwen2-VL, section 2.1).

    Text advances all axes by one per token. An image's tokens, row by row after the merge, share the start position
    and add (0, row, column) to it; what follows the image starts max(rows, columns) later. Where no rope has sections,
    every token advances by one, those of images, too. A slice of a video and a piece of an image count as images.

    ids: [S] integer, the prompt with all visual tokens. grids: (h, w) in patches for each image.
    Returns (positions [3, S] int64, the position of the token after the prompt).
    Raises RequestError unless the image tokens of `ids` are exactly those of `grids`, each image's in one piece, or
    each of its rows in one where something stands between these.
    """
    image_at = np.flatnonzero(np.isin(ids, model.visual_token_ids))
    sizes = np.array([model.tower.tokens(grid) for grid in grids], np.int64)
    if len(image_at) != sizes.sum():
        raise RequestError(
            f"the prompt has {len(image_at)} image tokens (id {model.image_token_id}), its {len(sizes)} images need "
            f"{sizes.sum()}"
        )
    merge = model.tower.merge_size if grids else 1
    shapes = [(h // merge, w // merge) for h, w in grids]
    counted = not any(rope.sections for rope in model.ropes)
    apart = counted and model.image_marks.row_break
    _require_pieces(image_at, sizes, np.array([rows if apart else 1 for rows, _ in shapes], np.int64))
    if counted:
        return np.repeat(np.arange(len(ids))[None], 3, axis=0), len(ids)
    advance = np.ones(len(ids), np.int64)
    first = image_at[np.cumsum(sizes) - sizes]
    advance[image_at] = 0
    advance[first] = [max(shape) for shape in shapes]
    end = np.cumsum(advance)
    positions = np.repeat((end - advance)[None], 3, axis=0)
    for begin, (rows, columns) in zip(first.tolist(), shapes, strict=True):
        stop = begin + rows * columns
        start = positions[0, begin]
        positions[0, begin:stop] = start
        positions[1, begin:stop] = start + np.repeat(np.arange(rows), columns)
        positions[2, begin:stop] = start + np.tile(np.arange(columns), rows)
    return positions, int(end[-1]) if len(end) else 0


def _require_pieces(image_at: np.ndarray, sizes: np.ndarray, parts: np.ndarray) -> None:
    """Raise RequestError unless tokens of images, at places image_at, lie in pieces.

    sizes: tokens of each image. parts: pieces of equal size that they lie in.
    """
    lengths = np.repeat(sizes // parts, parts)
    ends = np.cumsum(lengths)
    torn = image_at[ends - 1] - image_at[ends - lengths] != lengths - 1
    if torn.any():
        number = np.repeat(np.arange(len(parts)), parts)[torn][0] + 1
        raise RequestError(f"the prompt's tokens of image {number} are not in one piece")


def rope_tables(positions: np.ndarray, rope: RopeMetadata) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine for each token and frequency, every frequency turned by the position on its own axis.

    Both are multiplied by rope.factor.

    positions: [3, ...] integer, any shape behind the axes. Returns (cos, sin), each [..., rope.dim / 2] float32.
    Raises BundleError if the sections do not cover the frequencies.
    """
    spread = _spread(rope)
    tokens = positions.reshape(3, -1).T.astype(np.float32)
    cos = np.empty((len(tokens), spread.shape[1]), np.float32)
    sin = np.empty_like(cos)
    for begin in range(0, len(tokens), _CHUNK):
        piece = slice(begin, begin + _CHUNK)
        angle = tokens[piece] @ spread
        np.cos(angle, out=cos[piece])
        np.sin(angle, out=sin[piece])
    if rope.factor != 1:
        cos *= np.float32(rope.factor)
        sin *= np.float32(rope.factor)
    shape = (*positions.shape[1:], spread.shape[1])
    return cos.reshape(shape), sin.reshape(shape)


def query_scales(places: np.ndarray, scale: QueryScaleMetadata) -> np.ndarray:
    """The factor on the queries of tokens at these places of their sequences; see `QueryScaleMetadata`.

    places: [T] integer. Returns [T] float32; each step is rounded to float32, like PyTorch's.
    """
    passed = (places + scale.offset) // scale.original
    return np.float32(1) + np.float32(scale.beta) * np.log(np.float32(1) + passed.astype(np.float32))


@lru_cache(maxsize=16)  # decoding asks for it at every token
def _spread(rope: RopeMetadata) -> np.ndarray:
    """[3, dim / 2] float32: one column per frequency with a single non-zero row, its axis.

    The product with a position picks and scales in one go, and is exact, because the other two terms are zero.
    """
    frequencies = np.array(rope.frequencies or inverse_frequencies(rope.dim, rope.theta), np.float32)
    spread = np.zeros((3, len(frequencies)), np.float32)
    spread[_frequency_axis(rope), np.arange(len(frequencies))] = frequencies
    spread.setflags(write=False)
    return spread


def _frequency_axis(rope: RopeMetadata) -> np.ndarray:
    """[dim / 2] int64: 0 time, 1 height, 2 width; all 0 without sections.

    Alternating, height and width take turns, and time has the rest.
    Interleaved, height and width take every third frequency up to 3 * their section, and time the rest; sections that
    are longer than the table are cut off there, as in Qwen3-VL.
    """
    count = (rope.dim + 1) // 2
    if not rope.sections:
        return np.zeros(count, np.int64)
    if rope.interleaved:
        axis = np.zeros(count, np.int64)
        for number in (1, 2):
            axis[number : 3 * rope.sections[number] : 3] = number
        return axis
    if sum(rope.sections) != count:
        raise BundleError(
            f"unsupported value in manifest.json: model.ropes.sections = {list(rope.sections)} "
            f"(supported: three numbers that add up to dim / 2 = {count})"
        )
    if rope.alternating:
        time, *sides = rope.sections
        return np.append(np.arange(sum(sides)) % 2 + 1, np.zeros(time, np.int64))
    return np.repeat(np.arange(3), rope.sections)
