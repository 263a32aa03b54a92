"""Requests to a bundle's simulated engine: what the runtime says of them, and what the device did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moevlm.runtime.engine.answer import Completion
from moevlm.runtime.load_options import LoadOptions
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

    @property
    def decodes(self) -> int:
        """How many steps had one token of each sequence."""
        return sum(tokens == sequences for tokens, sequences in self.steps)

    def assert_answers(self, expected: Sequence[Completion]) -> None:
        """The same tokens, with log-probabilities within 1e-4."""
        for got, want in zip(self.answers, expected, strict=True):
            assert got.token_ids == want.token_ids
            for one, other in zip(got.sampled, want.sampled, strict=True):
                assert abs(one.logprob - other.logprob) <= 1e-4


def cpu_answers(bundle: Path, target: str, requests: Sequence[Messages], new_tokens: int) -> list[Completion]:
    """Greedy answers of an engine on the CPU to all requests at once."""
    with load_runtime(bundle, target, LoadOptions(threads=1)) as runtime:
        return runtime.generate_many(requests, params=_params(new_tokens))


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
    with simulated_gpu(folder, libraries, kernels) as gpu:
        with load_runtime(bundle, target) as runtime:
            forward = runtime.engine.forward

            def noted(step: Any, *rest: Any) -> Any:
                steps.append((step.tokens, step.sequences))
                return forward(step, *rest)

            runtime.engine.forward = noted  # type: ignore[method-assign]
            answers = runtime.generate_many(requests, params=_params(new_tokens))
            graphs = runtime.engine.graphs
        return Report(answers, dict(launches), steps, gpu.gpu.driver.replays, graphs, gpu.gpu.held())


def _params(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, logprobs=2)
