"""A quantized checkpoint's weights in float32, for the model that everything is held to.

Written from the formats' definitions and sharing nothing with `export/checkpoint/quantized`, so that a fault of that
reader shows as a mismatch: a whole tensor at a time, by names and dtypes, in float64 where that is simplest. What it
does not know it leaves as it is, and transformers will not find its tensor then.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.weights import Weight

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight numbers in a word, where in the word each stands


@dataclass(frozen=True)
class Dequantized:
    """A weight that `make` computes. shape: of it.

    out_in: experts are [E, out, in], whichever way round a model has them: the format knows no other.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    out_in: bool = False
    dtype = np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Of the first axis; the whole is computed each time."""
        return self.make()[start:stop].to(torch.float32).numpy()


def dequantized(checkpoint: Checkpoint) -> Mapping[str, Weight]:
    """All tensors by the names of an unquantized checkpoint; those in codes are float32."""
    stored, settings = checkpoint.tensors, _settings(checkpoint.config)
    made: dict[str, Weight] = {}
    used: set[str] = set()
    for name in stored:
        for plain, parts, values in islice(_readings(name, stored, settings), 1):
            load = partial(_values, {part: stored[of] for part, of in parts.items()}, values, settings)
            made[plain] = Dequantized(_shape(values, parts, stored, settings), load, values is _mxfp4_blocks)
            used |= {*parts.values()}
    return {name: tensor for name, tensor in stored.items() if name not in used} | made


Parts = Mapping[str, Tensor]
Values = Callable[[Parts, Mapping[str, Any]], Tensor]
Reading = tuple[str, dict[str, str], Values]  # plain name, names of the parts, what makes the values of them


def _readings(name: str, stored: Mapping[str, Stored], settings: Mapping[str, Any]) -> Iterator[Reading]:
    """For each format that the tensor could be the codes of."""
    dtype = stored[name].dtype.name

    def beside(base: str, optional: tuple[str, ...] = (), **ends: str) -> dict[str, str] | None:
        found = {part: base + end for part, end in ends.items() if base + end in stored}
        return found if ends.keys() <= {*found, *optional} else None

    if name.endswith(".qweight"):
        base, is_awq = name.removesuffix("qweight"), settings.get("quant_method") == "awq"
        ends = {"codes": "qweight", "scale": "scales", "zero": "qzeros", "g_idx": "g_idx"}
        if parts := beside(base, ("zero", "g_idx") if is_awq else ("g_idx",), **ends):
            yield f"{base}weight", parts, _awq if is_awq else _gptq
    elif name.endswith("_packed") and dtype == "int32":
        base, optional = name.removesuffix("_packed"), ("zero", "g_idx")
        ends = {"codes": "_packed", "scale": "_scale", "shape": "_shape", "zero": "_zero_point", "g_idx": "_g_idx"}
        if parts := beside(base, optional, **ends):
            yield base, parts, _packed
    elif name.endswith("_packed"):
        base = name.removesuffix("_packed")
        if parts := beside(base, codes="_packed", scale="_scale", divisor="_global_scale"):
            yield base, parts, _nvfp4
        elif parts := beside(base, codes="_packed", scale="_scale"):
            yield base, parts, _mxfp4
    elif name.endswith("_blocks"):
        base = name.removesuffix("_blocks")
        if parts := beside(base, codes="_blocks", scale="_scales"):
            yield base, parts, _mxfp4_blocks
    elif dtype == "uint8":
        for scale in ("_scale", "_weight_scale"):
            if parts := beside(name, codes="", scale=scale, factor=f"{scale}_2"):
                yield name, parts, _nvfp4
    elif dtype in ("float8_e4m3fn", "float8_e5m2", "int8"):
        for scale in ("_scale_inv", "_scale", "_weight_scale"):
            if parts := beside(name, codes="", scale=scale):
                yield name, parts, _scaled
        for scale in ("qscale_weight", "scale"):
            if parts := beside(name.removesuffix("weight"), codes="weight", scale=scale):
                yield name, parts, _scaled


def _values(parts: Mapping[str, Stored], values: Values, settings: Mapping[str, Any]) -> Tensor:
    return values({part: _tensor(stored) for part, stored in parts.items()}, settings)


def _tensor(stored: Stored) -> Tensor:
    """The whole tensor, in torch's own dtype; exponents are bytes."""
    array = np.ascontiguousarray(stored.rows(0, 1 << 62))
    raw = torch.from_numpy(array.view(f"u{array.dtype.itemsize}").copy())
    name = array.dtype.name
    return raw.view(getattr(torch, name)) if name != "float8_e8m0fnu" and hasattr(torch, name) else raw


def _shape(
    values: Values, parts: Mapping[str, str], stored: Mapping[str, Stored], settings: Mapping[str, Any]
) -> tuple[int, ...]:
    *outer, last = stored[parts["codes"]].shape or (0,)
    if values is _packed:
        return (*outer[:-1], *_stated(_tensor(stored[parts["shape"]])))
    if values is _awq:
        return 8 * last, outer[0]
    if values is _gptq:
        words, index = stored[parts["codes"]], stored.get(parts.get("g_idx", ""))
        return last, outer[0] * 32 // _gptq_bits(words, index, settings)
    if values is _mxfp4_blocks:
        return (*outer[:-1], outer[-1] * 2 * last)
    if values is _nvfp4 and _is_turned(stored[parts["codes"]], stored[parts["scale"]]):
        return (*outer[:-1], 2 * outer[-1], last)
    return (*outer, last) if values is _scaled else (*outer, 2 * last)


