"""The gated delta rule behind its convolution, by the cpu targets' operator, ONNX Runtime's, and transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

from moevlm.plugins.ops.spec import GatedDeltaSpec, attributes
from moevlm.runtime.backends.libraries import operators_path
from moevlm.runtime.backends.ort.library import onnxruntime

Array = np.ndarray


@dataclass(frozen=True)
class Work:
    """Tokens of each of `sequences`, in `layers` layers whose states lie apart: the same weights and tokens in all."""

    spec: GatedDeltaSpec
    sequences: int
    tokens: int
    layers: int

    def inputs(self) -> dict[str, Array]:
        """The operator's inputs but states and places; decays as a trained model has them, from weak to strong."""
        rng, spec = np.random.default_rng(0), self.spec
        total, heads, channels = self.sequences * self.tokens, spec.value_heads, spec.channels
        return {
            "qkv": rng.standard_normal((total, channels), np.float32),
            "a": rng.standard_normal((total, heads), np.float32),
            "b": rng.standard_normal((total, heads), np.float32),
            "conv_weight": rng.standard_normal((channels, spec.kernel), np.float32),
            "rate": np.exp(rng.uniform(-3, 1, heads)).astype(np.float32),
            "dt_bias": rng.standard_normal(heads, np.float32),
        }

    def states(self, layer: int) -> tuple[Array, Array]:
        """conv [sequences, kernel - 1, C] and delta [sequences, Hv, Dk, Dv]."""
        rng, spec, rows = np.random.default_rng(1 + layer), self.spec, self.sequences
        conv = rng.standard_normal((rows, spec.kernel - 1, spec.channels), np.float32)
        return conv, rng.standard_normal((rows, spec.value_heads, spec.key_dim, spec.value_dim), np.float32) * 0.1


class Rule(ABC):
    """One system, ready for one work: `run` takes the tokens through all layers, `y` is of the last layer's run."""

    name: str

    def __init__(self, work: Work, threads: int) -> None:
        self.work, self.threads = work, threads

    @abstractmethod
    def run(self) -> None:
        """Take the tokens through each layer once; its states change."""

    @abstractmethod
    def y(self) -> Array:
        """[sequences * tokens, Hv * Dv] of the last layer."""


class Operator(Rule):
    """moevlm.cpu::GatedDelta, states in place."""

    name = "moevlm.cpu"

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        inputs = work.inputs()
        inputs["conv_weight"] = np.ascontiguousarray(inputs["conv_weight"].T)
        inputs["query_start"] = np.arange(work.sequences + 1, dtype=np.int32) * work.tokens
        inputs["state_row"] = np.arange(work.sequences, dtype=np.int32)
        names = [*list(inputs)[:6], "conv_state", "delta_state", *list(inputs)[6:]]
        outputs = ["y", "conv_state_out", "delta_state_out"]
        node = helper.make_node("GatedDelta", names, outputs, domain="moevlm.cpu", **attributes(work.spec))
        kinds = {name: TensorProto.INT32 for name in ("query_start", "state_row")}
        given = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in names]
        self._session = _session([node], given, outputs, {}, threads, str(operators_path()))
        self._y, self._bindings = np.empty((len(inputs["qkv"]), work.spec.value_heads * work.spec.value_dim), "f4"), []
        for layer in range(work.layers):
            binding = self._session.io_binding()
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, onnxruntime().OrtValue.ortvalue_from_numpy(array))
            for name, array in zip(names[6:8], work.states(layer), strict=True):
                value = onnxruntime().OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(f"{name}_out", value)
            binding.bind_ortvalue_output("y", onnxruntime().OrtValue.ortvalue_from_numpy(self._y))
            self._bindings.append(binding)

    def run(self) -> None:
        for binding in self._bindings:
            self._session.run_with_iobinding(binding)

    def y(self) -> Array:
        return self._y


