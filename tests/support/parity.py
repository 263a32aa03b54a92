"""A tiny checkpoint in transformers and in canonical form, on prompts that transformers itself continues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.cases import Case, ordinary_ids, random_cases
from moevlm.export.parity.checks import ask, checks, debug_outputs
from moevlm.export.parity.expected import Expected
from moevlm.export.parity.oracle import Oracle, auto_model, inputs_of, reference_config
from moevlm.export.parity.report import Check
from moevlm.export.parity.tolerances import EXACT
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.request.prompt import Prompt

GREEDY_TOKENS = 32


@dataclass(frozen=True)
class Held:
    """model: the canonical one. expected: prompts, and what transformers computes for them, greedy tokens behind.

    ordinary: [N] ids among which they are the best.
    """

    model: CanonicalModel
    expected: Expected
    ordinary: np.ndarray

    def of_pytorch(self) -> list[Check]:
        """All checks of canonical PyTorch."""
        engine = TorchEngine(self.model, partial(ask, self.expected))
        return self.of(engine, "canonical PyTorch")

    def of(self, engine: Engine, name: str) -> list[Check]:
        """All checks of an engine in float32 with debug outputs; that it chooses the greedy tokens is one of them."""
        inside = debug_outputs(self.expected, engine)
        return list(checks(self.expected, name, engine, inside, EXACT))


@contextmanager
def held(checkpoint: Path, seed: int) -> Iterator[Held]:
    """One prompt without images, others with one, two and three. seed: of the prompts."""
    with Checkpoint.open(checkpoint) as source:
        model = CanonicalModel.of(source)
        metadata = model.config.metadata()
        family = family_for(source.config)
        whole = (
            auto_model(metadata.vision)
            .from_pretrained(
                checkpoint,
                config=reference_config(source, family),
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
            )
            .eval()
        )
        family.mend(whole)
        ordinary = ordinary_ids(metadata, source.config)
        cases = _followed(random_cases(metadata, source.config, seed), whole, metadata, ordinary)
        answers = Oracle(source, family, metadata.vision).outputs(cases)
        yield Held(model, Expected(model, metadata, cases, answers), ordinary)


@torch.no_grad()
def _followed(cases: list[Case], model: torch.nn.Module, metadata: ModelMetadata, ordinary: np.ndarray) -> list[Case]:
    """The cases with the tokens behind their prompts that the model likes best, without any cache.

    Short rows are filled up behind: no token sees a later one but those of its image. ordinary: ids that it may choose:
    a random model would choose image tokens as well.
    """
    prompts = [case.prompt for case in cases]
    for _ in range(GREEDY_TOKENS):
        known = [Case(prompt, prompt, case.grids, case.patches) for prompt, case in zip(prompts, cases, strict=True)]
        ids = np.full((len(cases), max(len(prompt.ids) for prompt in prompts)), ordinary[0])
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        inputs = inputs_of(model.config, metadata.vision, torch.from_numpy(ids), known)
        logits = model(**inputs, use_cache=False).logits
        for row, (prompt, case) in enumerate(zip(prompts, cases, strict=True)):
            best = ordinary[int(logits[row, len(prompt.ids) - 1, ordinary].argmax())]
            prompts[row] = Prompt.from_ids(np.append(prompt.ids, best), case.grids, metadata)
    return [Case(case.prompt, whole, case.grids, case.patches) for case, whole in zip(cases, prompts, strict=True)]