def _scaled(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    values, scale = parts["codes"].double(), parts["scale"]
    factor = torch.exp2(scale.double() - 127) if scale.dtype is torch.uint8 else scale.double()
    if factor.numel() > 1:
        factor = factor.reshape(*factor.shape, *(1 for _ in range(values.dim() - factor.dim())))
        block = settings.get("weight_block_size") or ((1, 32) if scale.dtype is torch.uint8 else (128, 128))
        for axis, size in zip((-2, -1), block, strict=True):
            if factor.shape[axis] not in (1, values.shape[axis]):
                factor = factor.repeat_interleave(size, axis).narrow(axis, 0, values.shape[axis])
    return values * factor


def _words(words: Tensor, bits: int) -> Tensor:
    """int32 [.., W] -> [.., W * 32 / bits], from the lowest bits on."""
    shifts = torch.arange(0, 32, bits)
    return (words.long()[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def _groups(width: int, count: int) -> Tensor:
    """The group of each of `width` numbers in a row: `count` groups, all but the last of one size, a power of two."""
    size = next((1 << i for i in range(20) if -(-width // (1 << i)) == count), width) if count > 1 else width
    return torch.arange(width) // size


def _packed(parts: Parts, _: Mapping[str, Any]) -> Tensor:
    n, k = _stated(parts["shape"])
    bits = -(-32 * parts["codes"].shape[-1] // k)
    bits = 4 if bits <= 4 else 8
    codes = _words(parts["codes"], bits)[..., :k].double()
    scale = parts["scale"].double()
    zero = torch.full_like(scale, 1 << bits - 1)
    if "zero" in parts:
        zero = _words(parts["zero"].mT.contiguous(), bits)[..., :n].mT.double()
    groups = parts["g_idx"].long() if "g_idx" in parts else _groups(k, scale.shape[-1])
    return (codes - zero[..., groups]) * scale[..., groups]


def _stated(shape: Tensor) -> tuple[int, int]:
    """Rows and columns of a matrix, of each of several, or behind the number of those."""
    n, k = shape.flatten()[-2:].tolist()
    return n, k


def _gptq(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    bits, scales = _gptq_bits(parts["codes"], parts.get("g_idx"), settings), parts["scale"].double()
    codes = _words(parts["codes"].T.contiguous(), bits).double()  # [N, K]
    stated = settings.get("checkpoint_format") or settings.get("format")
    zeros = _words(parts["zero"], bits).double() + (stated != "gptq_v2")
    k = codes.shape[1]
    groups = parts["g_idx"].long() if "g_idx" in parts else _groups(k, len(scales))
    return (codes - zeros[groups].T) * scales[groups].T


def _gptq_bits(words: Tensor | Stored, index: Tensor | Stored | None, settings: Mapping[str, Any]) -> int:
    """Of a code. Modules may differ from what the config says of all: an index has a number for each input."""
    return int(settings.get("bits", 4)) if index is None else 32 * words.shape[0] // index.shape[0]


def _awq(parts: Parts, _: Mapping[str, Any]) -> Tensor:
    def numbers(words: Tensor) -> Tensor:  # [R, W] -> [R, 8 W]
        return _words(words, 4).unflatten(-1, (-1, 8))[..., list(_AWQ_PLACES)].flatten(-2).double()

    codes, scales = numbers(parts["codes"]), parts["scale"].double()
    zeros = numbers(parts["zero"]) if "zero" in parts else torch.full_like(scales, 8)
    groups = _groups(len(codes), len(scales))
    return ((codes - zeros[groups]) * scales[groups]).T


def _fp4(packed: Tensor) -> Tensor:
    return _E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def _nvfp4(parts: Parts, _: Mapping[str, Any]) -> Tensor:
    packed, scale, turned = parts["codes"], parts["scale"].double(), _is_turned(parts["codes"], parts["scale"])
    if turned:
        packed, scale = packed.mT, scale.mT
    values = _fp4(packed)
    of_all = parts["factor"].double() if "factor" in parts else 1 / parts["divisor"].double()
    if of_all.numel() == 2 * len(scale):  # of gate rows and up rows
        of_all = of_all.reshape(-1, 2).repeat_interleave(scale.shape[1] // 2, 1)[..., None]
    elif of_all.numel() > 1:
        of_all = of_all.reshape(-1, *(1 for _ in scale.shape[1:]))
    values = values * (scale * of_all).repeat_interleave(16, -1)[..., : values.shape[-1]]
    return values.mT if turned else values


def _is_turned(packed: Tensor | Stored, scale: Tensor | Stored) -> bool:
    """Whether experts are [E, in / 2, out], with scales [E, in / 16, out]."""
    return packed.shape[-2] != scale.shape[-2]


def _mxfp4(parts: Parts, _: Mapping[str, Any]) -> Tensor:
    values = _fp4(parts["codes"])
    return values * torch.exp2(parts["scale"].double() - 127).repeat_interleave(32, -1)[..., : values.shape[-1]]


def _mxfp4_blocks(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    return _mxfp4({"codes": parts["codes"].flatten(-2), "scale": parts["scale"]}, settings)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization config, wherever it stands."""
    for key in ("quantization_config", "compression_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    inner = (_settings(part) for part in config.values() if isinstance(part, dict))
    return next((found for found in inner if found), {})
