"""A model with layers of the gated delta rule in the whole simulated engine, against the engine of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moevlm.export.build import build
from tests.plugins.tensorrt.test_simulated_engine import request
from tests.support.simulator.bundle import SimulatedBundle, with_simulated_engine
from tests.support.simulator.run import Report, cpu_answers
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
def report(recurrent: SimulatedBundle, interpreted: Callable[..., Report]) -> Report:
    return interpreted(recurrent, REQUESTS, NEW_TOKENS)


def test_requests_at_once_get_the_tokens_of_the_cpu(recurrent: SimulatedBundle, report: Report) -> None:
    expected = cpu_answers(recurrent.path, "reference", REQUESTS, NEW_TOKENS)
    assert len({round(answer.sampled[0].logprob, 3) for answer in expected}) == len(REQUESTS)
    report.assert_answers(expected)


def test_steps_were_recorded_and_every_kernel_of_the_rule_ran(report: Report) -> None:
    assert (report.graphs, report.replays) == ("replayed", report.decodes)
    assert not report.held
    assert set(report.launches) >= {"convolve", "delta_recurrent", "delta_chunks", "delta_scan"}
