"""generation_config.json: sampling defaults and end tokens as transformers takes them, refused where implausible."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.end_tokens import end_tokens
from moevlm.export.checkpoint.generation_config import sampling_defaults
from moevlm.export.checkpoint.request_files import request_files
from moevlm.export.model import CanonicalModel
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, CheckpointError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.distribution import penalize, weights
from moevlm.runtime.request.generation_file import GENERATION, released_sampling
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.bundles import copy_bundle, rehash
from tests.support.command_line import call

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ModelMetadata:
    return CanonicalModel.of(Checkpoint.open(tiny_checkpoint)).config.metadata()


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {}),
        (QWEN, {name: value for name, value in QWEN.items() if name != "do_sample"}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"temperature": 0.7, "top_p": None, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"do_sample": None, "top_p": 0.5}, {}),
        ({"eos_token_id": [1], "max_new_tokens": 64, "pad_token_id": 0, "transformers_version": "5"}, {}),
    ],
)
def test_defaults_are_what_differs_from_greedy(config: Mapping[str, Any], fields: Mapping[str, float]) -> None:
    found = sampling_defaults(config)
    assert found.fields == fields
    assert found.notes == ()


class _Generator(transformers.GenerationMixin):
    """What `_get_logits_processor` needs of a model."""

    config = transformers.PretrainedConfig()
    device = torch.device("cpu")


@pytest.mark.parametrize("config", [{"do_sample": True}, QWEN, {"do_sample": True, "min_p": 0.2, "top_k": 9}])
def test_defaults_leave_the_tokens_that_transformers_leaves(config: dict[str, Any]) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 3
    seen = torch.tensor([[3, 5, 7, 200]])
    of_transformers = transformers.GenerationConfig(**config)
    of_transformers.update(**transformers.GenerationConfig._get_default_generation_params(), defaults_only=True)
    processors = _Generator()._get_logits_processor(of_transformers, seen.shape[1])
    expected = torch.softmax(processors(seen, logits)[0], -1).numpy()
    params = SamplingParams(**sampling_defaults(config).fields)  # type: ignore[arg-type]
    ids, mass = weights(penalize(logits[0].numpy(), seen[0].numpy(), params.repetition_penalty), params)
    assert ids is not None
    assert set(ids) == set(expected.nonzero()[0])
    assert abs(mass / mass.sum() - expected[ids]).max() < 1e-6


def test_fields_without_support_are_named() -> None:
    config = QWEN | {"num_beams": 4, "typical_p": 0.9, "bad_words_ids": [[1]], "no_repeat_ngram_size": 0, "top_h": None}
    (note,) = sampling_defaults(config).notes
    assert (
        note == "generation_config.json: not supported, ignored: bad_words_ids = [[1]], num_beams = 4, typical_p = 0.9"
    )


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"do_sample": 1}, "do_sample = 1"),
        ({"do_sample": "yes"}, "do_sample = 'yes'"),
        ({"temperature": -1, "do_sample": True}, "temperature = -1"),
        ({"temperature": "hot", "do_sample": True}, "temperature = 'hot'"),
        ({"top_p": 3, "do_sample": True}, "top_p = 3"),
        ({"top_k": -1, "do_sample": True}, "top_k = -1"),
        ({"top_k": 2.5, "do_sample": True}, "top_k = 2.5"),
        ({"repetition_penalty": [1]}, "repetition_penalty = [1]"),
        ({"min_p": 10**299, "do_sample": True}, "min_p = 1000"),
    ],
)
def test_values_out_of_range_are_refused(config: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        sampling_defaults(config)
    assert str(raised.value).startswith(("generation_config.json: ", "invalid value in generation_config.json: "))
    assert word in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ([4, 5, 4], (9,), 7, (4, 5)),
        (6, (9,), 7, (6,)),
        (0, (9,), 7, (0,)),
        (None, (9, 8), 7, (9, 8)),
        ([], (9,), 7, (9,)),
        (None, (), 7, (7,)),
    ],
)
def test_end_tokens_are_those_of_the_first_file_that_names_some(
    generation: Any, config: tuple[int, ...], tokenizer: int, expected: tuple[int, ...], model: ModelMetadata
) -> None:
    metadata = msgspec.structs.replace(model, eos_token_ids=config)
    assert end_tokens({"eos_token_id": generation}, metadata, tokenizer).ids == expected


@pytest.mark.parametrize("value", [10**9, -1, 263, 10**23, True, 2.0, "2", [2, "x"], [[2]], {"a": 1}])
def test_implausible_end_tokens_are_refused(value: Any, model: ModelMetadata) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id = .* \(allowed: .* 0 to 262\)$"):
        end_tokens({"eos_token_id": value}, model, None)


def test_implausible_end_token_of_config_json_and_none_at_all_are_refused(model: ModelMetadata) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: eos_token_id = 263"):
        end_tokens({}, msgspec.structs.replace(model, eos_token_ids=(263,)), None)
    with pytest.raises(CheckpointError, match=r"no end token: neither .* \(name one in generation_config.json\)$"):
        end_tokens({}, msgspec.structs.replace(model, eos_token_ids=()), None)


def test_without_a_tokenizer_no_end_token_is_a_note(model: ModelMetadata, tmp_path: Path) -> None:
    found = request_files(tmp_path, msgspec.structs.replace(model, eos_token_ids=()))
    assert found.eos_token_ids == ()
    assert found.notes == ("no file has an eos_token_id: answers end after max_new_tokens",)


def test_end_token_of_the_tokenizer_that_ends_no_answer_is_a_note(
    tiny_checkpoint: Path, model: ModelMetadata, tmp_path: Path
) -> None:
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_start|>"}')
    found = request_files(tmp_path, model)
    assert found.eos_token_ids == model.eos_token_ids
    assert found.notes == ("the tokenizer's eos_token, 1, does not end answers: eos_token_id of config.json is [2, 0]",)
    found = request_files(tmp_path, msgspec.structs.replace(model, eos_token_ids=()))
    assert found.eos_token_ids == (1,)
    assert found.notes == ("no file has an eos_token_id: answers end with the tokenizer's eos_token, 1",)


@pytest.fixture
def sampling_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy whose model was released with high temperature."""
    bundle = copy_bundle(tiny_bundle, tmp_path)
    write(bundle, {"temperature": 90.0, "top_k": 200})
    return bundle


