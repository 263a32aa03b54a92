"""The benchmark's protocol between orchestrator and systems, on a system that answers at once."""

import sys
from pathlib import Path

import pytest

from bench.cpu_bench import measure, results, table_of
from bench.peers.client import Peer, PeerError
from bench.peers.protocol import Request
from bench.systems import Metric

ROOT = Path(__file__).parents[2]
SCRIPT = """
from bench.peers.protocol import System, serve

class Fake(System):
    versions, vocabulary = {"fake": "1"}, 1000

    def prefill(self, ids):
        print("libraries may print")
        return 0.5, int(ids[-1])

    def decode(self, history, steps):
        return 0.25, int(steps[0, -1])

serve(Fake)
"""


@pytest.fixture
def fake(tmp_path):
    def start(name, script=SCRIPT):
        return Peer(name, [sys.executable, "-c", script], ROOT, tmp_path / f"{name}.log")

    return start


def test_two_systems_get_the_same_tokens_for_the_same_request(fake):
    with fake("a") as a, fake("b") as b:
        assert a.versions == {"fake": "1"}
        for request in (Request("prefill", 16), Request("decode", 8, past=16, batch=2)):
            assert a.ask(request) == b.ask(request)
        assert a.ask(Request("decode", 8, past=16, batch=2)).tokens == 16


def test_ended_system_is_named_with_its_last_words(fake):
    with pytest.raises(PeerError, match=r"a ended with status 1: ValueError: no such model \(.*a.log\)"):
        fake("a", "raise ValueError('no such model')")
    with fake("b") as b, pytest.raises(PeerError, match=r'b ended with status 1: .*unsupported metric = "x"'):
        b.ask(Request("x", 1))


def test_results_have_a_ratio_to_the_first_system_of_each_metric(fake):
    speed = Metric("decode", Request("decode", 8, past=16), "tok/s", ("a", "b", "absent"))
    time = Metric("prompt", Request("prefill", 16), "s", ("b",))
    with fake("a") as a, fake("b") as b:
        replies = measure([a, b], [speed, time], 3, lambda *_: None)
    entries = results(replies, [speed, time])
    assert [(e["metric"], e["system"], e["median"], len(e["values"])) for e in entries] == [
        ("decode", "a", 32.0, 3),
        ("decode", "b", 32.0, 3),
        ("prompt", "b", 0.5, 3),
    ]
    assert "1.00 x" in table_of(entries, [speed, time], 3)
