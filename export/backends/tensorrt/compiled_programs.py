"""The GPU programs of an engine's plugins."""

from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.progress import Stages


class CompiledPrograms:
    """Compiles each op once, for all GPUs of an engine."""

    def __init__(self, sms: tuple[int, ...], progress: Stages) -> None:
        self._sms, self._progress = sms, progress
        self._known: dict[KernelOp, bytes] = {}

    @property
    def ops(self) -> tuple[KernelOp, ...]:
        """All that were compiled."""
        return tuple(self._known)

    def of(self, op: KernelOp) -> bytes:
        """The program of an op. Raises BuildError for one that does not compile."""
        from moevlm.plugins.gpu.compiler import compile_program

        if op not in self._known:
            try:
                self._known[op] = compile_program(op, self._sms, self._progress).to_bytes()
            except ValueError as error:
                raise BuildError(
                    f"cannot compile {op.name} for {', '.join(f'sm{sm}' for sm in self._sms)}: {error}"
                ) from error
        return self._known[op]
