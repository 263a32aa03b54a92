"""Attention on the CPU as models have it, against the multiply-adds and the memory that the machine has.

    python -m bench.cpu_attention [--repeats 10] [--threads 1] [--json bench/results/cpu_attention.json]

The operator alone, in ONNX Runtime, on an int8 cache of 64-token pages: one token, and a prompt, each after some
history. Calls of all models take turns; the median counts.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import msgspec
import numpy as np
from onnx import TensorProto, helper

from bench import machine
from moevlm.plugins.ops.spec import AttentionSpec, attributes
from moevlm.runtime.backends.libraries import DOMAIN, operators_path
from moevlm.runtime.backends.ort.library import onnxruntime
from moevlm.runtime.cli.console import publish, table
from moevlm.runtime.core.states import PAGE_SIZE, SCALE_BYTES
from moevlm.runtime.perf.machine import measure_machine

INPUTS = ("qkv", "cos", "sin", "key_cache", "value_cache", "query_start", "context_len", "page_table")


@dataclass(frozen=True)
class Call:
    """`tokens` of one sequence after `past` others. latent: of the key's dimensions, those that are the value, or 0."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    past: int
    tokens: int
    window: int = 0
    latent: int = 0

    @property
    def spec(self) -> AttentionSpec:
        if not self.latent:
            return AttentionSpec(self.heads, self.kv_heads, self.head_dim, window=self.window)
        turned = self.head_dim - self.latent
        return AttentionSpec(
            self.heads, self.kv_heads, turned, rotary_start=self.latent, value_in_key=True, value_dim=self.latent
        )

    @property
    def caches(self) -> tuple[str, ...]:
        return ("key_cache",) if self.latent else ("key_cache", "value_cache")

    @property
    def multiply_adds(self) -> int:
        """Of both products, for what each query sees."""
        seen = [min(self.past + i + 1, self.window or self.past + i + 1) for i in range(self.tokens)]
        return sum(seen) * self.heads * (self.head_dim + (self.latent or self.head_dim))

    @property
    def cache_bytes(self) -> int:
        """Of the caches that the queries see, once."""
        seen = min(self.past + self.tokens, self.window + self.tokens if self.window else self.past + self.tokens)
        return seen * self.kv_heads * (self.head_dim + SCALE_BYTES) * len(self.caches)


MODELS = (
    ("Qwen3-VL-30B-A3B", 32, 4, 128, 0),
    ("Qwen3.5-35B-A3B", 16, 2, 256, 0),
    ("Gemma-4-26B-A4B, window", 16, 8, 256, 1024),
    ("Gemma-4-26B-A4B, full", 16, 2, 512, 0),
)
LATENT_MODELS = (("Mistral-Small-4", 32, 320, 256), ("Kimi-K2.5", 64, 576, 512), ("DeepSeek-V3", 128, 576, 512))
CALLS = (
    *(
        Call(name, heads, kv_heads, dim, past, tokens, window)
        for past, tokens in ((4096, 1), (0, 512))
        for name, heads, kv_heads, dim, window in MODELS
    ),
    *(
        Call(name, heads, 1, dim, past, tokens, latent=latent)
        for past, tokens in ((4096, 1), (0, 256))
        for name, heads, dim, latent in LATENT_MODELS
    ),
)


def prepare(call: Call, threads: int) -> Callable[[], float]:
    """The call, which returns its seconds, on caches that hold its history."""
    session = _session(call, threads)
    pages = -(-(call.past + call.tokens) // PAGE_SIZE)
    shape = (pages + 1, call.kv_heads, PAGE_SIZE, call.head_dim + SCALE_BYTES)
    caches = {name: onnxruntime().OrtValue.ortvalue_from_numpy(np.zeros(shape, np.int8)) for name in call.caches}
    table_of = np.arange(1, pages + 1, dtype=np.int32)[None]
    if call.past:
        _bound(session, call, caches, table_of, 0, call.past)()
    return _bound(session, call, caches, table_of, call.past, call.tokens)


def _session(call: Call, threads: int) -> Any:
    kinds = {"qkv": TensorProto.FLOAT, "cos": TensorProto.FLOAT, "sin": TensorProto.FLOAT, "y": TensorProto.FLOAT}
    inputs = ["" if name == "value_cache" and call.latent else name for name in INPUTS]
    outputs = ("y", *(f"{name}_out" for name in call.caches))

    def described(name: str) -> Any:
        kind = TensorProto.INT8 if "_cache" in name else kinds.get(name, TensorProto.INT32)
        rank = 4 if "_cache" in name else 1 if name in ("query_start", "context_len") else 2
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    node = helper.make_node("PagedAttention", inputs, outputs, domain=DOMAIN, **attributes(call.spec))
    given = [described(name) for name in inputs if name]
    graph = helper.make_graph([node], "attention", given, [*map(described, outputs)])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(operators_path()))
    return onnxruntime().InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(
    session: Any,
    call: Call,
    caches: dict[str, Any],
    page_table: np.ndarray,
    past: int,
    tokens: int,
) -> Callable[[], float]:
    random = np.random.default_rng(0)
    angle = random.uniform(0, 6, (tokens, call.spec.rotary_dim // 2)).astype(np.float32)
    width = (call.heads + len(call.caches) * call.kv_heads) * call.head_dim
    given = {
        "qkv": random.standard_normal((tokens, width), np.float32),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "query_start": np.array([0, tokens], np.int32),
        "context_len": np.array([past], np.int32),
        "page_table": page_table,
    }
    binding = session.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for name, cache in caches.items():
        binding.bind_ortvalue_input(name, cache)
        binding.bind_ortvalue_output(f"{name}_out", cache)
    binding.bind_output("y")

    def run() -> float:
        started = perf_counter()
        session.run_with_iobinding(binding)
        return perf_counter() - started

    return run


@click.command(help=__doc__.splitlines()[0])
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(repeats: int, threads: int, output: Path | None) -> None:
    limits = measure_machine(threads)
    runs = [prepare(call, threads) for call in CALLS]
    rounds = [[run() for run in runs] for _ in range(repeats + 1)][1:]  # the first warms up
    found = []
    for call, seconds in zip(CALLS, map(median, zip(*rounds, strict=True)), strict=True):
        of_peak = call.multiply_adds / seconds / limits.float32
        of_memory = call.cache_bytes / seconds / limits.read
        found.append(asdict(call) | {"seconds": seconds, "of_peak": of_peak, "of_memory": of_memory})
    rows = [
        (
            r["model"],
            str(r["head_dim"]),
            str(r["past"]),
            str(r["tokens"]),
            f"{1e3 * r['seconds']:.2f}",
            f"{r['of_peak']:.2f}",
            f"{r['of_memory']:.2f}",
        )
        for r in found
    ]
    heads = ("model", "head", "past", "tokens", "ms", "of the machine's multiply-adds", "of its memory's bandwidth")
    report = {"machine": machine.facts() | msgspec.structs.asdict(limits), "repeats": repeats, "results": found}
    publish(table(f"medians of {repeats}, {threads} threads", heads, rows), json.dumps(report, indent=1), output)


if __name__ == "__main__":
    main()
