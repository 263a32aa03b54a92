"""Compiles kernels for the process that started it: requests on its standard input, replies on its output, a line each.

Its own process, so that Triton's settings, and a crash of a compiler that is native code, stay in it.
"""

import base64
import importlib
import json
import os
import pickle
import re
import sys
from dataclasses import asdict
from typing import Any

from triton import JITFunction, knobs
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moevlm.plugins.gpu.constants import as_constants
from moevlm.plugins.gpu.draft import KernelSpec
from moevlm.plugins.gpu.resources import measure

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)", re.DOTALL)
_THREADS = re.compile(r"\.reqntid\s+(\d+)")
_DESCRIPTOR = re.compile(r"tensordesc<\w+\[[\d, ]+\]>")
_CLUSTER = re.compile(r"\.(reqnctapercluster|explicitcluster|maxclusterrank)")


def source(module: str, spec: KernelSpec) -> ASTSource:
    """The kernel as Triton's compiler takes it: parameters typed, pointers aligned to 16 bytes."""
    function: JITFunction = getattr(importlib.import_module(module), spec.function)
    names, constants = function.arg_names, as_constants(dict(spec.constants))
    given = (*names[: len(spec.types)], *constants)
    if sorted(given) != sorted(names):
        raise ValueError(f"{spec.function} is specialised to {', '.join(given)} (its parameters: {', '.join(names)})")
    signature = {name: "constexpr" for name in names} | dict(zip(names, spec.types, strict=False))
    return ASTSource(
        function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(spec.types) if kind.startswith("*")},
    )


def compile_kernel(module: str, spec: KernelSpec, sm: int) -> dict[str, Any]:
    """A reply: the fields of a Kernel (`image` in base64), its `resources`, and its `maps`, see `tensor_maps`."""
    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    compiled = triton_compile(source(module, spec), target=GPUTarget("cuda", sm, 32), options=options)
    metadata, ptx, image = compiled.metadata, compiled.asm["ptx"], compiled.asm["cubin"]
    entry = _ENTRY.search(ptx)
    threads = _THREADS.search(ptx)
    if entry is None or threads is None:
        raise ValueError("no entry point, or none with a fixed number of threads, in its PTX")
    # A program has no place for scratch memory nor for clusters of blocks: nothing of that may be asked for.
    for field in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, field, 0):
            raise ValueError(f"{field} = {getattr(metadata, field)} (allowed: 0)")
    if metadata.num_ctas != 1 or _CLUSTER.search(ptx):
        raise ValueError(f"clusters of {metadata.num_ctas} blocks (allowed: 1)")
    warps = int(threads[1]) // 32
    shared, columns = int(metadata.shared), int(getattr(metadata, "tmem_size", 0) or 0)
    resources = measure(image, entry[1], sm, warps, shared, columns, knobs.nvidia.cuobjdump.path)
    return {
        "entry": entry[1],
        "warps": warps,
        "shared": shared,
        "parameters": entry[2].count(".param"),
        "image": base64.b64encode(image).decode(),
        "resources": asdict(resources),
        "maps": tensor_maps(spec, metadata, ptx, entry[1]),
    }


def tensor_maps(spec: KernelSpec, metadata: Any, ptx: str, entry: str) -> list[dict[str, Any]]:
    """How the kernel takes each tensor map: elements of a block, and bytes of the swizzle.

    After each come the array's shape and strides as parameters, which are of no use beside the map: a program passes
    zeros. Raises ValueError for a kernel that reads them.
    """
    given = [kind for kind in spec.types if _DESCRIPTOR.fullmatch(kind)]
    described = metadata.tensordesc_meta or []
    if len(described) != len(given):
        raise ValueError(f"{len(given)} tensor maps on SM{metadata.target.arch} (allowed: from SM90 on)")
    place = 0
    for kind in spec.types:
        if kind in given:
            unread = 2 * (kind.count(",") + 1)
            for number in range(place + 1, place + 1 + unread):
                if len(re.findall(rf"\b{entry}_param_{number}\b", ptx)) > 1:
                    raise ValueError(f"parameter {number} is read (allowed: of {kind}, its map alone)")
            place += unread
        place += 1
    swizzles = (0, 32, 64, 128)
    return [{"block": list(each["block_size"]), "swizzle": swizzles[each["swizzle"]]} for each in described]


def reason(error: BaseException) -> str:
    """In one line, what went wrong first: Triton wraps an error in one more for each function that was being called."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    return " ".join(text.split())[:500] or type(error).__name__


def serve() -> None:
    """Answer requests until the input ends."""
    # Triton prints to standard output when ptxas fails; that is where the replies go.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    knobs.compilation.disable_line_info = True  # two thirds of a cubin
    for line in sys.stdin:
        module, spec, sm = pickle.loads(base64.b64decode(line))
        try:
            reply = compile_kernel(module, spec, sm)
        except Exception as error:  # whatever it is, the other side reports it and goes on
            reply = {"error": reason(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
