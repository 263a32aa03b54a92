"""Prints what the real tensorrt_rtx has of what the fake offers, one problem a line. Run in a process of its own:
whoever builds engines must decide how the real module is loaded.
"""

import enum
import inspect
import re

import tensorrt_rtx as real

from tests.support.fakes.cuda_driver import Driver
from tests.support.fakes.tensorrt_runtime import fake_module


def parameters(function: object) -> list[set[str]]:
    """Names of the parameters of each overload, as the bindings document them."""
    found = re.findall(r"^(?:\d+\. )?\w+\((self: .*)\) ->", getattr(function, "__doc__", None) or "", re.MULTILINE)
    return [set(re.findall(r"(\w+): ", text)) for text in found]


def problems() -> list[str]:
    found = []
    fake = fake_module(Driver())
    for name, value in vars(fake).items():
        if name.startswith("__") or name in ("state", "alive"):
            continue
        if not hasattr(real, name):
            found.append(f"{name} is not there")
        elif isinstance(value, enum.EnumMeta):
            members = getattr(real, name).__members__
            found += [f"{name}.{m.name}" for m in value if m.name not in members]
            if issubclass(value, enum.IntEnum):
                found += [f"{name}.{m.name} = {m.value}" for m in value if members[m.name].value != m.value]
        elif isinstance(value, type):
            own = set(re.findall(r"self\.([a-z]\w*) = ", inspect.getsource(value)))
            found += [
                f"{name}.{attribute} is not there" for attribute in own if not hasattr(getattr(real, name), attribute)
            ]
            for attribute, function in vars(value).items():
                if attribute.startswith("_"):
                    continue
                there = getattr(getattr(real, name), attribute, None)
                if there is None:
                    found.append(f"{name}.{attribute} is not there")
                elif inspect.isfunction(function) and (known := parameters(there)):
                    wanted = set(inspect.signature(function).parameters)
                    if not any(wanted <= names for names in known):
                        found.append(f"{name}.{attribute}{sorted(wanted)} is not among {known}")
    return found


if __name__ == "__main__":
    print(*problems(), sep="\n")
    print(real.__version__)
