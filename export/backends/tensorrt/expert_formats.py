"""The format in which a GPU's kernels hold experts: the options' or, where these say nothing, the checkpoint's."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from moevlm.export.backends.tensorrt.options import AUTO, MIXED, SAME, Options
from moevlm.export.formats.base import WeightFormat
from moevlm.export.formats.registry import weight_format
from moevlm.export.formats.stored import held_codes, roomiest
from moevlm.export.graph.codes import Coded
from moevlm.export.graph.moved_codes import coded
from moevlm.export.graph.weights import Weight, uncast
from moevlm.plugins.gpu.ops.experts import GROUP_SIZES, NVFP4_GROUP
from moevlm.runtime.core.dtypes import E4M3

_BY_SIZE = ("fp4", "int4", "fp8", "int8")


def expert_form(name: str, group_size: int, scales: str = "float32") -> WeightFormat:
    """The format as the kernels have it. scales: of groups, but for those of NVFP4, which are in two levels."""
    return weight_format(name, group_size, E4M3 if group_size == NVFP4_GROUP else scales)


def held_form(*weights: Weight) -> tuple[str, int] | None:
    """The smallest format, and its group size, that keeps the codes of all; None if no format does, or one has none."""
    found = ((name, kept_group(name, *weights)) for name in _BY_SIZE)
    return next(((name, size) for name, size in found if size), None)


def kept_group(name: str, *weights: Weight) -> int:
    """The largest groups in which the format called `name` keeps the codes of all the weights; 0 if in none."""
    found = [coded(uncast(weight)) for weight in weights]
    own = [codes for codes in found if codes is not None]
    if len(own) < max(1, len(found)):
        return 0
    return next((size for size in reversed(GROUP_SIZES[name]) if _keeps(name, size, own)), 0)


def _keeps(name: str, group_size: int, weights: Iterable[Coded]) -> bool:
    form = roomiest(expert_form(name, group_size))
    return all(held_codes(weight, form) is not None for weight in weights)


def chosen(options: Options, banks: Iterable[Sequence[Weight]]) -> Options:
    """The options with the format of experts where they leave it to the checkpoint. banks: gate_up and down of each."""
    if options.native_moe:
        return replace(options, experts=SAME)
    banks = list(banks)
    if options.experts in (AUTO, MIXED):
        found = {held_form(*bank) for bank in banks}
        forms = [form for form in found if form is not None]
        if not forms:
            return replace(options, experts=SAME)
        # Larger groups become several of the smallest; those of NVFP4 are of a kind of their own.
        alike = len({(name, size == NVFP4_GROUP) for name, size in forms}) == 1 and len(forms) == len(found)
        return replace(options, experts=forms[0][0] if alike else MIXED, group_size=min(size for _, size in forms))
    if options.group_size or options.experts == SAME:
        return options
    sizes = [size for bank in banks if (size := kept_group(options.experts, *bank))]
    return replace(options, group_size=min(sizes, default=options.group))
