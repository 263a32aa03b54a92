"""What the parts found, as tables and as a file."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
# What is aimed at on a GPU of the H100's class.
DECODE_TOKENS, DECODE_FRACTION = 1, 0.85
PREFILL_TOKENS, PREFILL_FRACTION = 4096, 0.60
ATTENTION_TOKENS, ATTENTION_FRACTION = 1 << 18, 0.75  # tokens of all sequences, where ramp and tail hardly count
ATTENTION_PREFILL, ATTENTION_PREFILL_FRACTION = 8192, 0.50


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table under its title; all columns but the first are aligned on the right. Without rows: nothing."""
    lines = [list(columns), *map(list, rows)]
    if len(lines) == 1:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    texts = [
        "  ".join(cell.rjust(widths[i]) if i else cell.ljust(widths[i]) for i, cell in enumerate(line))
        for line in lines
    ]
    return "\n".join([title, *(text.rstrip() for text in texts)])


def _number(entry: Entry, name: str, form: Callable[[float], str]) -> str:
    value = entry.get(name)
    return "-" if value is None else form(value)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _speedup(entry: Entry) -> float | None:
    """How many times as fast as grouped_mm."""
    peer = entry.get("peer_experts_seconds")
    return peer / entry["experts_seconds"] if peer and "experts_seconds" in entry else None


def layer_tables(entries: Sequence[Entry]) -> list[str]:
    """A table per layer and format of weights, then what was left out."""
    texts = []
    measured = [entry for entry in entries if entry["kind"] == "layer" and "experts_seconds" in entry]
    for layer, weights in dict.fromkeys((entry["layer"], entry["weights"]) for entry in measured):
        rows = []
        for entry in measured:
            if (entry["layer"], entry["weights"]) != (layer, weights):
                continue
            speedup = _speedup(entry)
            rows.append(
                (
                    str(entry["tokens"]),
                    f"{entry['active']:.0f}",
                    _microseconds(entry["experts_seconds"]),
                    _percent(entry["of_bandwidth"]),
                    _percent(entry["of_peak"]),
                    _number(entry, "peer_experts_seconds", _microseconds),
                    "-" if speedup is None else f"{speedup:.2f} x",
                    _microseconds(entry["router_seconds"]),
                    _number(entry, "peer_router_seconds", _microseconds),
                )
            )
        columns = ("tokens", "active", "us", "of bandwidth", "of peak", "grouped_mm us", "faster", "router us")
        texts.append(table(f"{layer}, weights {weights}", (*columns, "torch router us"), rows))
    skipped = [entry for entry in entries if entry["kind"] == "layer" and "skipped" in entry]
    return texts + [f"{entry['layer']}, weights {entry['weights']}: {entry['skipped']}" for entry in skipped]


def attention_tables(entries: Sequence[Entry]) -> list[str]:
    """A table per model and dtype of caches, then what was left out."""
    texts = []
    measured = [entry for entry in entries if entry["kind"] == "attention" and "seconds" in entry]
    for model, cache in dict.fromkeys((entry["model"], entry["cache"]) for entry in measured):
        rows = [
            (
                str(entry["sequences"]),
                str(entry["past"]),
                str(entry["tokens"]),
                _microseconds(entry["seconds"]),
                _percent(entry["of_bandwidth"]),
                _percent(entry["of_peak"]),
                _number(entry, "peer_seconds", _microseconds),
                entry.get("peer", "-"),
                f"{entry['peer_seconds'] / entry['seconds']:.2f} x" if "peer_seconds" in entry else "-",
            )
            for entry in sorted(measured, key=lambda entry: (entry["tokens"], entry["sequences"], entry["past"]))
            if (entry["model"], entry["cache"]) == (model, cache)
        ]
        columns = ("sequences", "past", "new tokens", "us", "of bandwidth", "of peak", "torch us", "its best", "faster")
        texts.append(table(f"attention of {model}, caches {cache}", columns, rows))
    skipped = [entry for entry in entries if entry["kind"] == "attention" and "skipped" in entry]
    return texts + [
        f"attention of {entry['model']}, {entry['sequences']} sequences with {entry['past']} tokens: {entry['skipped']}"
        for entry in skipped
    ]


