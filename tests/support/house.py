"""A scheduler, its pools and the model engine, checked at every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moevlm.runtime.engine.packing import StepPacker
from moevlm.runtime.engine.pages import KEY_BYTES, PageNode, PagePool
from moevlm.runtime.engine.scheduler import Part, Scheduler
from moevlm.runtime.engine.sequence import Ending, Sequence
from moevlm.runtime.engine.step import EngineLimits
from moevlm.runtime.engine.visual import HostFeatures
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.paged_engine import EOS, ROPE, VOCABULARY, PagedEngine, check_rope, prompt_of

MIXED_TOKENS = 24


def sequence_of(ids: list[int], new_tokens: int = 5, ahead: float = 1e9, **options: Any) -> Sequence:
    deadline = options.pop("deadline", None)
    ending = Ending(new_tokens, frozenset({EOS}), deadline=deadline)
    return Sequence(prompt_of(ids), SamplingParams(**options), ending, ahead=ahead)


def tokens_of(sequence: Sequence) -> list[int]:
    return [token for piece in sequence.pieces for token in piece.token_ids]


class House:
    """A scheduler, its pool and an engine, checked at every step."""

    def __init__(
        self,
        pages: int = 40,
        *,
        packed: bool = True,
        sequences: int = 8,
        chunk: int = 64,
        page: int = 4,
        rows: int = 0,
        max_tokens: int = 128,
        mixed_tokens: int | None = MIXED_TOKENS,
        max_visual: int | None = None,
        whole_images: bool = False,
    ) -> None:
        self.limits = EngineLimits(
            sequences, max_tokens, sequences, 10_000, page, packed=packed, mixed_tokens=mixed_tokens
        )
        self.limits = replace(self.limits, max_visual=max_visual)
        self.chunk = min(chunk, max_tokens, max_visual or chunk)
        self.whole_images = whole_images
        self.pool = PagePool(pages, page, rows)
        self.scheduler = Scheduler(self.limits, self.pool, vocabulary=VOCABULARY, chunk_tokens=chunk)
        self.engine = PagedEngine(self.limits, recurrent=rows > 0)
        self.engine.reserve(pages, max(rows, 1))
        self.packer = StepPacker([ROPE], whole_images=whole_images)
        self.running: tuple[Part, ...] = ()

    def schedule(self) -> tuple[Part, ...]:
        parts = self.scheduler.schedule()
        written: list[int] = []
        for part in parts:
            sequence = part.sequence
            assert sequence.status == "running"
            assert not sequence.paused
            assert part.start == sequence.computed < part.stop <= sequence.tokens
            pages = range(part.start // self.limits.page_size, (part.stop - 1) // self.limits.page_size + 1)
            assert pages[0] >= sequence.table.shared, "a shared page would be written"
            written += [int(sequence.table.pages[page]) for page in pages]
        assert len(written) == len(set(written)), "two sequences write one page"
        tokens = sum(part.stop - part.start for part in parts)
        prompts = sum(part.stop - part.start for part in parts if not part.sequence.decoding)
        assert tokens <= self.limits.max_tokens
        assert prompts <= self.chunk or self.whole_images
        assert len(parts) <= self.limits.max_sequences
        if tokens > prompts and not self.whole_images:
            assert prompts <= (self.limits.mixed_tokens or self.chunk if self.limits.packed else 0)
        elif tokens == prompts and not self.limits.packed:
            assert len(parts) <= 1
        return parts

    def step(self) -> int:
        """Schedule, compute, finish. Returns how many sequences took part."""
        parts = self.schedule()
        if parts:
            self.finish(parts)
        return len(parts)

    def finish(self, parts: tuple[Part, ...]) -> None:
        """Compute a step. The features of an image are its pixels, a token each."""
        for part in parts:
            for place in part.sequence.unencoded(part.start, part.stop):
                embeds = np.frombuffer(part.sequence.images[place].pixels, np.float32)[:, None]
                part.sequence.features[place] = HostFeatures(embeds, np.zeros((0, *embeds.shape), np.float32))
        step, visual = self.packer.pack(parts)
        check_rope(step, np.concatenate([part.sequence.positions(part.start, part.stop) for part in parts], 1))
        self.scheduler.finish(parts, self.engine.forward(step, visual), 0.0)

    def drain(self, most: int = 5000) -> int:
        """Steps until all sequences have ended."""
        steps = 0
        while self.scheduler.running or self.scheduler.waiting:
            steps += 1
            assert self.step() > 0, "nothing goes on"
            assert steps < most, "some sequence starves"
        return steps

    def check_pages(self, sequences: list[Sequence]) -> None:
        """Every page is in one place, and every use is counted."""
        known: dict[int, PageNode] = {}

        def walk(node: PageNode) -> None:
            assert node.keys == sorted(node.children)
            for child in node.children.values():
                assert child.page not in known
                assert child.parent is node
                assert child.users <= node.users or node is self.pool.root
                known[child.page] = child
                walk(child)

        walk(self.pool.root)
        users = dict.fromkeys(known, 0)
        private: list[int] = []
        for sequence in sequences:
            table = sequence.table
            assert (table is None) == (sequence.status != "running")
            if table is not None:
                for page in table.pages[: table.shared].tolist():
                    users[page] += 1
                private += table.pages[table.shared :].tolist()
        assert users == {page: node.users for page, node in known.items()}
        assert self.pool.warm == sum(node.users == 0 for node in known.values())
        free = self.pool.available - self.pool.warm
        assert 0 not in known
        assert 0 not in private
        assert len(private) == len(set(private))
        assert not set(private) & set(known)
        assert free + len(private) + len(known) == self.pool.pages - 1
        self.check_rows(sequences, list(known.values()))

    def check_rows(self, sequences: list[Sequence], known: list[PageNode]) -> None:
        """Every row of recurrent states is in one place, and every use of a snapshot is counted."""
        rows = self.pool.rows
        tables = [(sequence.table, sequence.state) for sequence in sequences if sequence.table is not None]
        homes = [*(node.snapshots for node in known), *(table._snapshots for table, _ in tables)]
        snapshots = {one.row: one for home in homes for one in home.values()}
        assert all(one.home is home and home[one.place] is one for home in homes for one in home.values())
        assert all(0 < place <= len(node.key) // KEY_BYTES for node in known for place in node.snapshots)
        used = [state.source for _, state in tables if state is not None and state.source is not None]
        for one in {*snapshots.values(), *used}:
            assert one.users == used.count(one)
        own = [state.row for _, state in tables if state is not None]
        assert len(own) == (len(tables) if rows.rows else 0)
        held = [*own, *{one.row for one in (*snapshots.values(), *used)}]
        assert len(held) == len(set(held))
        assert not held or min(held) > 0
        unused = sum(one.users == 0 for one in snapshots.values())
        assert rows.snapshots == len(snapshots)
        assert rows.available - unused + len(held) == max(rows.rows - 1, 0)


def parts_of(house: House, sequence: Sequence) -> list[tuple[int, int]]:
    """What is computed of a sequence that has the engine for itself, chunk by chunk until its first token."""
    house.scheduler.add(sequence)
    spans = []
    while not sequence.generated:
        (part,) = house.schedule()
        spans.append((part.start, part.stop))
        house.finish((part,))
    house.drain()
    house.check_pages([sequence])
    return spans
