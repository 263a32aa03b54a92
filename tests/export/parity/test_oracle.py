"""transformers and canonical PyTorch with a layer in memory at a time: the same numbers, and no more than a layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import Family, family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.modules.decoder import Decoder, Layer
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.cases import Case, random_cases
from moevlm.export.parity.measures import relative_error
from moevlm.export.parity.oracle import Oracle, ReferenceOutput, inputs_of
from moevlm.export.parity.stored_reference import expected_on
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.runtime.core.errors import CheckpointError, EngineError
from moevlm.runtime.core.towers import VisionMetadata
from moevlm.runtime.engine.protocol import Engine
from tests.export.parity.test_run import CHECKPOINTS
from tests.support.tiny import TinyCheckpoint, edit_json, edit_tensors

DEEP = {"vocab_size": 96, "num_hidden_layers": 6}


@contextmanager
def opened(tiny: TinyCheckpoint, folder: Path) -> Iterator[tuple[Checkpoint, CanonicalModel, list[Case]]]:
    with Checkpoint.open(tiny.save(folder / "checkpoint")) as source:
        model = CanonicalModel.of(source)
        yield source, model, random_cases(model.config.metadata(), source.config, tiny.seed)


def by_from_pretrained(checkpoint: Path, family: Family, vision: VisionMetadata, cases: list[Case]) -> list[np.ndarray]:
    """Logits of every case by itself, the whole model in memory."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    family.mend(model)
    results = []
    for case in cases:
        ids = torch.from_numpy(case.whole.ids)[None]
        with torch.no_grad():
            results.append(model(**inputs_of(model.config, vision, ids, [case])).logits[0].numpy())
    return results


def logits(given: ReferenceOutput) -> np.ndarray:
    return np.concatenate([given.prefill, given.decode])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_layer_by_layer_transformers_says_what_it_says_as_a_whole(name: str, tmp_path: Path) -> None:
    with opened(CHECKPOINTS[name], tmp_path) as (source, model, cases):
        family, vision = family_for(source.config), model.config.vision.metadata()
        answers = Oracle(source, family, vision).outputs(cases)
    whole = by_from_pretrained(tmp_path / "checkpoint", family, vision, cases)
    for ours, theirs in zip(answers, whole, strict=True):
        assert relative_error(logits(ours), theirs) < 5e-5  # chunks of the delta rule depend on how long a row is


def alive(module: nn.Module) -> int:
    """Parameters in memory."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.is_meta)


def test_transformers_never_has_more_than_its_largest_part_in_memory(tmp_path: Path) -> None:
    with opened(TinyCheckpoint(text=DEEP), tmp_path) as (source, model, cases):
        oracle = Oracle(source, family_for(source.config), model.config.vision.metadata())
        assert alive(oracle.model) == 0
        counts: list[int] = []
        hook = register_module_forward_hook(lambda *_: counts.append(alive(oracle.model)))
        oracle.outputs(cases)
        hook.remove()
    sizes = [sum(p.numel() for p in part.parameters()) for part in oracle.weights.parts.values()]
    assert max(counts) == max(sizes)
    assert sum(sizes) > 5 * max(sizes)
    assert alive(oracle.model) == 0


@pytest.mark.parametrize("top", [{}, {"tie_word_embeddings": True}], ids=["head", "tied head"])
def test_canonical_pytorch_never_has_more_than_a_layer_in_memory(
    top: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, towers, counts = [], list[nn.Module](), list[int]()
    embed, mix, make = Decoder.embed, Layer.mix, CanonicalModel.towers

    def made(model: CanonicalModel) -> tuple[nn.Module, ...]:
        towers.extend(make(model))
        return tuple(towers)

    def mixing(layer: Layer, *arguments: torch.Tensor) -> object:
        layers.append(layer)
        counts.append(sum(alive(each) for each in towers[1].layers))
        return mix(layer, *arguments)

    monkeypatch.setattr(CanonicalModel, "towers", made)
    monkeypatch.setattr(Layer, "mix", mixing)
    hook = register_module_forward_hook(lambda *_: counts.append(alive(towers[0].blocks)))
    with opened(TinyCheckpoint(text=DEEP, top=top), tmp_path) as (_, model, cases):
        expected_on(model, model.config.metadata(), cases)
    hook.remove()
    vision, decoder = towers
    assert len({id(layer) for layer in layers}) == 6
    assert embed is Decoder.embed
    assert max(counts) == max(sum(p.numel() for p in layer.parameters()) for layer in decoder.layers)
    assert alive(decoder) <= decoder.embedding.numel() + decoder.norm.weight.numel()
    assert alive(vision) == vision.position_embedding.numel()


def test_a_tensor_that_transformers_does_not_find_is_named_and_not_made_up(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint(text={"vocab_size": 96}).save(tmp_path / "checkpoint")
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    with Checkpoint.open(checkpoint) as source:
        metadata = CanonicalModel.of(source).config.metadata()
        cases = random_cases(metadata, source.config, 0)
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with Checkpoint.open(checkpoint) as source, pytest.raises(CheckpointError, match=f"no tensor .* for {name}"):
        Oracle(source, family_for(source.config), metadata.vision).outputs(cases)


@pytest.mark.parametrize("names", [None, [], ["KimiK2ForCausalLM"]], ids=str)
def test_a_model_that_transformers_knows_by_no_name_is_refused(names: list[str] | None, tmp_path: Path) -> None:
    directory = TinyCheckpoint("kimi_k2").save(tmp_path / "checkpoint")
    edit_json(directory / "config.json", lambda config: config.update(architectures=names))
    with (
        Checkpoint.open(directory) as source,
        pytest.raises(CheckpointError, match=r"architectures = .* \(allowed: a model of transformers "),
    ):
        Oracle(source, family_for(source.config), None)


def test_canonical_pytorch_answers_the_calls_that_were_announced_and_no_others(tmp_path: Path) -> None:
    with opened(TinyCheckpoint(text={"vocab_size": 96}), tmp_path) as (_, model, cases):
        case, metadata = cases[0], model.config.metadata()

        def calls(token: int) -> Callable[[Engine], object]:
            def make(engine: Engine) -> list[np.ndarray]:
                batch = Batch(engine, metadata, [case.prompt], None, BatchLimits.of([case.prompt], engine.limits, 1))
                return [batch.prefill(), batch.decode([token])]

            return make

        whole = expected_on(model, metadata, cases).answers[0]
        token = int(case.continuation[0])
        prefill, decode = calls(token)(TorchEngine(model, calls(token)))
        assert relative_error(prefill[0], whole.prefill[-1]) < 2e-6
        assert relative_error(decode[0], whole.decode[0]) < 2e-6
        with pytest.raises(EngineError, match="nobody announced this step"):
            calls(token + 1)(TorchEngine(model, calls(token)))
        with pytest.raises(EngineError, match=r"nobody announced a pool of . pages and . rows"):
            calls(token)(TorchEngine(model, lambda _: None))
