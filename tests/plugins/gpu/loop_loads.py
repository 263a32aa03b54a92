"""Loads that wait for memory inside a loop, found in a kernel as Triton has compiled it: no GPU is needed."""

import re
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ir, make_backend

from moevlm.plugins.gpu.compile_worker import source
from moevlm.plugins.gpu.draft import KernelSpec

_LOOP = re.compile(r"(?:%\S+ = )?scf\.(?:for|while)\b")
_LOAD = re.compile(r"tt\.load .* : (tensor<.*>) loc\((#loc\d*)\)$")
_ALIAS = re.compile(r"(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'([^"/]+\.py)":(\d+)')


def waiting_loads(module: str, spec: KernelSpec, sm: int) -> list[str]:
    """The loads of tensors inside loops that are no asynchronous copies: their types and where they are in the source.

    A warp that meets one waits for memory in every turn of the loop, as nothing has been read ahead.
    """
    lines = lowered(module, spec, sm).splitlines()
    places = dict(alias.groups() for line in lines if (alias := _ALIAS.match(line)))
    found, loops = [], []  # loops: how far each that is open is indented
    for line in lines:
        text = line.lstrip()
        indent = len(line) - len(text)
        if loops and indent <= loops[-1] and text.startswith("}") and not text.startswith("} do"):
            loops.pop()
        if _LOOP.match(text):
            loops.append(indent)
        elif loops and (load := _LOAD.search(text)):
            found.append(f"{load[1]} at {_place(load[2], places)}")
    return found


def lowered(module: str, spec: KernelSpec, sm: int, stop: str = "ttgir") -> str:
    """The kernel in one of Triton's forms: "ttgir", the last with loops and loads, its pipelining done, or "ptx"."""
    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": spec.warps, "num_stages": spec.stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    kernel = source(module, spec)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    made = kernel.make_ir(target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, kernel.language)
    metadata: dict[str, Any] = {}
    for stage, lower in stages.items():
        made = lower(made, metadata)
        if stage == stop:
            break
    return str(made)


def _place(name: str, places: dict[str, str]) -> str:
    """file:line of a location: of a call's, that inside the function called."""
    while name in places:
        text = places[name]
        if file := _FILE.search(text):
            return f"{file[1]}:{file[2]}"
        inner = re.search(r"#loc\d*", text)
        name = inner[0] if inner else ""
    return "an unknown place"
