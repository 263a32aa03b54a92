"""A reader of `Program.to_bytes`, written from its description alone."""

import struct
from dataclasses import dataclass
from typing import Any

DTYPES = {0: "float32", 1: "float16", 2: "int8", 3: "int32", 6: "float8_e4m3fn", 7: "bfloat16"}
KINDS = ("input", "output", "workspace", "symbol", "null", "constant")


@dataclass
class Reader:
    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def count(self) -> dict[str, Any]:
        slope, offset, divisor, limit_slope, limit = struct.unpack("<5q", self.take(40))
        unlimited = limit == (1 << 63) - 1
        limited = None if unlimited else linear(limit, limit_slope)
        return {"value": linear(offset, slope), "divisor": divisor, "limit": limited}

    def blob(self) -> bytes:
        return self.take(self.u32())

    def tensor(self) -> dict[str, Any]:
        name, dtype, rank = self.blob().decode(), DTYPES[self.u32()], self.u32()
        shape = struct.unpack(f"<{rank}q", self.take(8 * rank))
        tokens = {"name": "T", "plus": 0}
        named = {"name": name, "dtype": dtype, "written": False}
        return named | {"shape": tuple(tokens if dim == -1 else dim for dim in shape)}

    def kernel(self) -> dict[str, Any]:
        entry, warps, shared, parameters = self.blob().decode(), self.u32(), self.u32(), self.u32()
        return {"entry": entry, "warps": warps, "shared": shared, "parameters": parameters, "image": self.blob()}

    def step(self) -> dict[str, Any]:
        kernel = self.u32()
        if kernel == 0xFFFFFFFF:
            return {"buffer": self.u32(), "value": self.u32(), "words": self.count()}
        grid = tuple(self.count() for _ in range(3))
        arguments = tuple({"kind": KINDS[self.u32()], "index": self.u32()} for _ in range(self.u32()))
        return {"kernel": kernel, "grid": grid, "arguments": arguments}

    def variant(self) -> dict[str, Any]:
        max_tokens = self.u32()
        buffers = tuple(self.count() for _ in range(self.u32()))
        bounds = (linear(-max_tokens, 1),)
        return {"bounds": bounds, "buffers": buffers, "steps": tuple(self.step() for _ in range(self.u32()))}

    def image(self) -> dict[str, Any]:
        sm = self.u32()
        kernels = tuple(self.kernel() for _ in range(self.u32()))
        return {"sm": sm, "kernels": kernels, "variants": tuple(self.variant() for _ in range(self.u32()))}


def linear(offset: int, slope: int) -> dict[str, int]:
    return {"offset": offset, "T": slope, "N": 0, "M": 0, "P": 0}


def read(data: bytes) -> dict[str, Any]:
    """The program as nested dictionaries, as dataclasses.asdict has it. Every byte must have a meaning."""
    reader = Reader(data)
    assert reader.take(8) == b"MOEVLMGP"
    assert reader.u32() == 1
    op = reader.blob().decode()
    inputs, outputs = (tuple(reader.tensor() for _ in range(reader.u32())) for _ in range(2))
    images = tuple(reader.image() for _ in range(reader.u32()))
    assert reader.at == len(data)
    return {"op": op, "inputs": inputs, "outputs": outputs, "images": images}
