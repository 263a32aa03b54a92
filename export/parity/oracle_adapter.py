"""A LoRA adapter in a model of transformers: what PEFT's merge_and_unload would leave, a part at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from moevlm.export.checkpoint.lora.adapter import Update
from moevlm.runtime.core.errors import CheckpointError, one_line


def merge_when_run(model: nn.Module, parts: Mapping[str, nn.Module], updates: Mapping[str, Sequence[Update]]) -> None:
    """Add updates to the weights of each part just before it runs, behind the hook that reads them.

    parts: of the model, by name. Raises CheckpointError for a module that the model does not have.
    """
    modules = dict(model.named_modules())
    for module in updates:
        if module not in modules:
            raise CheckpointError(f"transformers has no module {one_line(module, 80)}, which the adapter changes")
    for name, part in parts.items():
        own = {m: each for m, each in updates.items() if m == name or m.startswith(f"{name}.")}
        if own:
            part.register_forward_pre_hook(lambda _part, _inputs, own=own: _merge(modules, own))


def _merge(modules: Mapping[str, nn.Module], updates: Mapping[str, Sequence[Update]]) -> None:
    for module, each in updates.items():
        for update in each:
            a, b = (torch.from_numpy(part.rows(0, part.shape[0]).astype("float32")) for part in (update.a, update.b))
            changed = [p for p in modules[module].parameters(recurse=False) if _fits(p, update)]
            if len(changed) != 1:
                raise CheckpointError(
                    f"the adapter's {one_line(module, 80)} is for {list(update.shape)}, which {len(changed)} of its "
                    "weights have (allowed: one)"
                )
            if update.experts == 1:
                change = b @ a
            else:  # as peft.tuners.lora.layer.ParamWrapper.get_delta_weight
                by_expert = a.reshape(update.experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, update.experts)
                change = torch.einsum("ore,eri->eoi", by_expert[1], by_expert[0])
            weight = changed[0]
            turned = change.shape != weight.shape
            if change.shape == weight.shape == change.mT.shape:  # square: the module knows its experts' layout
                turned = update.experts > 1 and getattr(modules[module], "is_transposed", False)
            weight.data += update.scale * (change.mT if turned else change)


def _fits(parameter: nn.Parameter, update: Update) -> bool:
    out, width = update.shape
    if update.experts == 1:
        return tuple(parameter.shape) == (out, width)
    return tuple(parameter.shape) in ((update.experts, out, width), (update.experts, width, out))
