"""NVIDIA's GPUs by kind: what people call them, and the compute capability that plans and kernels are built for.

Source: NVIDIA's list of CUDA GPUs, developer.nvidia.com/cuda-gpus. sm: 89 for compute capability 8.9.
"""

import re
from collections.abc import Iterable

# Names as users type them, without the maker, a series' prefix, and endings that change nothing (Ti, Super).
NAMES: dict[int, tuple[str, ...]] = {
    75: ("T4", "RTX 20", "GTX 16", "Quadro RTX"),
    80: ("A100", "A30"),
    86: ("RTX 30", "A10", "A40", "RTX A6000"),
    87: ("Jetson Orin",),
    89: ("RTX 40", "L4", "L40S", "RTX 6000 Ada"),
    90: ("H100", "H200", "GH200"),
    100: ("B100", "B200", "GB200"),
    103: ("B300", "GB300"),
    110: ("Jetson Thor",),
    120: ("RTX 50", "RTX PRO 6000"),
    121: ("GB10", "DGX Spark"),
}
_OTHERS = {86: ("A2", "A16", "A10G"), 87: ("AGX Orin",), 89: ("L40",), 110: ("AGX Thor",)}
_PREFIXES = ("nvidia", "geforce", "rtx", "gtx", "quadro", "jetson")
_ENDINGS = ("ti", "super", "laptop", "d")


def gpu_text(sm: int) -> str:
    """sm89 (RTX 40, L4, L40S, RTX 6000 Ada); sm and number alone where no name is known."""
    return f"sm{sm} ({', '.join(NAMES[sm])})" if sm in NAMES else f"sm{sm}"


def sms_text(sms: Iterable[int], between: str = ", ") -> str:
    """sm86, sm89 for (89, 86); "none" for none."""
    return between.join(f"sm{sm}" for sm in sorted(sms)) or "none"


def sm_of(name: str) -> int | None:
    """The kind that a name means: sm89, sm_89, 8.9, 89, RTX 4090, 4090, l40s; None for one that is not known."""
    plain = re.sub(r"[\s_-]", "", name.lower())
    if match := re.fullmatch(r"(?:sm)?(\d{2,3})", plain.replace(".", "")):
        return int(match[1])
    for prefix in _PREFIXES:
        plain = plain.removeprefix(prefix)
    for ending in _ENDINGS * 2:  # Ti Super, in either order
        plain = plain.removesuffix(ending)
    if match := re.fullmatch(r"(16|20|30|40|50)\d0", plain):  # GeForce by its series
        return {"16": 75, "20": 75, "30": 86, "40": 89, "50": 120}[match[1]]
    return next((sm for sm, names in _known().items() if plain in names), None)


def _known() -> dict[int, set[str]]:
    known: dict[int, set[str]] = {}
    for sm, names in NAMES.items():
        spelled = {re.sub(r"\s", "", name.lower()) for name in (*names, *_OTHERS.get(sm, ()))}
        for prefix in _PREFIXES:
            spelled = {name.removeprefix(prefix) for name in spelled}
        known[sm] = {name for name in spelled if not name.isdigit()} - {""}
    return known
