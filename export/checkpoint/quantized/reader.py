"""A checkpoint's tensors by the names of an unquantized one: those that are stored in codes decode when they are read.

Which tensors belong together, and what they are, is decided weight by weight from names and dtypes. A float tensor
without a scale stays as it is, whatever the config says of its module; so does one in another format than the config's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.quantized import awq, gptq, mxfp4, nvfp4, packed, tiles
from moevlm.export.checkpoint.quantized.layout import FLOATS, Format, Parts, Spelling
from moevlm.export.checkpoint.quantized.methods import settings_of
from moevlm.export.checkpoint.quantized.settings import Settings
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import Coded
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.errors import CheckpointError, one_line

FORMATS: tuple[Format, ...] = (
    *(nvfp4.MODELOPT, nvfp4.COMPRESSED_TENSORS, mxfp4.BLOCKS, mxfp4.ROWS),
    *(tiles.TILES, packed.PACKED, gptq.FORMAT, awq.FORMAT),
)
_OF_CODES = {dtype for form in FORMATS for dtype in form.dtypes}
# Endings of tensors that are not weights, and why nothing reads them.
_ACTIVATIONS = "scales of activations, which are not rounded here"
_CACHES = "scales of a cache of keys and values, which has scales of its own here"
IGNORED: Mapping[str, str] = {
    **{
        rf"{name}$": _ACTIVATIONS
        for name in ("input_scale", "input_global_scale", "input_zero_point", "activation_scale", "qscale_act")
    },
    **{
        rf"\.{name}$": _CACHES for name in ("k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point", "q_scale")
    },
}


@dataclass(frozen=True)
class Plain:
    """tensors: by the names that an unquantized checkpoint would have. formats: of those in codes, in words, by name.

    ignorable: patterns of names of tensors that need not be used, and why, see IGNORED.
    """

    tensors: Mapping[str, Weight]
    formats: Mapping[str, str]
    ignorable: Mapping[str, str]

    def counted(self, names: Iterable[str]) -> dict[str, int]:
        """How many of these tensors are in which format or dtype; nothing where none is in codes."""
        plain = sorted(name for name in names if name not in self.formats)
        kinds = Counter(self.formats[name] for name in sorted(names) if name in self.formats)
        return {**kinds, **Counter(str(self.tensors[name].dtype) for name in plain)} if self.formats else {}


def plain_tensors(checkpoint: Checkpoint, ignored_config: Sequence[str] = ()) -> Plain:
    """Only headers and a few small tensors are read. ignored_config: see `families.base.Family.config`.

    Raises UnsupportedModelError for a method or an option that is not supported, CheckpointError where tensors of a
    weight are missing or do not fit together.
    """
    settings = settings_of(checkpoint.directory, checkpoint.config, ignored_config)
    if not settings.method:
        return Plain(checkpoint.tensors, {}, {})
    return _plain(checkpoint.tensors, settings)


def _plain(stored: Mapping[str, Stored], settings: Settings) -> Plain:
    found = {name: _found(name, stored, settings) for name in stored if stored[name].dtype.name in _OF_CODES}
    chosen = {name: choice for name, choice in found.items() if choice is not None}
    parts = {part: name for name, (_, spelling) in chosen.items() for part in _names(name, spelling, stored)}
    weights: dict[str, Weight] = {}
    formats: dict[str, str] = {}
    for name, tensor in stored.items():
        if name in chosen and name not in parts:
            form, spelling = chosen[name]
            base = name.removesuffix(spelling.codes)
            plain, tensors = base + spelling.plain, {"codes": tensor}
            tensors |= {part: stored[base + end] for part, end in _endings(spelling) if base + end in stored}
            if plain != name and plain in stored:
                raise CheckpointError(
                    f"the checkpoint has both {_told(plain)} and {_told(name)} (allowed: one of them)"
                )
            weights[plain] = form.read(Parts(plain, tensors, settings))
            formats[plain] = _described(form, weights[plain])
        elif name not in parts:
            _refuse_alone(name, stored)
            weights[name] = tensor
    return Plain(weights, formats, IGNORED)


def _found(name: str, stored: Mapping[str, Stored], settings: Settings) -> tuple[Format, Spelling] | None:
    """How a tensor of codes and those beside it are to be read; None if it is none."""
    fitting = [
        (form, spelling)
        for form, spelling in _possible(name, stored[name].dtype.name, settings)
        if not _missing(name, spelling, stored)
    ]
    scales = {spelling.needed["scale"] for _, spelling in fitting}
    if len(scales) > 1:
        told = " and ".join(sorted(scales))
        raise CheckpointError(f"tensor {_told(name)} has two scales, {told} (allowed: one of them)")
    return fitting[0] if fitting else None


def _possible(name: str, dtype: str, settings: Settings) -> Iterator[tuple[Format, Spelling]]:
    for form in FORMATS:
        if dtype in form.dtypes and (not form.methods or settings.method in form.methods):
            yield from ((form, spelling) for spelling in form.spellings if name.endswith(spelling.codes))


def _endings(spelling: Spelling) -> list[tuple[str, str]]:
    return [*spelling.needed.items(), *spelling.optional.items()]


def _missing(name: str, spelling: Spelling, stored: Mapping[str, Stored]) -> list[str]:
    base = name.removesuffix(spelling.codes)
    return [base + end for end in spelling.needed.values() if base + end not in stored]


def _names(name: str, spelling: Spelling, stored: Mapping[str, Stored]) -> list[str]:
    """The tensors beside the one of codes."""
    base = name.removesuffix(spelling.codes)
    return [base + end for _, end in _endings(spelling) if base + end in stored]


def _refuse_alone(name: str, stored: Mapping[str, Stored]) -> None:
    """Raise CheckpointError for codes without a scale, and for a scale beside a tensor that has no codes."""
    dtype = stored[name].dtype.name
    spellings = [(form, spelling) for form in FORMATS if dtype in form.dtypes for spelling in form.spellings]
    weights = name.endswith((".weight", "_proj"))
    lacking = [
        _missing(name, spelling, stored)
        for _, spelling in spellings
        if name.endswith(spelling.codes) and (spelling.codes.endswith(("_packed", "_blocks", "qweight")) or weights)
    ]
    if lacking and not all(lacking):
        raise CheckpointError(f"tensor {_told(name)} is of a format that the config's quant_method does not have")
    if lacking:
        least = min(map(len, lacking))
        told = " or ".join(dict.fromkeys(" and ".join(names) for names in lacking if len(names) == least))
        raise CheckpointError(f"tensor {_told(name)} has dtype {dtype}, and the checkpoint lacks {one_line(told)}")
    for form in FORMATS:
        for spelling in form.spellings:
            for part, end in _endings(spelling):
                weight = name.removesuffix(end) + spelling.codes
                if part != "index" and name.endswith(end) and weight != name and weight.endswith((".weight", "_proj")):
                    _refuse_scaled_floats(name, weight, stored)


def _refuse_scaled_floats(name: str, weight: str, stored: Mapping[str, Stored]) -> None:
    if weight in stored and stored[weight].dtype.name in FLOATS:
        raise CheckpointError(
            f"tensor {_told(weight)} has dtype {stored[weight].dtype}, and a scale, {_told(name)} (allowed: codes with "
            "a scale, or floats without)"
        )


def _described(form: Format, weight: Weight) -> str:
    """fp8 in blocks of 128 x 128; gptq int4 in groups of 128 with zero points"""
    if form.name in ("nvfp4", "mxfp4"):
        return form.name
    if not isinstance(weight, Coded):
        return f"{form.name} with scattered groups"
    codes, (rows, columns) = weight.form, weight.shape[-2:]
    if isinstance(weight, tiles.Tiles) and weight.scales.dtype.name in tiles.EXPONENTS and codes.block_rows == 1:
        return "mxfp8"
    kind = codes.kind if form.name in ("fp8", "int") else f"{form.name} {codes.kind}"
    whole = codes.group_size >= columns
    if codes.block_rows == 1:
        zeros = " with zero points" if codes.zeros else ""
        return f"{kind} per channel{zeros}" if whole else f"{kind} in groups of {codes.group_size}{zeros}"
    if whole and codes.block_rows >= rows:
        return f"{kind} per tensor"
    return f"{kind} in blocks of {codes.block_rows} x {codes.group_size}"


def _told(name: str) -> str:
    return one_line(name, 120)
