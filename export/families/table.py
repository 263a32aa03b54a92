"""All families as a table, for a terminal and for the README."""

from collections.abc import Iterator

from moevlm.export.families.base import families

HEADS = ("model_type", "checkpoints", "layers", "routing", "images")


def rows() -> Iterator[tuple[str, ...]]:
    """One for each family, by HEADS."""
    for model_type, family in families().items():
        about = family.about
        yield model_type, ", ".join(about.checkpoints), about.mixer, about.routing, about.vision


def markdown() -> str:
    """The table in Markdown, a line a family."""
    lines = [HEADS, tuple("---" for _ in HEADS), *((f"`{name}`", *others) for name, *others in rows())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
