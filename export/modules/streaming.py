"""A module on the meta device whose parts are in memory only while they run."""

from collections.abc import Callable, Mapping

import torch
from torch import nn


def parts_of(root: nn.Module, containers: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """The largest modules in `root` that are no containers, by name; those without saved tensors are left out."""
    found: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, containers):
                visit(f"{prefix}{name}.", child)
            elif child.state_dict():
                found[prefix + name] = child

    visit("", root)
    return found


def stream(parts: Mapping[str, nn.Module], load: Callable[[str], None]) -> None:
    """Call `load(name)` before a part runs, from now on, to set its tensors; release them after it."""
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda _part, _arguments, name=name: load(name))
        part.register_forward_hook(lambda part, _arguments, _output: release(part))


def release(module: nn.Module) -> None:
    """Let go of all tensors that a checkpoint holds, those that were computed stay."""
    for name, tensor in module.state_dict().items():
        set_tensor(module, name, torch.empty_like(tensor, device="meta"))


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in place of the parameter or buffer of that (dotted) name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in dict(owner.named_parameters(recurse=False))
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
