"""The experts' kernels and launches for one kind of GPU."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moevlm.plugins.gpu.draft import Draft, KernelSpec, power_of_two
from moevlm.plugins.gpu.program import (
    ONE,
    TOKENS,
    Argument,
    Count,
    Fill,
    Launch,
    Linear,
    Variant,
    at_most,
    fixed,
    per_token,
)
from moevlm.plugins.gpu.tiles import Range, Tile, tiles
from moevlm.runtime.core.dtypes import DTYPES

if TYPE_CHECKING:
    from moevlm.plugins.gpu.ops.experts import ExpertsOp

ROWS_STEP = 1024  # rows that one program counts or places
COMBINE_STEP = 1024  # columns that one program adds up


class ExpertsDraft:
    """Collects kernels, each once, while the variants are laid out."""

    # Workspace buffers. A variant without sorting has only the first two.
    INNER, ROWS_OUT, COUNTS, STARTS, ROWS, BLOCKS = range(6)

    def __init__(self, op: ExpertsOp, sm: int, max_tokens: int) -> None:
        self.ranges = tiles(op, sm)
        if op.dtype == "bfloat16" and sm < 80:
            raise ValueError(f"dtype = bfloat16 on sm{sm} (allowed: float16)")
        self.op, self.sm, self.max_tokens = op, sm, max_tokens
        self.kernels: list[KernelSpec] = []
        self.places = {tensor.name: i for i, tensor in enumerate(op.inputs)}
        self.dtype = DTYPES[op.dtype].pointer

    def draft(self) -> Draft:
        op = self.op
        variants = []
        for i, chosen in enumerate(self.ranges):
            limit = min(chosen.max_tokens or self.max_tokens, self.max_tokens)
            variants.append(self._few(limit, chosen) if i < 2 else self._grouped(limit, chosen))
            if limit == self.max_tokens:
                break
        return Draft(op.name, op.inputs, op.outputs, self.sm, tuple(self.kernels), tuple(variants))

    def _few(self, max_tokens: int, chosen: Range) -> Variant:
        op = self.op
        gate_up, down = chosen.gate_up, chosen.down
        rows = per_token(op.top_k)
        routing = {"EXPERTS": op.experts, "TOP_K": op.top_k}
        steps = [
            self._launch(
                "few_gate_up",
                (fixed(_tiles(op.inner, gate_up)), rows, ONE),
                ("x", "expert_index", "expert_weight", *self._weights("gate_up"), self.INNER, "tokens"),
                routing | self._product("gate_up") | {"SPEC": op.spec},
                gate_up,
            )
        ]
        if max_tokens == 1:
            steps.append(
                self._launch(
                    "single_down",
                    (fixed(_tiles(op.hidden, down)), ONE, ONE),
                    (self.INNER, "expert_index", "expert_weight", *self._weights("down"), "y"),
                    routing | self._product("down") | {"SPEC": op.spec},
                    down,
                )
            )
            return Variant((at_most(max_tokens),), (self._row_bytes(op.inner),), tuple(steps))
        steps.append(
            self._launch(
                "few_down",
                (fixed(_tiles(op.hidden, down)), rows, ONE),
                (self.INNER, "expert_index", *self._weights("down"), self.ROWS_OUT, "tokens"),
                routing | self._product("down"),
                down,
            )
        )
        steps.append(self._combine())
        return Variant((at_most(max_tokens),), (self._row_bytes(op.inner), self._row_bytes(op.hidden)), tuple(steps))

    def _grouped(self, max_tokens: int, chosen: Range) -> Variant:
        op = self.op
        gate_up, down = chosen.gate_up, chosen.down
        if gate_up.BM != down.BM:
            raise ValueError(f"BM = {gate_up.BM} and {down.BM} in one entry of tiles.json (allowed: one value)")
        block = gate_up.BM
        by_rows = per_token(op.top_k, divisor=ROWS_STEP)
        shape = {"EXPERTS": op.experts}
        steps: list[Launch | Fill] = [
            Fill(self.COUNTS, 0, fixed(2 * op.experts)),
            self._launch(
                "count_rows",
                (by_rows, ONE, ONE),
                ("expert_index", self.COUNTS, "tokens"),
                shape | {"TOP_K": op.top_k, "STEP": ROWS_STEP},
            ),
            self._launch(
                "start_rows",
                (ONE, ONE, ONE),
                (self.COUNTS, self.STARTS, ("constant", block)),
                shape,
            ),
            self._launch(
                "place_rows",
                (by_rows, ONE, ONE),
                ("expert_index", self.STARTS, self.COUNTS, self.ROWS, self.BLOCKS, "tokens", ("constant", block)),
                shape | {"TOP_K": op.top_k, "STEP": ROWS_STEP},
            ),
            self._launch(
                "grouped_gate_up",
                (self._blocks(block, _tiles(op.inner, gate_up)), ONE, ONE),
                (
                    *("x", "expert_weight", *self._weights("gate_up")),
                    *(self.ROWS, self.STARTS, self.BLOCKS, self.INNER),
                ),
                shape | self._product("gate_up") | {"TOP_K": op.top_k, "SPEC": op.spec},
                gate_up,
            ),
            self._launch(
                "grouped_down",
                (self._blocks(block, _tiles(op.hidden, down)), ONE, ONE),
                (self.INNER, *self._weights("down"), self.ROWS, self.STARTS, self.BLOCKS, self.ROWS_OUT),
                shape | self._product("down"),
                down,
            ),
            self._combine(),
        ]
        buffers = (
            self._row_bytes(op.inner),
            self._row_bytes(op.hidden),
            fixed(2 * op.experts * 4),
            fixed(2 * (op.experts + 1) * 4),
            per_token(op.top_k * 4),
            self._blocks(block, 2 * 4),
        )
        return Variant((at_most(max_tokens),), buffers, tuple(steps))

    def _blocks(self, rows: int, times: int) -> Count:
        """times the most blocks of so many rows that T * k rows of E experts can make, at most rounded up."""
        op = self.op
        most = times * op.top_k
        return per_token(most, times * op.experts * (rows - 1), rows, limit=Linear(T=most))

    def _row_bytes(self, width: int) -> Count:
        return per_token(self.op.top_k * width * DTYPES[self.op.dtype].bytes)

    def _combine(self) -> Launch:
        op = self.op
        step = min(COMBINE_STEP, power_of_two(op.hidden))
        return self._launch(
            "combine",
            (per_token(-(-op.hidden // step)), ONE, ONE),
            (self.ROWS_OUT, "expert_weight", "y"),
            {"TOP_K": op.top_k, "HIDDEN": op.hidden, "SPEC": op.spec, "STEP": step},
        )

    def _weights(self, projection: str) -> tuple[str | None, ...]:
        names = (projection, f"{projection}_scale", f"{projection}_bias")
        return tuple(name if name in self.places else None for name in names)

    def _product(self, projection: str) -> dict[str, Hashable]:
        """What the kernel of one product is specialised to, apart from its tile."""
        stored = self.op.projections[projection]
        return {"W": replace(stored, native_fp8=stored.format == "fp8" and self.sm >= 89), "INTERPRETED": False}

    def _launch(
        self,
        function: str,
        grid: tuple[Count, Count, Count],
        arguments: Sequence[str | int | tuple[str, int] | None],
        constants: Mapping[str, Hashable],
        tile: Tile | None = None,
    ) -> Launch:
        """arguments: an input's or output's name, a buffer, None for an absent input, "tokens", or a constant."""
        given, types = zip(*(self._argument(argument) for argument in arguments), strict=True)
        shape = {"TILE": tile} if tile else {}
        warps, stages = (tile.warps, tile.stages) if tile else (4, 1)
        spec = KernelSpec(function, types, tuple(sorted({**constants, **shape}.items())), warps, stages)
        if spec not in self.kernels:
            self.kernels.append(spec)
        return Launch(self.kernels.index(spec), grid, given)

    def _argument(self, argument: str | int | tuple[str, int] | None) -> tuple[Argument, str]:
        op = self.op
        if argument is None:
            return Argument("null"), self.dtype
        if argument == "tokens":
            return TOKENS, "i32"
        if argument == "y":
            return Argument("output", 0), self.dtype
        if isinstance(argument, str):
            place = self.places[argument]
            return Argument("input", place), DTYPES[op.inputs[place].dtype].pointer
        if isinstance(argument, int):
            return Argument("workspace", argument), self.dtype if argument < self.COUNTS else "*i32"
        return Argument(*argument), "i32"


def _tiles(width: int, tile: Tile) -> int:
    return -(-width // tile.BN)
