"""How the tensors of one quantized weight are called, and what is wrong with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from moevlm.export.checkpoint.quantized.settings import Scheme, Settings
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.errors import CheckpointError, one_line

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Spelling:
    """Endings of names. codes: behind a weight's base, the tensor of codes; plain: the weight itself in the model.

    needed, optional: the other tensors, by what they are.
    """

    codes: str
    needed: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    plain: str = ""


@dataclass(frozen=True)
class Parts:
    """The tensors of one weight, "codes" among them. name: of the weight in the model. settings: of the checkpoint."""

    name: str
    tensors: Mapping[str, Stored]
    settings: Settings

    def __getitem__(self, part: str) -> Stored:
        return self.tensors[part]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    @property
    def scheme(self) -> Scheme:
        """What the config says of this weight's module, as far as it does."""
        return self.settings.scheme(self.name.removesuffix(".weight"))

    def floats(self, part: str) -> Stored:
        """A part that has to be of floats. Raises CheckpointError."""
        return self.of_dtype(part, *FLOATS)

    def of_dtype(self, part: str, *allowed: str) -> Stored:
        """A part whose dtype has to be one of `allowed`. Raises CheckpointError."""
        tensor = self[part]
        if tensor.dtype.name not in allowed:
            told = ", ".join(allowed)
            raise CheckpointError(f"tensor {_told(tensor)} has dtype {tensor.dtype} (allowed: {told})")
        return tensor

    def of_shape(self, part: str, *allowed: tuple[int, ...]) -> Stored:
        """A part whose shape has to be one of `allowed`. Raises CheckpointError."""
        tensor = self[part]
        if tensor.shape not in allowed:
            raise wrong_shape(tensor, " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed)))
        return tensor


@dataclass(frozen=True)
class Format:
    """A format of checkpoints. name: as the manifest names it. dtypes: that codes may have.

    read: parts to a weight, which is a `Coded` or, where its groups do not lie side by side, one that only decodes.
    methods: `Settings.method` where these names mean this format; none for all.
    """

    name: str
    dtypes: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    read: Callable[[Parts], Weight]
    methods: tuple[str, ...] = ()


def wrong_shape(tensor: Stored, allowed: str) -> CheckpointError:
    """The error for a tensor whose shape does not fit the codes beside it."""
    return CheckpointError(f"tensor {_told(tensor)} has shape {list(tensor.shape)} (allowed: {allowed})")


def wrong_value(tensor: Stored, value: object, allowed: str) -> CheckpointError:
    """The error for a tensor that holds a value that cannot be."""
    return CheckpointError(f"tensor {_told(tensor)} holds {value} (allowed: {allowed})")


def matrix_shape(tensor: Stored) -> tuple[tuple[int, ...], int, int]:
    """The shape of codes [N, K] or [E, N, K] as outer axes, N and K. Raises CheckpointError for another rank."""
    if len(tensor.shape) not in (2, 3) or 0 in tensor.shape:
        raise wrong_shape(tensor, "2 or 3 dimensions, none of them 0")
    *outer, n, k = tensor.shape
    return tuple(outer), n, k


def exponents(tensor: Stored, array: np.ndarray) -> np.ndarray:
    """Bytes of exponents (E8M0) as the powers of two that they stand for: 2 ** (byte - 127), float32."""
    powers = array.view(np.uint8)
    if (powers == 255).any():
        raise wrong_value(tensor, "the exponent 255, which is not a number", "0 to 254")
    return np.ldexp(np.float32(1), powers.astype(np.int32) - 127)


def _told(tensor: Stored) -> str:
    return one_line(tensor.name, 120)
