"""The pool of pages that sequences keep their tokens in, and which of them hold what a new prompt begins with."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict

import numpy as np

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.engine.rows import RowPool, Snapshot

KEY_BYTES = 16  # of a token's content, see `content_keys`


def content_keys(ids: np.ndarray, visual_index: np.ndarray, images: list[tuple[int, bytes]]) -> bytes:
    """What tokens stand for, KEY_BYTES each: the id of a text token, the image's hash for a token of an image.

    ids, visual_index: [S] int64, the latter -1 for text. images: each one's tokens and the hash of its pixels.
    Placeholders of all images have one id; where in its image a token lies follows from the tokens before it.
    """
    keys = np.zeros((len(ids), 2), np.int64)
    keys[:, 0] = ids
    is_image = visual_index >= 0
    if is_image.any():
        hashes = np.frombuffer(b"".join(digest for _, digest in images), np.int64).reshape(-1, 2)
        keys[is_image] = np.repeat(hashes, [tokens for tokens, _ in images], axis=0)
    return keys.tobytes()


class PageNode:
    """A page whose content is known, below the page that its tokens follow.

    key: content of its tokens, all of the page's or fewer. users: sequences whose page table has the page.
    snapshots: of recurrent states behind some of its tokens, by how many of them.
    """

    __slots__ = ("children", "key", "keys", "page", "parent", "snapshots", "users")

    def __init__(self, page: int, parent: PageNode | None, key: bytes) -> None:
        self.page, self.parent, self.key, self.users = page, parent, key, 0
        self.children: dict[bytes, PageNode] = {}
        self.keys: list[bytes] = []  # of the children, in order: likenesses lie side by side
        self.snapshots: dict[int, Snapshot] = {}

    def closest(self, wanted: bytes) -> tuple[PageNode | None, int]:
        """The child that begins with the most tokens of `wanted`, and how many they are."""
        place = bisect_left(self.keys, wanted)
        found = [(_common(key, wanted), key) for key in self.keys[max(place - 1, 0) : place + 1]]
        tokens, key = max(found, default=(0, b""))
        return (self.children[key], tokens) if tokens else (None, 0)

    def resumable(self, wanted: bytes) -> tuple[PageNode, Snapshot] | None:
        """The child with the latest snapshot within tokens that `wanted` begins with, and that; None without one."""
        place, latest, found = bisect_left(self.keys, wanted), 0, None
        for likenesses in (range(place - 1, -1, -1), range(place, len(self.keys))):
            for i in likenesses:
                common = _common(self.keys[i], wanted)
                if common <= latest:  # and so is that of all further ones
                    break
                child = self.children[self.keys[i]]
                best = max((tokens for tokens in child.snapshots if tokens <= common), default=0)
                if best > latest:
                    latest, found = best, (child, child.snapshots[best])
        return found

    def add(self, child: PageNode) -> None:
        self.children[child.key] = child
        self.keys.insert(bisect_left(self.keys, child.key), child.key)

    def remove(self, child: PageNode) -> None:
        del self.children[child.key]
        del self.keys[bisect_left(self.keys, child.key)]


class PagePool:
    """Pages 1 to pages - 1 of an engine, page 0 is nobody's, and its rows of recurrent states.

    A page is free, or it is private to one sequence that writes into it, or its content is known: then nobody writes
    into it, any number of sequences may use it, and without a user it stays warm until a page is needed and it is the
    one that was used the longest time ago. A snapshot of recurrent states goes with its page.
    """

    def __init__(self, pages: int, page_size: int, rows: int = 0) -> None:
        """rows: see RowPool. Raises EngineError for a pool without a page."""
        if pages < 2:
            raise EngineError(f"unsupported value pages = {pages} (allowed: 2 or more, page 0 is nobody's)")
        self.pages, self.page_size = pages, page_size
        self.rows = RowPool(rows)
        self.restart()

    def restart(self) -> None:
        """All pages and rows are free, whoever had them."""
        self.rows.restart()
        self.root = PageNode(0, None, b"")
        self._free = list(range(self.pages - 1, 0, -1))  # the lowest goes first, the latest to come back before it
        # The longest unused first. A sequence gives its pages back from the last to the first, so that a page never
        # comes before those below it.
        self._warm: OrderedDict[int, PageNode] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can hand out."""
        return len(self._free) + len(self._warm)

    @property
    def warm(self) -> int:
        """Pages of known content that no sequence uses."""
        return len(self._warm)

    def take(self) -> int:
        """A page that is private to the caller from now on. Raises EngineError where none is available."""
        if self._free:
            return self._free.pop()
        if not self._warm:
            raise EngineError("no page is available")
        return self._cooled()

    def _cooled(self) -> int:
        """The warm page that was used the longest time ago; its content is not known any more."""
        page, node = self._warm.popitem(last=False)
        assert node.parent is not None
        node.parent.remove(node)
        for snapshot in list(node.snapshots.values()):
            self.rows.forget(snapshot)
        return page

    def forget(self) -> None:
        """Make all warm pages free."""
        self._free += [self._cooled() for _ in range(len(self._warm))]

    def give_back(self, page: int) -> None:
        """The end of a private page."""
        self._free.append(page)

    def find(self, content: bytes, most: int) -> tuple[list[PageNode], PageNode | None, int]:
        """The longest known beginning of `content`, at most `most` tokens.

        Returns (pages that it fills, the page that it goes on in or None, its tokens). Nothing is used by that.
        """
        node, size = self.root, self.page_size * KEY_BYTES
        nodes: list[PageNode] = []
        end = min(most * KEY_BYTES, len(content))
        for at in range(0, end, size):
            closest, tokens = node.closest(content[at : min(at + size, end)])
            if closest is None:
                break
            if tokens < self.page_size:
                return nodes, closest, len(nodes) * self.page_size + tokens
            nodes.append(closest)
            node = closest
        return nodes, None, len(nodes) * self.page_size

    def resume(self, content: bytes, nodes: list[PageNode], most: int) -> tuple[int, PageNode, Snapshot] | None:
        """The latest snapshot on the way that `find` went: (pages before that of the snapshot, its page, itself)."""
        size = self.page_size * KEY_BYTES
        for count in range(len(nodes), -1, -1):
            parent = nodes[count - 1] if count else self.root
            found = parent.resumable(content[count * size : min((count + 1) * size, most * KEY_BYTES)])
            if found is not None:
                return count, *found
        return None

    def use(self, node: PageNode) -> None:
        """One more sequence has the page in its table."""
        if node.users == 0:
            self._warm.pop(node.page, None)
        node.users += 1

    def drop(self, node: PageNode) -> None:
        """One sequence fewer has the page in its table; without any it stays warm."""
        node.users -= 1
        if node.users == 0:
            self._warm[node.page] = node

    def share(self, parent: PageNode, key: bytes, page: int) -> PageNode:
        """Make a private page's content known, and use it. A page of the same content takes the place of this one."""
        node = parent.children.get(key)
        if node is None:
            node = PageNode(page, parent, key)
            parent.add(node)
        else:
            self.give_back(page)
        self.use(node)
        return node


def _common(a: bytes, b: bytes) -> int:
    """Tokens that both begin with."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // KEY_BYTES
    differ = np.frombuffer(a, np.uint8, size) != np.frombuffer(b, np.uint8, size)
    return int(differ.argmax()) // KEY_BYTES