def host_experts_tables(entries: Sequence[Entry]) -> list[str]:
    """The link, and a table per format of weights."""
    texts = [
        f"link: {entry['bytes_per_second'] / 1e9:.1f} GB/s from the host's memory"
        for entry in entries
        if entry["kind"] == "link"
    ]
    measured = [entry for entry in entries if entry["kind"] == "host_experts" and "seconds" in entry]
    for layer, weights in dict.fromkeys((entry["layer"], entry["weights"]) for entry in measured):
        rows = [
            (
                str(entry["tokens"]),
                _microseconds(entry["seconds"]),
                _percent(entry["of_link"]),
                _microseconds(entry["device_seconds"]),
            )
            for entry in measured
            if (entry["layer"], entry["weights"]) == (layer, weights)
        ]
        columns = ("tokens", "us", "of the link", "us on the device")
        texts.append(table(f"{layer}, weights {weights} in the host's memory", columns, rows))
    return texts


def vision_table(entries: Sequence[Entry]) -> str:
    """A row per call and implementation."""
    rows = [
        (
            entry["images"],
            entry["by"],
            _number(entry, "seconds", _microseconds),
            _number(entry, "of_peak", _percent),
            entry.get("skipped", ""),
        )
        for entry in entries
        if entry["kind"] == "vision" and "by" in entry
    ]
    return table("attention among patches", ("images", "by", "us", "of peak", ""), rows)


def delta_table(entries: Sequence[Entry]) -> str:
    """A row per step."""
    rows = [
        (
            " + ".join(
                (f"{entry['decoded']} decoded",) * (entry["decoded"] > 0)
                + (f"{entry['prompts']} x {entry['tokens']}",) * (entry["prompts"] > 0)
            ),
            _microseconds(entry["seconds"]),
            _percent(entry["of_bandwidth"]),
            _percent(entry["of_peak"]),
        )
        for entry in entries
        if entry["kind"] == "delta" and "seconds" in entry and "error" not in entry
    ]
    return table("gated delta rule, a layer of Qwen3.5-35B-A3B", ("step", "us", "of bandwidth", "of peak"), rows)


def candidates_table(entries: Sequence[Entry]) -> str:
    """A row per number of rows and kind of logits."""
    rows = [
        (
            f"{entry['rows']} of {entry['logits']}",
            _microseconds(entry["seconds"]),
            _percent(entry["of_bandwidth"]),
            _microseconds(entry["peer_seconds"]),
        )
        for entry in _candidates(entries)
    ]
    return table("candidates", ("rows", "us", "of bandwidth", "topk and logsumexp us"), rows)


def _candidates(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry["kind"] == "candidates" and "rows" in entry]


def _vision_speedups(entries: Sequence[Entry]) -> list[float]:
    """How many times as fast as the best of PyTorch's."""
    measured = [entry for entry in entries if entry["kind"] == "vision" and "seconds" in entry]
    ours = {entry["images"]: entry["seconds"] for entry in measured if entry["by"] == "ours"}
    peers = [entry for entry in measured if entry["by"] != "ours" and entry["images"] in ours]
    return [entry["seconds"] / ours[entry["images"]] for entry in peers]


def correctness_table(entries: Sequence[Entry]) -> str:
    """How many ops each part ran, the worst against what is allowed, and how many were wrong."""
    titles = {"check": "kernels against the spec", "cubins": "machine code against Triton", "plugin": "plugin library"}
    rows = []
    for kind, title in titles.items():
        mine = [entry for entry in entries if entry["kind"] == kind and "op" in entry]
        if not mine:
            continue
        ratios = [entry["worst"] / entry["allowed"] for entry in mine if "worst" in entry]
        worst = f"{max(ratios):.2g}" if ratios else "-"
        rows.append((title, str(len(mine)), worst, str(sum("error" in entry for entry in mine))))
    return table("correctness", ("part", "ops", "worst / allowed", "wrong"), rows)


