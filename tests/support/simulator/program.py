"""Kernels that are not compiled: in the place of an image stands what Triton's interpreter needs to run one."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable

from moevlm.plugins.gpu import compiler
from moevlm.plugins.gpu.draft import KernelSpec
from moevlm.plugins.gpu.program import Kernel
from moevlm.plugins.gpu.resources import Resources
from moevlm.runtime.core.progress import Stages
from tests.plugins.tensorrt.fake_cuda import image

Task = tuple[str, KernelSpec, int]  # as the compiler has them: module, kernel, sm


def kernel_of(spec: KernelSpec) -> Kernel:
    """For the recording driver: the entry's name says which kernel it is."""
    entry = base64.urlsafe_b64encode(pickle.dumps(spec)).decode()
    # Triton appends two pointers to every kernel.
    types = (*spec.types, "*i8", "*i8")
    return Kernel(entry, spec.warps, 0, len(types), image(entry, types))


def spec_of(entry: str) -> KernelSpec:
    """The kernel that an entry's name says."""
    spec = pickle.loads(base64.urlsafe_b64decode(entry))
    assert isinstance(spec, KernelSpec)
    return spec


def compile_nothing(tasks: Iterable[Task], progress: Stages) -> dict[Task, compiler._Compiled]:
    """In the place of `compiler._compile`; no kernel takes a tensor map, as before SM 9.0."""
    tasks = tuple(tasks)
    progress("compiling kernels", len(tasks), len(tasks))
    return {task: compiler._Compiled(kernel_of(task[1]), _resources(task), ()) for task in tasks}


def _resources(task: Task) -> Resources:
    """As of a kernel that takes little of a GPU."""
    _, spec, sm = task
    return Resources(spec.function, sm, spec.warps, registers=32, spilled=0, shared=0, columns=0, image=0)
