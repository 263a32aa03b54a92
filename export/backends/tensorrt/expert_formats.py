"""The format in which a GPU's kernels hold experts: the options' or, where these say nothing, the checkpoint's."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from moevlm.export.backends.tensorrt.options import AUTO, MIXED, SAME, Options
from moevlm.export.formats.registry import weight_format
from moevlm.export.formats.stored import held_codes, roomiest
from moevlm.export.graph.codes import coded
from moevlm.export.graph.weights import Weight, uncast
from moevlm.plugins.gpu.ops.experts import GROUP_SIZES

_BY_SIZE = ("fp4", "int4", "fp8", "int8")


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
    forms = ((size, roomiest(weight_format(name, size))) for size in reversed(GROUP_SIZES[name]))
    return next((size for size, form in forms if all(held_codes(codes, form) is not None for codes in own)), 0)


def chosen(options: Options, banks: Iterable[Sequence[Weight]]) -> Options:
    """The options with the format of experts where they leave it to the checkpoint. banks: gate_up and down of each."""
    if options.native_moe:
        return replace(options, experts=SAME)
    banks = list(banks)
    name = options.experts
    if name in (AUTO, MIXED):
        held = [held_form(*bank) for bank in banks]
        names = {SAME if form is None else form[0] for form in held} or {SAME}
        if len(names) > 1:
            return replace(options, experts=MIXED, group_size=min(form[1] for form in held if form is not None))
        (name,) = names
    if name == SAME:
        return replace(options, experts=SAME)
    if options.experts == name and options.group_size:
        return options
    sizes = [size for bank in banks if (size := kept_group(name, *bank))]
    return replace(options, experts=name, group_size=min(sizes, default=options.group))
