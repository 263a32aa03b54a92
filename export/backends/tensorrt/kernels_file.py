"""kernels.json beside the plans: what each compiled kernel takes of its GPU."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from moevlm.plugins.gpu.ops.base import KernelOp

_TILE = ("BM", "BN", "BK")


def kernels_json(ops: Iterable[KernelOp], sms: Iterable[int]) -> bytes:
    """Of ops that were compiled in this process, whose kernels are not compiled again."""
    sms = tuple(sms)
    return json.dumps([_entry(op, sms) for op in ops], indent=1).encode()


def _entry(op: KernelOp, sms: tuple[int, ...]) -> dict[str, Any]:
    from moevlm.plugins.gpu.compiler import resources

    specs = dict.fromkeys((spec, sm) for sm in sms for spec in op.draft(sm).kernels)
    kernels = []
    for (spec, sm), taken in zip(specs, resources(op, sms), strict=True):
        constants = dict(spec.constants)
        if "TILE" in constants:
            constants |= vars(constants["TILE"])
        tile = {side: constants[side] for side in _TILE if side in constants}
        found = {"sm": sm, "kernel": spec.function, "warps": taken.warps, "stages": spec.stages, "tile": tile}
        kernels.append(found | {name: getattr(taken, name) for name in ("registers", "spilled", "shared")})
    return {"op": op.name, "attributes": asdict(op), "kernels": kernels}
