"""The gated delta rule as a GPU program has it: attributes, shapes and dtypes, all known when kernels are compiled.

Where a step has no more tokens than sequences it goes token by token: a convolution, then programs that read and write
their part of a state once. Otherwise sequences of one token do, and the others go in chunks: what a chunk does to a
state is computed for all chunks at once, then states are carried through them.

With 16 key heads and 32 value heads of 128 (Qwen3.5-35B-A3B), a layer and token: decoding reads and writes 2 MiB of
state, which is its limit: 1.3 us on an H100 for one sequence, 80 us for 64. A chunk's token takes 4.5 million floating
point operations, 7 % of the projections around it, and 0.1 MB of traffic. The limit of one prompt is that its chunks
are a chain: 66 in 2112 tokens, each a few matrix products of [32, 128] and [128, 32] in a program.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from moevlm.plugins.gpu.draft import HOPPER, Draft, KernelSpec
from moevlm.plugins.gpu.ops.delta_heads import DeltaHeads
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES
from moevlm.plugins.gpu.program import Argument, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, SYMBOLS, Count, Linear, N, P, T, Tensor, fixed, per_token
from moevlm.plugins.gpu.tiles import delta_tiles
from moevlm.plugins.ops.spec import GatedDeltaSpec
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import FieldError

HEAD_DIMS = range(1, 257)
NO_LIMIT = (1 << 31) - 1
_TABLES = ("query_start", "state_row")
_STATES = ("conv_state", "delta_state")


@dataclass(frozen=True)
class GatedDeltaOp:
    """x [T, C + 2 * Hv + beside] -> y [T, Hv * Dv], both in `dtype`; see `moevlm.plugins.ops.gated_delta.gated_delta`.

    A row of x has the C channels of qkv, then a, then b, then `beside` values of another's, such as the gate of y. The
    states, of P rows, are written in place; row 0 is nobody's, neither read nor written. Whatever query_start and
    state_row hold, nothing outside the inputs and outputs is touched. Tokens that no sequence has get no y.
    """

    spec: GatedDeltaSpec
    dtype: str = "bfloat16"
    beside: int = 0

    name = "GatedDelta"

    def __post_init__(self) -> None:
        if self.dtype not in ACTIVATION_DTYPES:
            raise FieldError("dtype", self.dtype, ", ".join(map(repr, ACTIVATION_DTYPES)))
        for field in ("key_dim", "value_dim"):
            if (dim := getattr(self.spec, field)) not in HEAD_DIMS:
                raise FieldError(field, dim, f"{HEAD_DIMS[0]} to {HEAD_DIMS[-1]}")

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        spec = self.spec
        heads = spec.value_heads
        return (
            Tensor("x", self.dtype, (T, spec.channels + 2 * heads + self.beside)),
            Tensor("conv_weight", "float32", (spec.channels, spec.kernel)),
            Tensor("rate", "float32", (heads,)),
            Tensor("dt_bias", "float32", (heads,)),
            Tensor("conv_state", "float32", (P, spec.kernel - 1, spec.channels), written=True),
            Tensor("delta_state", "float32", (P, heads, spec.key_dim, spec.value_dim), written=True),
            Tensor("query_start", "int32", (N + 1,)),
            Tensor("state_row", "int32", (N,)),
        )

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (Tensor("y", self.dtype, (T, self.spec.value_heads * self.spec.value_dim)),)

    def draft(self, sm: int) -> Draft:
        """See `KernelOp`. Raises ValueError for bfloat16 on sm75, which has none."""
        if self.dtype == "bfloat16" and sm < 80:
            raise ValueError(f"dtype = bfloat16 on sm{sm} (allowed: float16)")
        return _GatedDeltaDraft(self, sm).draft()


class _GatedDeltaDraft:
    """Collects kernels while the variants are laid out."""

    MIXED, VALUES, KEYS, SCORES, DECAYS = range(5)  # workspace buffers

    def __init__(self, op: GatedDeltaOp, sm: int) -> None:
        spec = op.spec
        self.op, self.sm, self.heads = op, sm, DeltaHeads.of(spec, op.beside)
        self.tiles = delta_tiles(DTYPES[op.dtype].bits, max(spec.key_dim, spec.value_dim), sm)
        self.kernels: list[KernelSpec] = []

    def draft(self) -> Draft:
        op, heads, width = self.op, self.heads, DTYPES[self.op.dtype].bytes
        rows = (heads.value_dim, heads.key_dim, self.tiles.chunk)
        mixed = per_token(heads.channels * width)
        chunked = (*(per_token(heads.value_heads * row * width) for row in rows), per_token(4 * heads.value_heads))
        one_by_one = self._variant(
            (Linear(T=1, N=-1),),
            (mixed,),
            (self._convolved(self.tiles.few), self._recurrent(NO_LIMIT)),
        )
        steps = (self._convolved(self.tiles.many), self._chunks(), self._recurrent(1), self._scan())
        variants = (one_by_one, self._variant((), (mixed, *chunked), steps))
        return Draft(op.name, op.inputs, op.outputs, self.sm, tuple(self.kernels), variants)

    def _variant(self, bounds: tuple[Linear, ...], buffers: tuple[Count, ...], steps: tuple[Launch, ...]) -> Variant:
        """Launches overlap with those before them, if the GPU can."""
        overlap = self.sm >= HOPPER
        return Variant(
            bounds, buffers, tuple(replace(step, overlaps=overlap and i > 0) for i, step in enumerate(steps))
        )

    def _convolved(self, tokens: int) -> Launch:
        return self._launch(
            "convolve",
            (Count(Linear(T=1), tokens), fixed(2 * self.heads.key_heads + self.heads.value_heads), ONE),
            ("x", "conv_weight", "conv_state", *_TABLES, self.MIXED, "T", "N", "P"),
            {"BM": tokens},
            4,
        )

    def _recurrent(self, longest: int) -> Launch:
        tile = self.tiles.recurrent
        return self._launch(
            "delta_recurrent",
            (Count(Linear(N=1)), fixed(self.heads.value_heads), fixed(self._blocks(tile.BV))),
            ("x", self.MIXED, "rate", "dt_bias", *_STATES, *_TABLES, "y", "T", "P", ("constant", longest)),
            {"BV": tile.BV},
            tile.warps,
        )

    def _chunks(self) -> Launch:
        chunk = self.tiles.chunk
        written = (self.VALUES, self.KEYS, self.SCORES, self.DECAYS)
        return self._launch(
            "delta_chunks",
            # No chunk has tokens of two sequences.
            (Count(Linear(T=1, N=chunk), chunk), fixed(self.heads.value_heads), ONE),
            ("x", self.MIXED, "rate", "dt_bias", "query_start", *written, "T", "N"),
            {"BT": chunk, "INTERPRETED": False},
            self.tiles.chunk_warps,
        )

    def _scan(self) -> Launch:
        tile = self.tiles.scan
        read = (self.MIXED, self.VALUES, self.KEYS, self.SCORES, self.DECAYS)
        return self._launch(
            "delta_scan",
            (Count(Linear(N=1)), fixed(self.heads.value_heads), fixed(self._blocks(tile.BV))),
            ("x", *read, *_STATES, *_TABLES, "y", "T", "P"),
            {"BT": self.tiles.chunk, "BV": tile.BV, "INTERPRETED": False},
            tile.warps,
            tile.stages,
        )

    def _blocks(self, columns: int) -> int:
        """Programs that share a head's state."""
        return -(-self.heads.value_dim // columns)

    def _launch(
        self,
        function: str,
        grid: tuple[Count, Count, Count],
        arguments: tuple[str | int | tuple[str, int], ...],
        constants: dict[str, Hashable],
        warps: int,
        stages: int = 1,
    ) -> Launch:
        """arguments: the name of an input, of the output or of a symbol; a buffer; a constant."""
        given, types = zip(*map(self._argument, arguments), strict=True)
        constants = {**constants, "H": self.heads, "OVERLAPS": self.sm >= HOPPER}
        spec = KernelSpec(function, types, tuple(sorted(constants.items())), warps, stages)
        if spec not in self.kernels:
            self.kernels.append(spec)
        return Launch(self.kernels.index(spec), grid, given)

    def _argument(self, argument: str | int | tuple[str, int]) -> tuple[Argument, str]:
        if isinstance(argument, tuple):
            return Argument(*argument), "i32"
        if isinstance(argument, int):
            dtype = "float32" if argument == self.DECAYS else self.op.dtype
            return Argument("workspace", argument), DTYPES[dtype].pointer
        if argument in SYMBOLS:
            return Argument("symbol", SYMBOLS.index(argument)), "i32"
        kind, tensors = ("output", self.op.outputs) if argument == "y" else ("input", self.op.inputs)
        place = [tensor.name for tensor in tensors].index(argument)
        return Argument(kind, place), DTYPES[tensors[place].dtype].pointer
