"""From an op to its program: every kernel of its drafts, compiled ahead of time. No GPU is needed."""

import base64
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from moevlm.plugins.gpu.devices import device
from moevlm.plugins.gpu.draft import Draft, KernelSpec
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.program import Argument, Fill, Image, Kernel, Launch, Program, TensorMap, Variant
from moevlm.plugins.gpu.resources import Resources
from moevlm.runtime.core.progress import Stages, silent

KERNELS = "moevlm.plugins.gpu.kernels"
_MOST_WORKERS = 16
_SETTINGS = ("TRITON_CACHE_DIR", "TRITON_HOME")  # the environment's others of Triton would change the code
_Task = tuple[str, KernelSpec, int]


@dataclass(frozen=True)
class _Compiled:
    """maps: of each tensor map that the kernel takes, the block and the swizzle."""

    kernel: Kernel
    resources: Resources
    maps: tuple[tuple[tuple[int, ...], int], ...]


_done: dict[_Task, _Compiled] = {}


class CompileError(ValueError):
    """A kernel that the compiler refused, or that asks for what a program cannot give it."""


def compile_program(op: KernelOp, sms: Iterable[int], progress: Stages = silent) -> Program:
    """The program of an op, with an image for each of the `sms`. The same kernel is compiled once in a process.

    Raises ValueError for a GPU that is not compiled for or lacks the op's dtype, or where a kernel is over the GPU's
    limits; CompileError, a ValueError, if one does not compile.
    """
    return compile_drafts(_drafts(op, sms), progress=progress)


def resources(op: KernelOp, sms: Iterable[int], progress: Stages = silent) -> list[Resources]:
    """What each kernel of `compile_program(op, sms)` takes, in order; compiles those that are not compiled yet."""
    return [found.resources for found in _compile(_tasks(_drafts(op, sms), KERNELS), progress).values()]


def compile_drafts(drafts: Sequence[Draft], module: str = KERNELS, progress: Stages = silent) -> Program:
    """The program of one op's drafts, at least one, each for another GPU. module: where the kernels are.

    Raises as `compile_program` does.
    """
    first = drafts[0]
    for other in drafts:
        if (other.op, other.inputs, other.outputs) != (first.op, first.inputs, first.outputs):
            raise ValueError(f"the draft for SM{other.sm} is of another op than that for SM{first.sm}")
        gpu = device(other.sm)
        for tensor in (*other.inputs, *other.outputs):
            if tensor.dtype == "bfloat16" and not gpu.bf16:
                raise ValueError(f"{other.op}.{tensor.name} is bfloat16 on SM{gpu.sm} (allowed: float16, float32)")
    compiled = _compile(_tasks(drafts, module), progress)
    images = []
    for one in drafts:
        specs = tuple(dict.fromkeys(one.kernels))
        kernels = tuple(compiled[module, spec, one.sm] for spec in specs)
        place = tuple(specs.index(spec) for spec in one.kernels)
        variants = tuple(_finished(variant, kernels, place) for variant in one.variants)
        images.append(Image(one.sm, tuple(each.kernel for each in kernels), variants))
    return Program(first.op, first.inputs, first.outputs, tuple(images))


def _drafts(op: KernelOp, sms: Iterable[int]) -> list[Draft]:
    return [op.draft(device(sm).sm) for sm in sms]


def _tasks(drafts: Iterable[Draft], module: str) -> list[_Task]:
    return list(dict.fromkeys((module, spec, one.sm) for one in drafts for spec in one.kernels))


def _finished(variant: Variant, kernels: Sequence[_Compiled], place: Sequence[int]) -> Variant:
    """The variant with its launches naming compiled kernels, and an argument for each parameter that Triton added."""
    steps: list[Launch | Fill] = []
    maps: dict[int, TensorMap] = {}
    for step in variant.steps:
        if isinstance(step, Launch):
            compiled = kernels[place[step.kernel]]
            arguments: list[Argument] = []
            described = iter(compiled.maps)
            for argument in step.arguments:
                arguments.append(argument)
                if argument.kind == "tensor_map":
                    block, swizzle = next(described)
                    finished = replace(variant.maps[argument.index], block=block, swizzle=swizzle)
                    if maps.setdefault(argument.index, finished) != finished:
                        raise CompileError(f"{compiled.kernel.entry} takes tensor map {argument.index} in other blocks")
                    arguments += [Argument("null")] * 2 * len(block)  # its shape and strides, which are not read
            nulls = compiled.kernel.parameters - len(arguments)
            if nulls not in (0, 1, 2):
                raise CompileError(
                    f"{compiled.kernel.entry} has {compiled.kernel.parameters} parameters"
                    f" (its launch gives {len(arguments)}, and Triton adds up to 2)"
                )
            arguments += [Argument("null")] * nulls  # pointers to scratch memory
            step = replace(step, kernel=place[step.kernel], arguments=tuple(arguments))
        steps.append(step)
    return replace(variant, steps=tuple(steps), maps=tuple(maps[i] for i in range(len(variant.maps))))


def _compile(tasks: Sequence[_Task], progress: Stages) -> dict[_Task, _Compiled]:
    missing = [task for task in tasks if task not in _done]
    workers = min(len(os.sched_getaffinity(0)), len(missing), _MOST_WORKERS)
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(_Worker()))

        def run(task: _Task) -> _Compiled:
            worker = idle.get()
            try:
                return worker.compile(task)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(workers or 1) as pool:
            progress("compiling kernels", 0, len(missing))
            for number, (task, result) in enumerate(zip(missing, pool.map(run, missing), strict=True), 1):
                _done[task] = result
                progress("compiling kernels", number, len(missing))
    return {task: _done[task] for task in tasks}


class _Worker:
    """A process that compiles one kernel at a time."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TRITON_") or name in _SETTINGS
        }
        for name in ("PTXAS_OPTIONS", "DISABLE_PTXAS_OPT"):
            environment.pop(name, None)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moevlm.plugins.gpu.compile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def compile(self, task: _Task) -> _Compiled:
        _, spec, sm = task
        name = f"{spec.function} for {device(sm).arch}"
        reply = self._ask(task)
        if "error" in reply:
            raise CompileError(f"cannot compile {name}: {reply['error']}")
        found = Resources(**reply.pop("resources"))
        found.check()
        maps = tuple((tuple(each["block"]), each["swizzle"]) for each in reply.pop("maps"))
        return _Compiled(Kernel(**reply | {"image": base64.b64decode(reply["image"])}), found, maps)

    def _ask(self, task: _Task) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(base64.b64encode(pickle.dumps(task)).decode(), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:]
        return {"error": f"the compiler ended ({self._process.wait()}): {' '.join(last)}"}
