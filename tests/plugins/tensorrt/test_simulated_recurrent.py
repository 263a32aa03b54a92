"""A model with layers of the gated delta rule in the whole simulated engine, against the engine of the CPU."""

from __future__ import annotations

import pytest

from moevlm.export.build import build
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.sampling import SamplingParams
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.tensorrt.test_simulated_engine import request
from tests.support.simulator.bundle import TARGET, SimulatedBundle, with_simulated_engine
from tests.support.simulator.libraries import Libraries
from tests.support.simulator.run import Report, interpret
from tests.support.tiny import TinyCheckpoint

NEW_TOKENS = 3
REQUESTS = [request("hi"), request("a prompt of more than one chunk of tokens")]


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> SimulatedBundle:
    folder = tmp_path_factory.mktemp("recurrent")
    checkpoint = TinyCheckpoint("qwen3_5_moe", side_files=True).save(folder / "checkpoint")
    built = build(checkpoint, folder / "b.moevlm", ["reference"])
    return with_simulated_engine(built.directory, checkpoint, folder, sequences=4, chunk_tokens=48)


@pytest.fixture(scope="module")
def report(
    recurrent: SimulatedBundle,
    libraries: Libraries,
    triton_interpreter: Interpreter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Report:
    """Of all requests at once."""
    folder = tmp_path_factory.mktemp("gpu")
    return triton_interpreter.call(interpret, recurrent.path, TARGET, folder, libraries, REQUESTS, NEW_TOKENS)


def test_requests_at_once_get_the_tokens_of_the_cpu(recurrent: SimulatedBundle, report: Report) -> None:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
    with load_runtime(recurrent.path, "reference", LoadOptions(threads=1)) as runtime:
        expected = runtime.generate_many(REQUESTS, params=params)
    assert len({round(answer.sampled[0].logprob, 3) for answer in expected}) == len(REQUESTS)
    for got, want in zip(report.answers, expected, strict=True):
        assert got.token_ids == want.token_ids
        for one, other in zip(got.sampled, want.sampled, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_steps_were_recorded_and_every_kernel_of_the_rule_ran(report: Report) -> None:
    decodes = [tokens for tokens, sequences in report.steps if tokens == sequences]
    assert (report.graphs, report.replays) == ("replayed", len(decodes))
    assert not report.held
    assert set(report.launches) >= {"convolve", "delta_recurrent", "delta_chunks", "delta_scan"}
