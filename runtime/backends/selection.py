"""Which engine of a bundle this machine runs: by GPU, product and version, and what there is where none fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moevlm.runtime.bundle.reader import Bundle, preferred
from moevlm.runtime.core.errors import BundleError, EngineError
from moevlm.runtime.core.gpus import gpu_text
from moevlm.runtime.core.manifest import EngineMetadata, TensorRTMetadata


def select(bundle: Bundle, target: str | None = None) -> tuple[str, EngineMetadata]:
    """The engine that `target` names, in full or up to a colon, and that runs here; the first of `preferred`.

    Without a target the first of all that run here. The GPU is looked for only where an engine needs one. Raises
    BundleError, saying what there is, if none fits.
    """
    engines = bundle.manifest.engines
    if not engines:
        where = bundle.directory
        raise BundleError(f"{where} has no engine yet (moevlm build {where} --checkpoint CHECKPOINT adds one)")
    names = list(engines) if target is None else bundle.matches(target)
    machine = _Machine()
    on_cpu, on_gpu, misfits = machine.sorted(engines, sorted(names))
    if fitting := preferred(engines, on_gpu + on_cpu):
        return fitting[0], engines[fitting[0]]
    others = preferred(engines, (name for name in engines if engines[name].tensorrt is None))
    hint = f" (use --target {others[0]})" if others else ""
    raise BundleError(
        f"no engine for this machine in {bundle.directory}: it has {_listed(misfits)}; {machine.has}{hint}"
    )


def runnable(bundle: Bundle) -> tuple[list[str], str]:
    """All engines that run here, those on the CPU first, reference before what was lowered from it.

    And in one line the others and what they need; "" without others.
    """
    machine, engines = _Machine(), bundle.manifest.engines
    on_cpu, on_gpu, misfits = machine.sorted(engines, sorted(engines, reverse=True))
    return on_cpu + on_gpu, f"{_listed(misfits)}; {machine.has}" if misfits else ""


def _listed(misfits: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in misfits.items())


class _Machine:
    """This machine's GPU, looked for once, when the first engine asks."""

    def __init__(self) -> None:
        self._sm: int | None = None
        self.has = ""

    def sorted(
        self, engines: Mapping[str, EngineMetadata], names: Iterable[str]
    ) -> tuple[list[str], list[str], dict[str, str]]:
        """Of `names` those on the CPU, those on a GPU that run here, and why the others do not."""
        on_cpu, on_gpu, misfits = [], [], {}
        for name in names:
            metadata = engines[name].tensorrt
            if metadata is None:
                on_cpu.append(name)
            elif reason := self._misfit(metadata):
                misfits[name] = reason
            else:
                on_gpu.append(name)
        return on_cpu, on_gpu, misfits

    def _misfit(self, metadata: TensorRTMetadata) -> str | None:
        """What the engine needs and this machine does not have; None if it runs here."""
        if not self.has:
            self._look()
        if self._sm not in metadata.sms:
            return f"needs {' or '.join(map(gpu_text, sorted(metadata.sms)))}"
        from moevlm.runtime.backends.tensorrt.library import find_module

        try:
            find_module(metadata)
        except EngineError as error:
            return str(error).removeprefix("the engine ")
        return None

    def _look(self) -> None:
        from moevlm.runtime.backends.tensorrt.cuda import find_gpu

        try:
            gpu = find_gpu()
        except EngineError as error:
            self.has = f"this machine has {error}"
        else:
            self._sm, self.has = gpu.sm, f"this machine has {gpu.name}, sm{gpu.sm}"
