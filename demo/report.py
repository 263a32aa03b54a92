"""The loss curve: averaged for JSON, drawn as PNG."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = ("answer", "cell", "balance")


def mean_of(points: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each loss over the points that have it."""
    out = {}
    for name in NAMES:
        values = [point[name] for point in points if name in point]
        if values:
            out[name] = sum(values) / len(values)
    return out


def thin(curve: list[dict[str, float]], points: int = 150) -> list[dict[str, float]]:
    """At most about `points` averages over equal stretches of the curve."""
    width = max(1, len(curve) // points)
    parts = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [{"step": part[-1]["step"], **{k: round(v, 4) for k, v in mean_of(part).items()}} for part in parts]


def write(metadata: dict, path: Path) -> None:
    """JSON with one line per fact."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in metadata.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def plot(curve: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = thin(curve)
    figure, (losses, balance) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
    for axes, names in ((losses, ("answer", "cell")), (balance, ("balance",))):
        for name in names:
            seen = [point for point in points if name in point]
            axes.plot([p["step"] for p in seen], [p[name] for p in seen], label=name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set_yscale("log")
    losses.set_title("loss")
    balance.set_title("expert balance (4 = even)")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
