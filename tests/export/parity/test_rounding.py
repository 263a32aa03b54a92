"""What rounding costs the graphs that TensorRT is given, held to parity's limits, and mistakes that exceed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moevlm.export.backends.tensorrt.options import DTYPES, Options
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.formats.registry import weight_format
from moevlm.export.graph.functions import add_functions
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.cases import Case, random_cases
from moevlm.export.parity.checks import checks, rounding_checks
from moevlm.export.parity.expected import Expected
from moevlm.export.parity.report import Check
from moevlm.export.parity.stored_reference import Storage, expected_on, stored_model
from moevlm.export.parity.tolerances import tolerance_of
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.runtime.core.states import StateSpec
from moevlm.runtime.engine.protocol import Engine
from tests.support.checkpoints import ATTENDING
from tests.support.simulated_plan import SimulatedPlan, lowered
from tests.support.tiny import TinyCheckpoint

AS_GIVEN = Storage()


@pytest.fixture(scope="module")
def seed() -> int:
    """One for all runs: now and then a near tie early in a prompt sends all that follows elsewhere."""
    return 5


class Canonical:
    """Canonical PyTorch on fresh weights, what it answers to fresh prompts, and the graphs."""

    def __init__(self, model: CanonicalModel, cases: list[Case]) -> None:
        self.graphs, self._model, self._cases = model.graphs, model, cases
        self._known: dict[Storage, Expected] = {}
        for graph in self.graphs.values():
            add_functions(graph)

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return self._model.config.decoder.states

    def engine(self, ask: Callable[[Engine], object]) -> TorchEngine:
        return TorchEngine(self._model, ask)

    def expected(self, storage: Storage = AS_GIVEN) -> Expected:
        """What it answers with its weights as they are stored."""
        if storage not in self._known:
            self._known[storage] = self.computed(storage)
        return self._known[storage]

    def computed(self, storage: Storage) -> Expected:
        """The same, not remembered."""
        return expected_on(stored_model(self._model, storage), self._model.config.metadata(), self._cases)


@pytest.fixture(scope="module", params=ATTENDING)
def canonical(
    seed: int, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Canonical]:
    checkpoint = TinyCheckpoint(request.param, text={"vocab_size": 96}, seed=seed)
    with Checkpoint.open(checkpoint.save(tmp_path_factory.mktemp("checkpoint"))) as source:
        model = CanonicalModel.of(source)
        yield Canonical(model, random_cases(model.config.metadata(), source.config, seed))


def storage(dtype: str, experts: str) -> Storage:
    return AS_GIVEN if experts == "same" else Storage("", experts, 32, DTYPES[dtype])


def simulated(canonical: Canonical, dtype: str, experts: str, kv_cache: str = "same") -> SimulatedPlan:
    options = Options(dtype=dtype, experts=experts, kv_cache=kv_cache, max_sequences=8, chunk_tokens=64)
    return SimulatedPlan(lowered(canonical.graphs, options), canonical.expected().metadata, canonical.states, options)


def found(canonical: Canonical, plan: SimulatedPlan, dtype: str, experts: str) -> list[Check]:
    """All checks of a plan, against the weights that it should have."""
    expected = canonical.expected(storage(dtype, experts))
    made = list(checks(expected, "plan", plan, None, tolerance_of(plan.metadata)))
    assert len(made) == (10 if expected.deepstack.size else 9)
    return made


PRECISIONS = [("bf16", "same"), ("fp16", "same"), ("fp16", "int8"), ("bf16", "fp8"), ("bf16", "int4"), ("fp16", "int4")]


@pytest.mark.parametrize(("dtype", "experts"), PRECISIONS)
def test_what_rounding_costs_is_within_the_limits(canonical, seed: int, dtype: str, experts: str) -> None:
    made = found(canonical, simulated(canonical, dtype, experts), dtype, experts)
    assert [check for check in made if not check.passed] == [], f"seed {seed}"


@pytest.mark.parametrize("kv_cache", ["int8", "fp8"])
def test_what_a_quantized_cache_costs_is_within_the_limits(canonical, seed: int, kv_cache: str) -> None:
    made = found(canonical, simulated(canonical, "fp16", "same", kv_cache), "fp16", "same")
    assert [check for check in made if not check.passed] == [], f"seed {seed}"


@pytest.mark.parametrize("experts", ["int8", "fp8", "int4", "fp4"])
@pytest.mark.parametrize("sparsity", ["", "2:4"])
def test_storing_experts_costs_as_little_as_it_should(canonical, seed: int, sparsity: str, experts: str) -> None:
    stored = Storage(sparsity, experts, 32, "bfloat16")
    unrounded = canonical.expected(stored.unrounded)
    cost = list(rounding_checks("plan", canonical.expected(stored), unrounded, experts))
    assert all(check.passed and check.value > 0 for check in cost), f"seed {seed}"


@pytest.mark.parametrize("experts", ["int8", "fp8"])
def test_scales_that_belong_to_other_weights_are_found(
    canonical, seed: int, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(weight_format(experts, 32))
    encode = kind.encode

    def misplaced(self: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = encode(self, rows)
        return codes, np.roll(scales, 1, axis=0)

    monkeypatch.setattr(kind, "encode", misplaced)
    wrong = canonical.computed(Storage("", experts, 32, "float16"))
    cost = list(rounding_checks("plan", wrong, canonical.expected(), experts))
    assert not all(check.passed for check in cost), f"seed {seed}"


@pytest.mark.parametrize(("dtype", "experts"), PRECISIONS)
def test_a_kernel_that_takes_gate_for_up_is_found(canonical, seed: int, dtype: str, experts: str) -> None:
    plan = simulated(canonical, dtype, experts)
    for name, array in plan.experts.items():
        if "gate_up" in name:
            plan.experts[name] = np.roll(array, array.shape[1] // 2, axis=1)
    assert not all(check.passed for check in found(canonical, plan, dtype, experts)), f"seed {seed}"
