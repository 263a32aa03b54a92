"""Pictures of digit grids: which digits, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo import digits

CELL = 32  # two merged patches of 16 px each way
MARGIN = 3  # blank pixels around the 8x8 source, so that a turned digit keeps its edges


@dataclass(frozen=True)
class Grid:
    """Digits in rows and columns; `sources` are indices into the UCI set."""

    sources: tuple[tuple[int, ...], ...]

    @property
    def values(self) -> list[list[int]]:
        labels = digits.load()[1]
        return [[int(labels[i]) for i in row] for row in self.sources]

    @property
    def flat(self) -> list[int]:
        return [value for row in self.values for value in row]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.sources), len(self.sources[0])


def draw_grid(rng: np.random.Generator, rows: int, cols: int, held_out: bool) -> Grid:
    """A grid of random digits of one split; classes are equally likely."""
    pool = digits.indices(held_out)
    labels = digits.load()[1][pool]
    wanted = rng.integers(0, 10, size=(rows, cols))
    return Grid(tuple(tuple(int(rng.choice(pool[labels == v])) for v in row) for row in wanted))


def cell(source: int, rng: np.random.Generator, strength: float) -> np.ndarray:
    """One digit as ink coverage [CELL, CELL] float32 in 0..1, jittered by `strength`."""
    ink = np.pad(digits.load()[0][source], MARGIN)
    turn, shear, stretch = rng.normal(0, [0.11, 0.10, 0.08]) * strength
    size = rng.uniform(25, 31) / 8  # output pixels per source pixel
    shift = rng.uniform(-2.2, 2.2, size=2) * strength
    forward = (
        np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        @ np.array([[1.0, shear], [0.0, 1.0]])
        @ np.diag([size * np.exp(stretch), size * np.exp(-stretch)])
    )
    back = np.linalg.inv(forward)
    centre = np.full(2, len(ink) / 2) - back @ (np.full(2, CELL / 2) + shift)
    coefficients = (back[0, 0], back[0, 1], centre[0], back[1, 0], back[1, 1], centre[1])
    drawn = Image.fromarray(ink, mode="F").transform(
        (CELL, CELL), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC
    )
    coverage = np.clip(np.asarray(drawn), 0.0, 1.0)
    gamma = np.exp(rng.normal(0, 0.25) * strength)
    return coverage**gamma * rng.uniform(1 - 0.25 * strength, 1.0)


def render(grid: Grid, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """The picture [H, W, 3] uint8: dark ink on light, slightly tinted paper."""
    rows = [np.concatenate([cell(s, rng, strength) for s in row], axis=1) for row in grid.sources]
    coverage = np.concatenate(rows)[..., None]
    paper = rng.uniform(220, 255) + rng.uniform(-8, 0, size=3)
    ink = rng.uniform(0, 50) + rng.uniform(0, 30, size=3)
    return np.rint(paper + (ink - paper) * coverage).clip(0, 255).astype(np.uint8)
