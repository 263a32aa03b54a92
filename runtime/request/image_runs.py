"""Where a prompt's images lie: what their tokens see of each other, and where a prompt may not be cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageRuns:
    """Runs of image tokens without a text token between them. starts, ends: [R] int64, rising; ends are exclusive."""

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, visual_index: np.ndarray) -> ImageRuns:
        """visual_index: [S] int64, -1 for text."""
        edges = np.diff(visual_index >= 0, prepend=False, append=False)
        places = np.flatnonzero(edges)
        return cls(places[::2], places[1::2])

    @property
    def longest(self) -> int:
        """Tokens of the longest run, 0 without any."""
        return int((self.ends - self.starts).max(initial=0))

    def around(self, place: int) -> tuple[int, int] | None:
        """The run of which some tokens lie before `place` and some do not, as (start, end)."""
        run = int(np.searchsorted(self.starts, place)) - 1
        if run < 0 or self.ends[run] <= place:
            return None
        return int(self.starts[run]), int(self.ends[run])

    def visible_end(self, start: int, stop: int) -> np.ndarray:
        """Of tokens start to stop: the end of the token's run, or the place behind a token of text.

        Returns [stop - start] int32, see Step.visible_end.
        """
        found = np.arange(start + 1, stop + 1, dtype=np.int32)
        first, last = np.searchsorted(self.ends, start, "right"), np.searchsorted(self.starts, stop)
        for begin, end in zip(self.starts[first:last].tolist(), self.ends[first:last].tolist(), strict=True):
            found[max(begin - start, 0) : end - start] = end
        return found
