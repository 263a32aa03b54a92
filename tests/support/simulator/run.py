"""Requests to a bundle's simulated engine: what the runtime says of them, and what the device did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moevlm.runtime.engine.answer import Completion
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.simulator.device import simulated_gpu
from tests.support.simulator.libraries import Libraries
from tests.support.simulator.machine import Kernels

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """launches: how many of each kernel ran. steps: tokens and sequences of each. replays: of recorded steps.

    graphs: see TensorRTEngine. held: what was not given back at the end.
    """

    answers: list[Completion]
    launches: dict[str, int]
    steps: list[tuple[int, int]]
    replays: int
    graphs: str
    held: dict[str, int]


def interpret(
    bundle: Path, target: str, folder: Path, libraries: Libraries, requests: Sequence[Messages], new_tokens: int
) -> Report:
    """Answers of the kernels in Triton's interpreter: to be called in a process with TRITON_INTERPRET=1."""
    from tests.support.simulator.interpreted import InterpretedKernels

    kernels = InterpretedKernels()
    return answer(bundle, target, folder, libraries, kernels, kernels.launches, requests, new_tokens)


def answer(
    bundle: Path,
    target: str,
    folder: Path,
    libraries: Libraries,
    kernels: Kernels,
    launches: Mapping[str, int],
    requests: Sequence[Messages],
    new_tokens: int,
) -> Report:
    """Greedy answers to all requests at once."""
    steps: list[tuple[int, int]] = []
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, logprobs=2)
    with simulated_gpu(folder, libraries, kernels) as gpu:
        with load_runtime(bundle, target) as runtime:
            forward = runtime.engine.forward

            def noted(step: Any, *rest: Any) -> Any:
                steps.append((step.tokens, step.sequences))
                return forward(step, *rest)

            runtime.engine.forward = noted  # type: ignore[method-assign]
            answers = runtime.generate_many(requests, params=params)
            graphs = runtime.engine.graphs
        return Report(answers, dict(launches), steps, gpu.gpu.driver.replays, graphs, gpu.gpu.held())
