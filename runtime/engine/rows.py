"""The rows that recurrent states lie in: of sequences that run, and snapshots that later ones go on from."""

from __future__ import annotations

from collections import OrderedDict


class Snapshot:
    """Recurrent states behind the token `place` of a known page: nobody writes into its row.

    home: the snapshots of that page, by place. users: sequences whose next step begins with a copy of it.
    """

    __slots__ = ("home", "place", "row", "users")

    def __init__(self, row: int, home: dict[int, Snapshot], place: int) -> None:
        self.row, self.home, self.place, self.users = row, home, place, 0


class RowPool:
    """Rows 1 to rows - 1 of an engine's recurrent states; row 0 is nobody's.

    A row is free, or it is a sequence's, or it is a snapshot: that stays until its page goes, or a row is needed and
    it is the one that was used the longest time ago.
    """

    def __init__(self, rows: int) -> None:
        """rows: 0 for a model without recurrent states."""
        self.rows = rows
        self.restart()

    def restart(self) -> None:
        """All rows are free, whoever had them."""
        self._free = list(range(self.rows - 1, 0, -1))
        self._unused: OrderedDict[int, Snapshot] = OrderedDict()  # the longest unused first
        self.snapshots = 0  # that there are

    @property
    def available(self) -> int:
        """Rows that `take` can hand out."""
        return len(self._free) + len(self._unused)

    def take(self) -> int | None:
        """A row for a sequence; None where none is available."""
        if not self._free and self._unused:
            self.forget(next(iter(self._unused.values())))
        return self._free.pop() if self._free else None

    def give_back(self, row: int) -> None:
        """The end of a sequence's row."""
        self._free.append(row)

    def keep(self, row: int, home: dict[int, Snapshot], place: int) -> Snapshot:
        """Make a sequence's row a snapshot, where there is none yet."""
        assert place not in home
        home[place] = self._unused[row] = snapshot = Snapshot(row, home, place)
        self.snapshots += 1
        return snapshot

    def use(self, snapshot: Snapshot) -> None:
        """One more sequence goes on from it."""
        self._unused.pop(snapshot.row, None)
        snapshot.users += 1

    def drop(self, snapshot: Snapshot) -> None:
        """A sequence went on from it, or ended."""
        snapshot.users -= 1
        if snapshot.users == 0:
            if snapshot.home.get(snapshot.place) is snapshot:
                self._unused[snapshot.row] = snapshot
            else:  # it was forgotten
                self.give_back(snapshot.row)

    def forget(self, snapshot: Snapshot) -> None:
        """No sequence to come goes on from it."""
        del snapshot.home[snapshot.place]
        self.snapshots -= 1
        if self._unused.pop(snapshot.row, None):
            self.give_back(snapshot.row)

    def touch(self, snapshot: Snapshot) -> None:
        """It was used just now."""
        if snapshot.row in self._unused:
            self._unused.move_to_end(snapshot.row)


class StateRow:
    """Where a running sequence keeps its recurrent states.

    row: its own. source: what its next step copies into it before it begins. fresh: its next step clears it first.
    """

    def __init__(self, pool: RowPool, row: int, source: Snapshot | None, fresh: bool) -> None:
        self._pool, self.row, self.source, self.fresh = pool, row, source, fresh

    @classmethod
    def begin(cls, pool: RowPool, source: Snapshot | None) -> StateRow:
        """Of a sequence that goes on from a snapshot, which it uses, or begins anew. A row is available, or that."""
        row = pool.take()
        if row is not None:
            return cls(pool, row, source, source is None)
        assert source is not None  # with its row the sequence goes on, and the snapshot is no more
        pool.forget(source)
        return cls(pool, source.row, None, False)

    @property
    def cleared(self) -> tuple[int, ...]:
        """For its next step, see Step."""
        return (self.row,) if self.fresh else ()

    @property
    def row_copies(self) -> tuple[tuple[int, int], ...]:
        """For its next step, see Step."""
        return ((self.source.row, self.row),) if self.source else ()

    def stepped(self) -> None:
        """The step that began with the copy, or with zeros, has run."""
        if self.source is not None:
            self._pool.drop(self.source)
        self.source, self.fresh = None, False

    def snapshot(self, home: dict[int, Snapshot], place: int) -> None:
        """Keep what the row holds, if a row is available for the sequence to go on in."""
        if place in home:
            self._pool.touch(home[place])
        elif self.source is None and (row := self._pool.take()) is not None:
            self.source = self._pool.keep(self.row, home, place)
            self._pool.use(self.source)
            self.row = row

    def end(self, snapshot: tuple[dict[int, Snapshot], int] | None) -> None:
        """The sequence runs no more. snapshot: home and place of one that its row becomes; None for none."""
        if snapshot is not None and self.source is None and snapshot[1] not in snapshot[0]:
            self._pool.keep(self.row, *snapshot)
            return
        self.stepped()
        self._pool.give_back(self.row)
        if snapshot is not None and (known := snapshot[0].get(snapshot[1])):
            self._pool.touch(known)
