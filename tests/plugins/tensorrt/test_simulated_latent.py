"""A model with latent attention, and queries that grow with their place, in the whole simulated engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moevlm.export.build import build
from tests.plugins.tensorrt.test_simulated_engine import picture, request
from tests.support.simulator.bundle import SimulatedBundle, with_simulated_engine
from tests.support.simulator.run import Report, cpu_answers
from tests.support.tiny import TinyCheckpoint

NEW_TOKENS = 3
REQUESTS = [request("hi"), request("a prompt of more than one chunk of tokens", picture(16, 24, 1))]


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> SimulatedBundle:
    """Mistral 4 behind its tower; places count beyond the context of its first training."""
    folder = tmp_path_factory.mktemp("latent")
    checkpoint = TinyCheckpoint("mistral3", side_files=True).save(folder / "checkpoint")
    built = build(checkpoint, folder / "b.moevlm", ["reference"])
    assert built.manifest.model.query_scale is not None
    assert built.manifest.model.query_scale.original == 16
    return with_simulated_engine(built.directory, checkpoint, folder, sequences=4, chunk_tokens=48)


@pytest.fixture(scope="module")
def report(latent: SimulatedBundle, interpreted: Callable[..., Report]) -> Report:
    return interpreted(latent, REQUESTS, NEW_TOKENS)


def test_requests_at_once_get_the_tokens_of_the_cpu(latent: SimulatedBundle, report: Report) -> None:
    expected = cpu_answers(latent.path, "reference", REQUESTS, NEW_TOKENS)
    assert len({round(answer.sampled[0].logprob, 3) for answer in expected}) == len(REQUESTS)
    report.assert_answers(expected)


def test_steps_were_recorded_and_given_back(report: Report) -> None:
    assert (report.graphs, report.replays) == ("replayed", report.decodes)
    assert not report.held
