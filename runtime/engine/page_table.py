"""The pages of one sequence, in order: those that it shares with others, then those that it writes into."""

from __future__ import annotations

import numpy as np

from moevlm.runtime.engine.pages import KEY_BYTES, PageNode, PagePool


class PageTable:
    """Pages of a sequence in a pool. Those of known content lead, and are never written again."""

    def __init__(self, pool: PagePool, unit: int | None) -> None:
        """unit: prefixes are shared at multiples of so many tokens; None if they are not."""
        self._pool, self._unit = pool, unit
        self._nodes: list[PageNode] = []
        self._pages = np.zeros(8, np.int32)
        self.size = 0

    @property
    def pages(self) -> np.ndarray:
        """[size] int32."""
        return self._pages[: self.size]

    @property
    def tokens(self) -> int:
        """How many the pages can take."""
        return self.size * self._pool.page_size

    @property
    def shared(self) -> int:
        """How many of the pages have known content."""
        return len(self._nodes)

    def begin(self, content: bytes) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Take over the longest known beginning of a sequence that has no page yet, but for its last token.

        Returns (its tokens, copies of pages to be made before the next step). The page that is copied must not be
        taken before: the step in which the sequence goes on runs before any later one.
        """
        assert self.size == 0
        if self._unit is None:
            return 0, ()
        nodes, last, tokens = self._pool.find(content, len(content) // KEY_BYTES - 1)
        tokens = tokens // self._unit * self._unit
        whole, rest = divmod(tokens, self._pool.page_size)
        source = None if not rest else nodes[whole] if whole < len(nodes) else last
        for node in nodes[:whole]:
            self._pool.use(node)
            self._append(node.page)
        self._nodes = nodes[:whole]
        if source is None:
            return tokens, ()
        self._pool.use(source)  # so that it is not the page that is taken, and counts as used just now
        copied = self._pool.available > 0
        if copied:
            self._append(self._pool.take())
        self._pool.drop(source)
        return (tokens, ((source.page, int(self.pages[-1])),)) if copied else (whole * self._pool.page_size, ())

    def missing(self, tokens: int) -> int:
        """How many more pages so many tokens take."""
        return max(-(-tokens // self._pool.page_size) - self.size, 0)

    def grow(self, tokens: int) -> bool:
        """Have room for so many tokens; False, and nothing done, where the pool has too few pages."""
        missing = self.missing(tokens)
        if missing > self._pool.available:
            return False
        for _ in range(missing):
            self._append(self._pool.take())
        return True

    def filled(self, content: bytes | bytearray, tokens: int) -> None:
        """The first `tokens` tokens are computed: share the pages that they fill."""
        if self._unit is None:
            return
        size = self._pool.page_size * KEY_BYTES
        for number in range(len(self._nodes), tokens // self._pool.page_size):
            self._share(bytes(content[number * size : (number + 1) * size]))

    def release(self, content: bytes | bytearray, tokens: int) -> None:
        """Give all pages back. What the first `tokens` tokens made stays warm, in a page that is not full, too."""
        self.filled(content, tokens)
        rest = tokens - len(self._nodes) * self._pool.page_size
        if self._unit is not None and rest > 0:
            begin = len(self._nodes) * self._pool.page_size * KEY_BYTES
            key = bytes(content[begin : begin + rest * KEY_BYTES])
            parent = self._nodes[-1] if self._nodes else self._pool.root
            if parent.closest(key)[1] < rest:  # else a known page begins with it
                self._share(key)
        for page in self.pages[len(self._nodes) :].tolist():
            self._pool.give_back(page)
        for node in reversed(self._nodes):
            self._pool.drop(node)
        self._nodes, self.size = [], 0

    def _share(self, key: bytes) -> None:
        number = len(self._nodes)
        parent = self._nodes[-1] if self._nodes else self._pool.root
        node = self._pool.share(parent, key, int(self._pages[number]))
        self._pages[number] = node.page
        self._nodes.append(node)

    def _append(self, page: int) -> None:
        if self.size == len(self._pages):
            self._pages = np.concatenate([self._pages, np.zeros_like(self._pages)])
        self._pages[self.size] = page
        self.size += 1
