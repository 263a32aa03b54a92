"""The experts' kernels and launches for one kind of GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moevlm.plugins.gpu.draft import ADA, HOPPER, Draft, KernelSpec, power_of_two
from moevlm.plugins.gpu.ops.layout import Given, Layout
from moevlm.plugins.gpu.program import TOKENS, Argument, Fill, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, Count, Linear, fixed, per_token
from moevlm.plugins.gpu.tiles import Range, Tile, tiles
from moevlm.runtime.core.dtypes import DTYPES

if TYPE_CHECKING:
    from moevlm.plugins.gpu.ops.experts import ExpertsOp

ROWS_STEP = 1024  # rows that one program counts or places
ROWS_AT_ONCE, ROWS_PLACED = 512, 16  # rows that one launch sorts, and of these one program
COLUMNS_STEP = 1024  # columns that one program adds up, or quantizes
Sort = Callable[[Layout, int], tuple[Given, Given, Given]]
Grid = tuple[Count, Count, Count]
_PARTS = ("", "_scale", "_zero", "_row_scale", "_bias")  # of a weight, as kernels take them
_TOKENS: Given = (TOKENS, "i32")


class ExpertsDraft:
    """Collects kernels, each once, while the variants are laid out."""

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
        variants: list[Variant] = []
        for i, chosen in enumerate(self.ranges):
            limit = min(chosen.max_tokens or self.max_tokens, self.max_tokens)
            at_once = min(limit, ROWS_AT_ONCE // op.top_k)
            if i < 2:
                variants.append(self._few(chosen, limit))
            else:
                if at_once > variants[-1].max_tokens:
                    variants.append(self._grouped(chosen, at_once, self._rows_sorted_at_once))
                if at_once < limit:
                    variants.append(self._grouped(chosen, limit, self._sorted_rows))
            if limit == self.max_tokens:
                break
        return Draft(op.name, op.inputs, op.outputs, self.sm, tuple(self.kernels), tuple(variants))

    def _few(self, chosen: Range, max_tokens: int) -> Variant:
        op, layout = self.op, Layout()
        gate_up, down = chosen.gate_up, chosen.down
        rows = per_token(op.top_k)
        routing = {"EXPERTS": op.experts, "TOP_K": op.top_k}
        index, weight, y = self._input("expert_index"), self._input("expert_weight"), (Argument("output"), self.dtype)
        inner = layout.buffer(self.dtype, self._row_bytes(op.inner))
        self._launch(
            layout,
            "few_gate_up",
            (fixed(_tiles(op.inner, gate_up)), rows, ONE),
            (self._input("x"), index, weight, *self._weights("gate_up"), inner, _TOKENS),
            routing | self._product("gate_up", gate_up) | {"SPEC": op.spec},
            gate_up,
        )
        if max_tokens == 1:
            self._launch(
                layout,
                "single_down",
                (fixed(_tiles(op.hidden, down)), ONE, ONE),
                (inner, index, weight, *self._weights("down"), y),
                routing | self._product("down", down) | {"SPEC": op.spec},
                down,
            )
            return layout.variant(max_tokens)
        out = layout.buffer(self.dtype, self._row_bytes(op.hidden))
        self._launch(
            layout,
            "few_down",
            (fixed(_tiles(op.hidden, down)), rows, ONE),
            (inner, index, *self._weights("down"), out, _TOKENS),
            routing | self._product("down", down),
            down,
        )
        self._combine(layout, out)
        return layout.variant(max_tokens)

    def _grouped(self, chosen: Range, max_tokens: int, sort: Sort) -> Variant:
        op, layout = self.op, Layout()
        gate_up, down = chosen.gate_up, chosen.down
        if gate_up.BM != down.BM:
            raise ValueError(f"BM = {gate_up.BM} and {down.BM} in one entry of tiles.json (allowed: one value)")
        rows, starts, blocks = sort(layout, gate_up.BM)
        out = layout.buffer(self.dtype, self._row_bytes(op.hidden))
        kind = self._grouped_kind(chosen)
        x: Sequence[Given] = (self._input("x"),)
        inner: Sequence[Given]
        if kind == "fp8":
            x, inner = self._quantized_x(layout), self._codes(layout, "down", op.top_k)
        else:
            inner = (layout.buffer(self.dtype, self._row_bytes(op.inner)),)
        parts = ("", "_scale", "_bias") if kind == "fp8" else _PARTS
        weights = {name: self._weights(name, *parts) for name in ("gate_up", "down")}
        grids = [self._blocks(gate_up.BM, _tiles(n, tile)) for n, tile in ((op.inner, gate_up), (op.hidden, down))]
        if kind == "persistent":
            weights = {name: self._mapped(layout, name, tile) for name, tile in (("gate_up", gate_up), ("down", down))}
            grids = [fixed(chosen.programs)] * 2
        self._launch(
            layout,
            f"{kind}_gate_up",
            (grids[0], ONE, ONE),
            (*x, self._input("expert_weight"), *weights["gate_up"], rows, starts, blocks, *inner),
            self._product("gate_up", gate_up) | {"EXPERTS": op.experts, "TOP_K": op.top_k, "SPEC": op.spec},
            gate_up,
        )
        self._launch(
            layout,
            f"{kind}_down",
            (grids[1], ONE, ONE),
            (*inner, *weights["down"], rows, starts, blocks, out),
            self._product("down", down) | {"EXPERTS": op.experts},
            down,
        )
        self._combine(layout, out)
        return layout.variant(max_tokens)

    def _grouped_kind(self, chosen: Range) -> str:
        """Which kernels: "grouped", "fp8", or "persistent", where a row of weights begins at 16 bytes, as maps want."""
        if chosen.activations == "fp8":
            return "fp8"
        row_bytes = [weight.width * DTYPES[self.op.dtype].bytes for weight in self.op.projections.values()]
        mapped = not self.op.weights and self.sm >= HOPPER and all(n % 16 == 0 for n in row_bytes)
        return "persistent" if chosen.programs and mapped else "grouped"

    def _mapped(self, layout: Layout, projection: str, tile: Tile) -> tuple[Given, ...]:
        """A weight as tensor map, and its biases."""
        weight, bias = self._weights(projection, "", "_bias")
        stored = self.op.projections[projection]
        shape = (self.op.experts, stored.rows, stored.width)
        return layout.map(weight, shape, (1, tile.BN, tile.BK), self.op.dtype), bias

    def _sorted_rows(self, layout: Layout, block: int) -> tuple[Given, Given, Given]:
        """rows, starts and blocks, as `place_rows` leaves them, in blocks of so many rows."""
        op = self.op
        index, block_rows = self._input("expert_index"), (Argument("constant", block), "i32")
        counts = layout.buffer("*i32", fixed(2 * op.experts * 4))
        starts = layout.buffer("*i32", fixed(2 * (op.experts + 1) * 4))
        rows = layout.buffer("*i32", per_token(op.top_k * 4))
        blocks = layout.buffer("*i32", self._blocks(block, 2 * 4))
        grid = (per_token(op.top_k, divisor=ROWS_STEP), ONE, ONE)
        experts = {"EXPERTS": op.experts}
        by_rows = experts | {"TOP_K": op.top_k, "STEP": ROWS_STEP}
        layout.steps.append(Fill(counts[0].index, 0, fixed(2 * op.experts)))
        self._launch(layout, "count_rows", grid, (index, counts, _TOKENS), by_rows)
        self._launch(layout, "start_rows", (ONE, ONE, ONE), (counts, starts, block_rows), experts)
        given = (index, starts, counts, rows, blocks, _TOKENS, block_rows)
        self._launch(layout, "place_rows", grid, given, by_rows)
        return rows, starts, blocks

    def _rows_sorted_at_once(self, layout: Layout, block: int) -> tuple[Given, Given, Given]:
        """The same for up to ROWS_AT_ONCE rows."""
        op = self.op
        starts = layout.buffer("*i32", fixed(2 * (op.experts + 1) * 4))
        rows = layout.buffer("*i32", per_token(op.top_k * 4))
        blocks = layout.buffer("*i32", self._blocks(block, 2 * 4))
        given = (self._input("expert_index"), starts, rows, blocks, _TOKENS, (Argument("constant", block), "i32"))
        constants = {"EXPERTS": op.experts, "TOP_K": op.top_k, "MOST": ROWS_AT_ONCE, "STEP": ROWS_PLACED}
        grid = (per_token(op.top_k, divisor=ROWS_PLACED), ONE, ONE)
        self._launch(layout, "sort_rows", grid, given, constants, warps=8)
        return rows, starts, blocks

    def _codes(self, layout: Layout, projection: str, rows: int) -> Sequence[Given]:
        """Room for the quantized input of a projection, codes and scales. rows: of a token."""
        weight = self.op.projections[projection]
        return (
            layout.buffer("*i8", per_token(rows * weight.stored_width)),
            layout.buffer("*fp32", per_token(rows * weight.groups * 4)),
        )

    def _quantized_x(self, layout: Layout) -> Sequence[Given]:
        weight = self.op.projections["gate_up"]
        codes = self._codes(layout, "gate_up", 1)
        groups = min(COLUMNS_STEP // weight.group, power_of_two(weight.groups))
        grid = (per_token(-(-weight.groups // groups)), ONE, ONE)
        self._launch(layout, "quantize_rows", grid, (self._input("x"), *codes), {"W": weight, "GROUPS": groups})
        return codes

    def _combine(self, layout: Layout, rows: Given) -> None:
        op = self.op
        step = min(COLUMNS_STEP, power_of_two(op.hidden))
        self._launch(
            layout,
            "combine",
            (per_token(-(-op.hidden // step)), ONE, ONE),
            (rows, self._input("expert_index"), self._input("expert_weight"), (Argument("output"), self.dtype)),
            {"TOP_K": op.top_k, "HIDDEN": op.hidden, "SPEC": op.spec, "STEP": step},
        )

    def _blocks(self, rows: int, times: int) -> Count:
        """times the most blocks of so many rows that T * k rows of E experts can make, at most rounded up."""
        op = self.op
        most = times * op.top_k
        return per_token(most, times * op.experts * (rows - 1), rows, limit=Linear(T=most))

    def _row_bytes(self, width: int) -> Count:
        return per_token(self.op.top_k * width * DTYPES[self.op.dtype].bytes)

    def _input(self, name: str) -> Given:
        place = self.places[name]
        return Argument("input", place), DTYPES[self.op.inputs[place].dtype].pointer

    def _weights(self, projection: str, *parts: str) -> tuple[Given, ...]:
        """All parts of a weight, or those named, null where there are none."""
        names = [f"{projection}{part}" for part in parts or _PARTS]
        return tuple(self._input(name) if name in self.places else (Argument("null"), self.dtype) for name in names)

    def _product(self, projection: str, tile: Tile) -> dict[str, Hashable]:
        """What the kernel of one product is specialised to."""
        stored = self.op.projections[projection]
        weight = replace(stored, native_fp8=(stored.format == "fp8" or stored.row_scales) and self.sm >= ADA)
        return {"W": weight, "TILE": tile, "INTERPRETED": False}

    def _launch(
        self,
        layout: Layout,
        function: str,
        grid: Grid,
        given: Sequence[Given],
        constants: Mapping[str, Hashable],
        tile: Tile | None = None,
        warps: int = 4,
    ) -> None:
        """One more step; it overlaps with the launch before it, if the GPU can and that is one of this op's own."""
        arguments, types = zip(*given, strict=True)
        can_overlap = self.sm >= HOPPER
        constants = {**constants, "OVERLAPS": can_overlap}
        warps, stages = (tile.warps, tile.stages) if tile else (warps, 1)
        spec = KernelSpec(function, types, tuple(sorted(constants.items())), warps, stages)
        if spec not in self.kernels:
            self.kernels.append(spec)
        overlaps = can_overlap and bool(layout.steps) and isinstance(layout.steps[-1], Launch)
        layout.steps.append(Launch(self.kernels.index(spec), grid, arguments, overlaps))


def _tiles(width: int, tile: Tile) -> int:
    return -(-width // tile.BN)
