"""The pages of one sequence, in order: those that it shares with others, then those that it writes into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moevlm.runtime.engine.pages import KEY_BYTES, PageNode, PagePool
from moevlm.runtime.engine.rows import Snapshot


@dataclass(frozen=True)
class Beginning:
    """What a sequence need not compute.

    tokens: how many. copies: of pages, to be made before the next step. snapshot: of recurrent states behind these
    tokens, which the sequence uses from now on; None without such states. known: as many tokens as some sequence began
    with, `tokens` or more.
    """

    tokens: int = 0
    copies: tuple[tuple[int, int], ...] = ()
    snapshot: Snapshot | None = None
    known: int = 0


class PageTable:
    """Pages of a sequence in a pool. Those of known content lead, and are never written again."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._nodes: list[PageNode] = []
        self._snapshots: dict[int, Snapshot] = {}  # in the page behind these
        self._last: PageNode | None = None  # a page of others that begins as that one
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

    def begin(self, content: bytes, boundary: Callable[[int], int]) -> Beginning:
        """Take over the longest known beginning of a sequence that has no page yet, but for its last token.

        boundary: the last place up to another where the sequence may be cut. With recurrent states, the beginning ends
        at a snapshot. A page that is copied must not be taken before: the step in which the sequence goes on runs
        before any later one. Without a page for the copy, what is whole pages is taken over, if it may end there.
        """
        assert self.size == 0
        most = len(content) // KEY_BYTES - 1
        nodes, last, known = self._pool.find(content, most)
        tokens, snapshot = boundary(known), None
        if self._pool.rows.rows:
            found = self._pool.resume(content, nodes, most)
            if found is None:
                return Beginning(known=known)
            whole, last, snapshot = found
            tokens = whole * self._pool.page_size + snapshot.place
            nodes = [*nodes[:whole], last]
        whole, rest = divmod(tokens, self._pool.page_size)
        source = None if not rest else nodes[whole] if whole < len(nodes) else last
        for node in nodes[:whole]:
            self._pool.use(node)
            self._append(node.page)
        self._nodes = nodes[:whole]
        copies: tuple[tuple[int, int], ...] = ()
        if source is not None:
            self._pool.use(source)  # so that it is not the page that is taken, and counts as used just now
            if self._pool.available:
                self._append(self._pool.take())
                copies = ((source.page, int(self.pages[-1])),)
            self._pool.drop(source)
            if not copies:
                tokens = whole * self._pool.page_size
                if snapshot is not None or boundary(tokens) < tokens:
                    self.release()
                    return Beginning(known=known)
        if snapshot is not None:
            self._pool.rows.use(snapshot)
        return Beginning(tokens, copies, snapshot, known)

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
        size = self._pool.page_size * KEY_BYTES
        for number in range(len(self._nodes), tokens // self._pool.page_size):
            self._share(bytes(content[number * size : (number + 1) * size]))

    def share(self, content: bytes | bytearray, tokens: int) -> None:
        """The sequence ends: what its first `tokens` tokens made stays warm, in a page that is not full, too."""
        self.filled(content, tokens)
        rest = tokens - len(self._nodes) * self._pool.page_size
        if rest > 0:
            begin = len(self._nodes) * self._pool.page_size * KEY_BYTES
            key = bytes(content[begin : begin + rest * KEY_BYTES])
            parent = self._nodes[-1] if self._nodes else self._pool.root
            known, common = parent.closest(key)
            if known is None or common < rest:
                self._share(key)
            else:
                self._last = known
                self._attach(known, rest)

    def snapshots(self, tokens: int) -> tuple[dict[int, Snapshot], int]:
        """Where a snapshot behind so many tokens belongs: those of their last page, and its place in that."""
        number = (tokens - 1) // self._pool.page_size
        nodes = [*self._nodes[number:], *([self._last] if self._last else [])]
        return nodes[0].snapshots if nodes else self._snapshots, tokens - number * self._pool.page_size

    def release(self) -> None:
        """Give all pages back."""
        for snapshot in list(self._snapshots.values()):
            self._pool.rows.forget(snapshot)
        for page in self.pages[len(self._nodes) :].tolist():
            self._pool.give_back(page)
        for node in reversed(self._nodes):
            self._pool.drop(node)
        self._nodes, self.size = [], 0

    def _share(self, key: bytes) -> None:
        number, tokens = len(self._nodes), len(key) // KEY_BYTES
        parent = self._nodes[-1] if self._nodes else self._pool.root
        node = self._pool.share(parent, key, int(self._pages[number]))
        self._pages[number] = node.page
        self._nodes.append(node)
        self._attach(node, tokens)

    def _attach(self, node: PageNode, tokens: int) -> None:
        """Have a known page hold the snapshots behind the first `tokens` tokens of the page that was private."""
        for place, snapshot in list(self._snapshots.items()):
            if place > tokens or place in node.snapshots:
                self._pool.rows.forget(snapshot)
            else:
                self._snapshots.pop(place)
                node.snapshots[place], snapshot.home = snapshot, node.snapshots

    def _append(self, page: int) -> None:
        if self.size == len(self._pages):
            self._pages = np.concatenate([self._pages, np.zeros_like(self._pages)])
        self._pages[self.size] = page
        self.size += 1
