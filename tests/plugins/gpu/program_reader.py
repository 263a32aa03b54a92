"""A reader of `Program.to_bytes`, written from its description alone."""

import struct
from dataclasses import dataclass
from typing import Any

DTYPES = {0: "float32", 1: "float16", 2: "int8", 3: "int32", 6: "float8_e4m3fn", 7: "bfloat16"}
SYMBOLS = ("T", "N", "M", "P")
KINDS = ("input", "output", "workspace", "symbol", "null", "constant", "tensor_map")


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

    def i64(self) -> int:
        return struct.unpack("<q", self.take(8))[0]

    def flag(self) -> bool:
        value = self.u32()
        assert value in (0, 1)
        return bool(value)

    def linear(self) -> dict[str, int]:
        return {name: self.i64() for name in ("offset", *SYMBOLS)}

    def count(self) -> dict[str, Any]:
        value, divisor = self.linear(), self.i64()
        return {"value": value, "divisor": divisor, "limit": self.linear() if self.flag() else None}

    def blob(self) -> bytes:
        return self.take(self.u32())

    def dimension(self) -> int | dict[str, Any]:
        symbol, number = self.u32(), self.i64()
        return number if symbol == 0xFFFFFFFF else {"name": SYMBOLS[symbol], "plus": number}

    def tensor(self) -> dict[str, Any]:
        name, dtype, written = self.blob().decode(), DTYPES[self.u32()], self.flag()
        shape = tuple(self.dimension() for _ in range(self.u32()))
        return {"name": name, "dtype": dtype, "shape": shape, "written": written}

    def kernel(self) -> dict[str, Any]:
        entry, warps, shared, parameters = self.blob().decode(), self.u32(), self.u32(), self.u32()
        return {"entry": entry, "warps": warps, "shared": shared, "parameters": parameters, "image": self.blob()}

    def argument(self) -> dict[str, Any]:
        return {"kind": KINDS[self.u32()], "index": self.u32()}

    def map(self) -> dict[str, Any]:
        source, dtype, rows = self.argument(), DTYPES[self.u32()], self.linear()
        inner = tuple(self.i64() for _ in range(self.u32()))
        block = tuple(self.u32() for _ in range(self.u32()))
        described = {"source": source, "dtype": dtype, "rows": rows, "inner": inner, "block": block}
        return described | {"swizzle": self.u32()}

    def step(self) -> dict[str, Any]:
        kernel = self.u32()
        if kernel == 0xFFFFFFFF:
            return {"buffer": self.u32(), "value": self.u32(), "words": self.count()}
        overlaps = self.flag()
        grid = tuple(self.count() for _ in range(3))
        arguments = tuple(self.argument() for _ in range(self.u32()))
        return {"kernel": kernel, "grid": grid, "arguments": arguments, "overlaps": overlaps}

    def variant(self) -> dict[str, Any]:
        bounds = tuple(self.linear() for _ in range(self.u32()))
        buffers = tuple(self.count() for _ in range(self.u32()))
        maps = tuple(self.map() for _ in range(self.u32()))
        steps = tuple(self.step() for _ in range(self.u32()))
        return {"bounds": bounds, "buffers": buffers, "steps": steps, "maps": maps}

    def image(self) -> dict[str, Any]:
        sm = self.u32()
        kernels = tuple(self.kernel() for _ in range(self.u32()))
        return {"sm": sm, "kernels": kernels, "variants": tuple(self.variant() for _ in range(self.u32()))}


def read(data: bytes) -> dict[str, Any]:
    """The program as nested dictionaries, as dataclasses.asdict has it. Every byte must have a meaning."""
    program, length = read_first(data)
    assert length == len(data)
    return program


def read_first(data: bytes) -> tuple[dict[str, Any], int]:
    """The program that `data` begins with, and of how many bytes it is."""
    reader = Reader(data)
    assert reader.take(8) == b"MOEVLMGP"
    assert reader.u32() == 2
    op = reader.blob().decode()
    inputs, outputs = (tuple(reader.tensor() for _ in range(reader.u32())) for _ in range(2))
    images = tuple(reader.image() for _ in range(reader.u32()))
    return {"op": op, "inputs": inputs, "outputs": outputs, "images": images}, reader.at
