"""Options of `moevlm build` that say nothing about any target that is built: refused, not ignored."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click
from click.core import ParameterSource

PLANS = ("rtx", "trt")


def _kind(target: str) -> str:
    return target.partition(":")[0]


def _rounded(target: str, options: Mapping[str, Any]) -> bool:
    return options["experts"] != "same" if _kind(target) in PLANS else target.endswith((":int8", ":int4"))


_ON_PLANS = (lambda target, _: _kind(target) in PLANS), "rtx and trt targets"
_ON_TRT = (lambda target, _: _kind(target) == "trt"), "trt targets"
# Whether an option says something about a target, and which targets those are.
_EFFECTS: dict[str, tuple[Callable[[str, Mapping[str, Any]], bool], str]] = {
    "group_size": (_rounded, "targets with int8, int4 or fp8 weights, on rtx and trt those of --experts"),
    "kv_cache": ((lambda target, _: _kind(target) == "cpu"), "cpu targets"),
    **dict.fromkeys(("dtype", "experts", "capacity", "max_batch", "chunk_tokens"), _ON_PLANS),
    **dict.fromkeys(("version_compatible", "native_moe"), _ON_TRT),
}


def require_effect(context: click.Context, targets: Iterable[str]) -> None:
    """Raise UsageError for an option that was given and counts for none of `targets`."""
    targets = tuple(targets)
    for name, (counts, whose) in _EFFECTS.items():
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and not any(counts(target, context.params) for target in targets):
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} has no effect on {', '.join(targets)} (it is for {whose})", context)