def write(bundle: Path, content: Any) -> None:
    (bundle / GENERATION).write_text(json.dumps(content))
    rehash(bundle, GENERATION)


def test_requests_start_from_the_bundle_s_sampling_and_may_say_otherwise(
    tiny_bundle: Path, sampling_bundle: Path
) -> None:
    question = [{"role": "user", "content": "Hi"}]

    def ids(bundle: Path, **options: Any) -> list[int]:
        with load_runtime(bundle, "ort-cpu") as runtime:
            return [
                token for piece in runtime.generate(question, max_new_tokens=8, **options) for token in piece.token_ids
            ]

    greedy = ids(tiny_bundle)
    assert ids(sampling_bundle, seed=1) != greedy
    assert ids(sampling_bundle, seed=1) == ids(tiny_bundle, temperature=90, top_k=200, seed=1)
    assert ids(sampling_bundle, temperature=0) == greedy
    assert ids(sampling_bundle, params=SamplingParams(max_new_tokens=8)) == greedy


def test_commands_know_the_bundle_s_sampling(tiny_bundle: Path, sampling_bundle: Path) -> None:
    def ids(bundle: Path, *options: str) -> list[int]:
        result = call(
            "run", bundle, "--target", "ort-cpu", "--prompt", "Hi", "--max-new-tokens", "8", "--json", *options
        )
        assert result.status == 0, result.err
        return list(json.loads(result.out)["token_ids"])

    assert ids(sampling_bundle, "--temperature", "0") == ids(tiny_bundle)
    assert ids(sampling_bundle, "--seed", "1") == ids(
        tiny_bundle, "--temperature", "90", "--top-k", "200", "--seed", "1"
    )
    refused = call("run", tiny_bundle, "--prompt", "Hi", "--top-k", "3")
    assert refused.status == 2
    assert "--top-k needs --temperature above 0" in refused.err
    assert "temperature 90, top k 200" in call("inspect", sampling_bundle).out
    shown = json.loads(call("inspect", sampling_bundle, "--json").out)["sampling"]
    assert shown == {"temperature": 90.0, "top_k": 200, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert any(line.split() == ["sampling", "greedy"] for line in call("inspect", tiny_bundle).out.splitlines())


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([], "not a JSON object"),
        ({"stop": "x"}, "unsupported field in generation.json: stop"),
        ({"top_p": 2}, "top_p = 2"),
    ],
)
def test_damaged_sampling_of_a_bundle_is_refused(content: Any, word: str, sampling_bundle: Path) -> None:
    write(sampling_bundle, content)
    with pytest.raises(BundleError, match=r"generation\.json") as raised:
        released_sampling(Bundle.open(sampling_bundle).optional_text(GENERATION))
    assert word in str(raised.value)
