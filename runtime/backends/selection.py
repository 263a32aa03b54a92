"""Which engine of a bundle this machine runs, and what there is where none fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moevlm.runtime.backends.registry import Backends
from moevlm.runtime.bundle.reader import Bundle, preferred
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BundleError, Misfit
from moevlm.runtime.core.printable import in_shell


def select(bundle: Bundle, target: str | None = None) -> tuple[str, EngineMetadata]:
    """The engine that `target` names, in full or up to a colon, and that runs here; the first of `preferred`.

    Without a target the first of all that run here. The GPU is looked for only where an engine needs one. Raises
    BundleError, saying what there is, if none fits.
    """
    engines = bundle.manifest.engines
    if not engines:
        adding = f"moevlm build {in_shell(bundle.directory)} --checkpoint CHECKPOINT"
        raise BundleError(f"{bundle.directory} has no engine yet ({adding} adds one)")
    names = list(engines) if target is None else bundle.matches(target)
    backends = Backends()
    fitting, misfits = _sorted(backends, engines, sorted(names))
    if fitting:
        name = preferred(engines, fitting)[0]
        return name, engines[name]
    others = preferred(engines, (name for name in engines if not engines[name].sms))
    hint = f" (use --target {others[0]})" if others else ""
    raise BundleError(
        f"no engine for this machine in {bundle.directory}: it has {_listed(misfits)}; {backends.machine}{hint}"
    )


def runnable(bundle: Bundle) -> tuple[list[str], str]:
    """All engines that run here, those on the CPU first, reference before what was lowered from it.

    And in one line the others and what they need; "" without others.
    """
    backends, engines = Backends(), bundle.manifest.engines
    fitting, misfits = _sorted(backends, engines, sorted(engines, reverse=True))
    fitting.sort(key=lambda name: bool(engines[name].sms))  # stable
    return fitting, f"{_listed(misfits)}; {backends.machine}" if misfits else ""


def _listed(misfits: Mapping[str, Misfit]) -> str:
    return ", ".join(f"{name} ({misfit.need})" for name, misfit in misfits.items())


def _sorted(
    backends: Backends, engines: Mapping[str, EngineMetadata], names: Iterable[str]
) -> tuple[list[str], dict[str, Misfit]]:
    """Of `names` those that run here, and why the others do not."""
    fitting, misfits = [], {}
    for name in names:
        if (misfit := backends.of(engines[name]).misfit(engines[name])) is None:
            fitting.append(name)
        else:
            misfits[name] = misfit
    return fitting, misfits
