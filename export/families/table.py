"""All families as a table, for a terminal and for the README."""

import json
from collections.abc import Iterator
from pathlib import Path

from moevlm.export.families.base import families

HEADS = ("model_type", "checkpoints", "layers", "routing", "images", "held to transformers")
_MEASURED = Path(__file__).with_name("measured.json")  # made by tests/measure_families.py


def rows() -> Iterator[tuple[str, ...]]:
    """One for each family, by HEADS."""
    measured = json.loads(_MEASURED.read_text())
    for model_type, family in families().items():
        about, found = family.about, measured.get(model_type)
        held = f"{found['configurations']} models, {found['difference']:.0e} apart" if found else "not yet"
        yield model_type, ", ".join(about.checkpoints), about.mixer, about.routing, about.vision, held


def targets() -> tuple[str, ...]:
    """That every family was built for, and passed parity on where they run without a GPU."""
    measured = json.loads(_MEASURED.read_text()).values()
    return tuple(name for name in next(iter(measured))["targets"] if all(name in one["targets"] for one in measured))


def markdown() -> str:
    """The table in Markdown, a line a family."""
    lines = [HEADS, tuple("---" for _ in HEADS), *((f"`{name}`", *others) for name, *others in rows())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
