"""What people are told of each family: in `moevlm families`, and in the README's table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """checkpoints: published ones. The others in a few words: how tokens see each other, routing, images."""

    checkpoints: tuple[str, ...]
    mixer: str
    routing: str
    vision: str
