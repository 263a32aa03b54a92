"""What an op with kernels for GPUs is."""

from typing import Any, ClassVar, Protocol

from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.sizes import Tensor


class KernelOp(Protocol):
    """A frozen dataclass: all that the op's kernels are specialised to, and hashable, so that each is compiled once.

    name: of its plugin, one of `moevlm.runtime.core.names.PLUGINS`.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> tuple[Tensor, ...]: ...
    @property
    def outputs(self) -> tuple[Tensor, ...]: ...

    def draft(self, sm: int) -> Draft:
        """Everything that the op needs on GPUs of compute capability sm / 10. Raises ValueError for one it lacks."""
        ...