def aims(entries: Sequence[Entry]) -> list[Entry]:
    """Each aim with what was reached; none that was not measured."""
    measured = [entry for entry in entries if entry["kind"] == "layer" and "experts_seconds" in entry]
    own = [entry for entry in measured if entry["weights"] in ("float16", "bfloat16")]
    decode = [entry["of_bandwidth"] for entry in own if entry["tokens"] == DECODE_TOKENS]
    prefill = [entry["of_peak"] for entry in own if entry["tokens"] == PREFILL_TOKENS]
    attention = [entry for entry in entries if entry["kind"] == "attention" and "seconds" in entry]
    many = [e for e in attention if e["tokens"] == 1 and e["sequences"] * e["past"] >= ATTENTION_TOKENS]
    long = [entry for entry in attention if entry["tokens"] >= ATTENTION_PREFILL]
    faster = [entry["peer_seconds"] / entry["seconds"] for entry in attention if "peer_seconds" in entry]
    found = []
    for what, aim, values in (
        (f"{DECODE_TOKENS} token: of the bandwidth, least of the layers", DECODE_FRACTION, decode),
        (f"{PREFILL_TOKENS} tokens: of the peak, least of the layers", PREFILL_FRACTION, prefill),
        ("times as fast as grouped_mm, least of all", 1.0, [value for value in map(_speedup, own) if value]),
        ("patches: times as fast as PyTorch's best, least of all", 1.0, _vision_speedups(entries)),
        (
            "candidates: times as fast as topk and logsumexp, least of all",
            1.0,
            [entry["peer_seconds"] / entry["seconds"] for entry in _candidates(entries)],
        ),
        ("attention, decode over many tokens: of the bandwidth", ATTENTION_FRACTION, [e["of_bandwidth"] for e in many]),
        ("attention, long prefill: of the peak", ATTENTION_PREFILL_FRACTION, [e["of_peak"] for e in long]),
        ("times as fast as PyTorch's best attention, least of all", 1.0, faster),
    ):
        if values:
            found.append({"aim": what, "at_least": aim, "reached": min(values), "met": min(values) >= aim})
    return found


def tiles_text(entries: Sequence[Entry]) -> str:
    """The best tiles found, as `plugins/gpu/tiles.json` has them."""
    return "\n".join(
        f"{entry['family']}: {json.dumps(entry['table'])}" for entry in entries if entry["kind"] == "tiles"
    )


def failures(entries: Sequence[Entry]) -> list[str]:
    """A line for each entry that went wrong."""
    named = ("op", "layer", "model", "weights", "cache", "sequences", "past", "tokens", "target")
    named += ("images", "by", "rows", "logits")
    return [
        f"{entry['kind']}: {' '.join(str(entry[name]) for name in named if name in entry)}: {entry['error']}"
        for entry in entries
        if "error" in entry
    ]


def text_of(entries: Sequence[Entry]) -> str:
    """Everything that a reader wants to see."""
    parts = []
    if (limits := next((entry for entry in entries if entry["kind"] == "limits"), None)) is not None:
        bandwidth, peak = limits["bandwidth"] / 1e12, limits["peak"] / 1e12
        parts.append(f"limits: {bandwidth:.2f} TB/s copied, {peak:.0f} TFLOP/s in a large product")
    left_out = [entry for entry in entries if entry["kind"] in ("cubins", "plugin") and "skipped" in entry]
    parts += [f"{entry['kind']}: stopped {entry['stopped']}" for entry in entries if "stopped" in entry]
    parts += [correctness_table(entries), *(f"{entry['kind']}: {entry['skipped']}" for entry in left_out)]
    parts += [*attention_tables(entries), *layer_tables(entries), *host_experts_tables(entries)]
    parts += [vision_table(entries), delta_table(entries), candidates_table(entries), tiles_text(entries)]
    for entry in entries:
        if entry["kind"] == "engine":
            told = entry.get("skipped") or entry.get("error") or _engine_text(entry)
            parts.append(f"engine {entry['target']}: {told}")
    rows = [
        (aim["aim"], f"{aim['at_least']:.2f}", f"{aim['reached']:.2f}", "yes" if aim["met"] else "no")
        for aim in aims(entries)
    ]
    parts.append(table("aims", ("aim", "at least", "reached", "met"), rows))
    wrong = failures(entries)
    parts.append("\n".join([f"{len(wrong)} failures", *wrong]) if wrong else "no failures")
    return "\n\n".join(part for part in parts if part)


def _engine_text(entry: Entry) -> str:
    alone, together = (1 / entry[f"{name}seconds_per_token"] for name in ("", "together_"))
    return (
        f"{entry['same']} of {entry['answers']} answers the same, {entry['same_together']} at once; "
        f"{alone:.0f} and {together:.0f} tokens/s"
    )


def file_name(gpu: str) -> str:
    """For the results of a GPU: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def earlier(path: Path, parts: Sequence[str]) -> list[Entry]:
    """What a file of results has of other parts than these."""
    if not path.exists():
        return []
    return [entry for entry in json.loads(path.read_text())["results"] if entry.get("part") not in (None, *parts)]


def write(path: Path, facts: Entry, entries: Sequence[Entry]) -> None:
    """The whole as one JSON file."""
    report = {"machine": facts, "aims": aims(entries), "failures": failures(entries), "results": list(entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    new.replace(path)


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
