"""The paged attention operator of `cpu` against the contiguous one, in one process, in turns.

    python -m bench.attention_bench [--rounds 9] [--threads 1] [--only "decode 4096"]

With one thread it counts the time that the thread ran, so that neighbours on the machine count for little. A ratio
above 1 says that the paged operator is faster. Its pages lie in random order.
"""

from dataclasses import dataclass
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import click
import numpy as np
from onnx import TensorProto, helper

from moevlm.runtime.backends.libraries import operators_path
from moevlm.runtime.backends.ort.library import onnxruntime
from moevlm.runtime.cli.console import publish, table

PAGE = 64
TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
STEPS = {  # sequences, new tokens and tokens in the cache of each
    "decode 256": (1, 1, 256),
    "decode 256, 8 sequences": (8, 1, 256),
    "decode 4096": (1, 1, 4096),
    "decode 4096, 8 sequences": (8, 1, 4096),
    "prefill 256": (1, 256, 0),
    "prefill 256 at 2048": (1, 256, 2048),
}
HEADS = ((32, 4, 128), (16, 2, 64))  # query heads, key/value heads, head_dim


@dataclass(frozen=True)
class Bound:
    """A session with its inputs and outputs in place: what one call reads and writes does not move."""

    session: Any
    binding: Any
    values: tuple[Any, ...]  # keeps the buffers

    @classmethod
    def of(cls, op: str, inputs: dict[str, np.ndarray], threads: int, **attributes: float) -> "Bound":
        ort = onnxruntime()

        def info(name: str, array: np.ndarray) -> object:
            return helper.make_tensor_value_info(name, TYPES[array.dtype.name], [None] * array.ndim)

        caches = {f"{name}_out": name for name in inputs if name.endswith("cache")}
        node = helper.make_node(op, list(inputs), ["y", *caches], domain="moevlm.cpu", **attributes)
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 2)]
        outputs += [info(name, inputs[source]) for name, source in caches.items()]
        graph = helper.make_graph([node], "attention", [info(*item) for item in inputs.items()], outputs)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("moevlm.cpu", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(operators_path()))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, source in caches.items():
            binding.bind_ortvalue_output(name, values[source])
        binding.bind_output("y")
        return cls(session, binding, tuple(values.values()))

    def seconds(self, calls: int, threads: int) -> float:
        clock = thread_time if threads == 1 else perf_counter
        start = clock()
        for _ in range(calls):
            self.session.run_with_iobinding(self.binding)
        return (clock() - start) / calls


def pair(step: tuple[int, int, int], heads: tuple[int, int, int], dtype: str, threads: int) -> tuple[Bound, Bound]:
    """The contiguous operator and the paged one, with the same work to do."""
    (sequences, new, past), (query_heads, kv_heads, dim) = step, heads
    rng = np.random.default_rng(0)
    pages = -(-(past + new) // PAGE)
    angle = rng.uniform(0, 6, (sequences, new, dim // 2))
    qkv = {"qkv": rng.standard_normal((sequences * new, (query_heads + 2 * kv_heads) * dim), np.float32)}
    tables = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    norms = {name: np.ones(dim, np.float32) for name in ("q_norm", "k_norm")}
    attributes = {"heads": query_heads, "kv_heads": kv_heads, "rotary_dim": dim}

    def caches(*shape: int) -> dict[str, np.ndarray]:
        width = dim if dtype == "float32" else dim + 4
        return {name: np.full((*shape, width), 0, dtype) for name in ("key_cache", "value_cache")}

    contiguous = caches(sequences, kv_heads, pages * PAGE) | {"cache_position": np.full(sequences, past)}
    paged = caches(1 + sequences * pages, kv_heads, PAGE) | {
        "query_start": np.arange(sequences + 1, dtype=np.int32) * new,
        "context_len": np.full(sequences, past, np.int32),
        "page_table": 1 + rng.permutation(sequences * pages).astype(np.int32).reshape(sequences, pages),
    }
    rows = {name: array.reshape(sequences * new, -1) for name, array in tables.items()}
    return (
        Bound.of("CachedAttention", qkv | tables | contiguous | norms, threads, **attributes),
        Bound.of("PagedAttention", qkv | rows | paged | norms, threads, **attributes),
    )


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="In which both take turns.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--only", default="", help="Part of a row's name.  [default: all]")
def main(rounds: int, threads: int, only: str) -> None:
    """Time both operators."""
    rows = []
    for heads in HEADS:
        for dtype in ("float32", "int8"):
            for name, step in STEPS.items():
                title = f"{name}, {heads[0]}/{heads[1]} heads of {heads[2]}, {dtype}"
                if only not in title:
                    continue
                both = pair(step, heads, dtype, threads)
                calls = max(1, int(0.01 / both[0].seconds(2, threads)))
                times = [[each.seconds(calls, threads) for each in both] for _ in range(rounds + 1)][1:]
                ratio = median(contiguous / paged for contiguous, paged in times)
                medians = (f"{median(column) * 1e6:.0f} us" for column in zip(*times, strict=True))
                rows.append((title, *medians, f"{ratio:.2f}"))
    publish(table(f"medians of {rounds}", ("step", "contiguous", "paged", "ratio"), rows), "", None)


if __name__ == "__main__":
    main()