class OnnxRuntime(Rule):
    """com.microsoft's CausalConvWithState and LinearAttention, and what stands between them as standard operators.

    The states change places with their successors after each run, so that nothing is copied.
    """

    name = "ONNX Runtime"

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        spec, inputs = work.spec, work.inputs()
        keys, values, dim = spec.key_heads, spec.value_heads, spec.key_dim
        stored = {
            "taps": inputs["conv_weight"][:, None],
            "minus_rate": -inputs["rate"],
            "dt_bias": inputs["dt_bias"],
            "widths": np.array([keys * dim, keys * dim, values * spec.value_dim]),
            "heads": np.array([0, 0, keys, dim]),
            "column": np.array([0, 0, keys, 1, dim]),
            "several": np.array([1, 1, 1, values // keys, 1]),
            "all_rows": np.array([0, 0, values * dim]),
        }
        contrib = {"domain": "com.microsoft"}
        convolution = {"activation": "silu", "ndim": 1, "channels_last": 1, **contrib}
        rule = {"q_num_heads": values, "kv_num_heads": values, "update_rule": "gated_delta", "scale": dim**-0.5}
        node = helper.make_node
        nodes = [
            node("CausalConvWithState", ["qkv", "taps", "", "conv"], ["mixed", "conv_out"], **convolution),
            node("Split", ["mixed", "widths"], ["q", "k", "v"], axis=2),
            *(step for x in "qk" for step in _lengths(x)),
            node("Add", ["a", "dt_bias"], ["biased"]),
            node("Softplus", ["biased"], ["soft"]),
            node("Mul", ["soft", "minus_rate"], ["decay"]),
            node("Sigmoid", ["b"], ["beta"]),
            node("LinearAttention", ["q_", "k_", "v", "delta", "decay", "beta"], ["y", "delta_out"], **rule, **contrib),
        ]
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("qkv", "a", "b", "conv", "delta")]
        self._session = _session(nodes, given, ["y", "conv_out", "delta_out"], stored, threads)
        shape = (work.sequences, work.tokens)
        rows = {name: inputs[name].reshape(*shape, -1) for name in ("qkv", "a", "b")}
        self._y, self._bindings = np.empty((*shape, values * spec.value_dim), np.float32), []
        for layer in range(work.layers):
            states = work.states(layer)
            now, then = ([onnxruntime().OrtValue.ortvalue_from_numpy(np.array(s)) for s in states] for _ in range(2))
            pair = []
            for source, target in ((now, then), (then, now)):
                binding = self._session.io_binding()
                for name, array in rows.items():
                    binding.bind_ortvalue_input(name, onnxruntime().OrtValue.ortvalue_from_numpy(array))
                for name, before, after in zip(("conv", "delta"), source, target, strict=True):
                    binding.bind_ortvalue_input(name, before)
                    binding.bind_ortvalue_output(f"{name}_out", after)
                binding.bind_ortvalue_output("y", onnxruntime().OrtValue.ortvalue_from_numpy(self._y))
                pair.append(binding)
            self._bindings.append(pair)
        self._turn = 0

    def run(self) -> None:
        for pair in self._bindings:
            self._session.run_with_iobinding(pair[self._turn])
        self._turn = 1 - self._turn

    def y(self) -> Array:
        return self._y.reshape(-1, self._y.shape[-1])


class Transformers(Rule):
    """transformers' layer without its projections: chunks for prompts, one token at a time for decoding."""

    name = "transformers"

    def __init__(self, work: Work, threads: int) -> None:
        super().__init__(work, threads)
        shape = (work.sequences, work.tokens)
        inputs = {name: torch.from_numpy(array) for name, array in work.inputs().items()}
        self._inputs = inputs | {name: inputs[name].unflatten(0, shape) for name in ("qkv", "a", "b")}
        self._states = []
        for layer in range(work.layers):
            conv, delta = map(torch.from_numpy, work.states(layer))
            self._states.append((conv.transpose(1, 2).contiguous(), delta))
        one = work.tokens == 1
        self._rule = hf.torch_recurrent_gated_delta_rule if one else hf.torch_chunk_gated_delta_rule

    @torch.inference_mode()
    def run(self) -> None:
        torch.set_num_threads(self.threads)
        given, spec = self._inputs, self.work.spec
        weight, width = given["conv_weight"][:, None], spec.key_heads * spec.key_dim
        for layer, (conv, delta) in enumerate(self._states):
            taken = torch.cat([conv, given["qkv"].transpose(1, 2)], -1)
            mixed = F.silu(F.conv1d(taken, weight, groups=spec.channels)).transpose(1, 2)
            parts = mixed.split([width, width, spec.value_heads * spec.value_dim], -1)
            heads = (spec.key_heads, spec.key_heads, spec.value_heads)
            q, k, v = (part.unflatten(-1, (count, -1)) for part, count in zip(parts, heads, strict=True))
            g = -given["rate"] * F.softplus(given["a"] + given["dt_bias"])
            kept = {"initial_state": delta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
            self._out, after = self._rule(q, k, v, g=g, beta=given["b"].sigmoid(), **kept)
            assert after is not None
            self._states[layer] = taken[..., 1 - spec.kernel :].contiguous(), after

    def y(self) -> Array:
        return self._out.flatten(0, 1).flatten(1).numpy()


RULES: tuple[type[Rule], ...] = (Operator, OnnxRuntime, Transformers)


def _lengths(x: str) -> list[object]:
    """Queries or keys `x` [B, T, Hk * Dk] of length 1, as many as there are value heads: `x`_."""
    node = helper.make_node
    return [
        node("Reshape", [x, "heads"], [f"{x}_heads"]),
        node("LpNormalization", [f"{x}_heads"], [f"{x}_unit"], axis=-1, p=2),
        node("Reshape", [f"{x}_unit", "column"], [f"{x}_column"]),
        node("Expand", [f"{x}_column", "several"], [f"{x}_several"]),
        node("Reshape", [f"{x}_several", "all_rows"], [f"{x}_"]),
    ]


def _session(
    nodes: list, given: list, outputs: list[str], stored: dict[str, Array], threads: int, library: str = ""
) -> Any:
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", given, made, [numpy_helper.from_array(v, k) for k, v in stored.items()])
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 23), ("com.microsoft", 1))]
    opsets.append(helper.make_opsetid("moevlm.cpu", 1))
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
