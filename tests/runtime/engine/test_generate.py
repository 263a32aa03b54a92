import gc
import io
import weakref
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from moevlm.runtime.core.errors import BundleError, EngineError, RequestError
from moevlm.runtime.core.manifest import LayerMetadata, ModelMetadata, RopeMetadata
from moevlm.runtime.core.states import PagedKV
from moevlm.runtime.engine.answer import Piece
from moevlm.runtime.engine.candidates import candidates_of
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.protocol import check_step
from moevlm.runtime.engine.step import EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, VisualFeatures, joined
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.positions import rope_positions, rope_tables
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampler import Sampler
from moevlm.runtime.request.sampling import SamplingParams
from moevlm.runtime.request.tokenizer import Tokenizer
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.paged_engine import TOWER

SPECIAL = ["<|end|>", "<|start|>", "<|image|>"]
END, START, IMAGE = range(3)
VOCABULARY = 3 + 256
CONTEXT = 200
HIDDEN = 24
TEMPLATE = """\
{% for message in messages %}
<|start|>{{ message.role }}
{% if message.content is string %}
{{ message.content }}
{%- else %}
{% for part in message.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}
{% endif %}
<|end|>
{% endfor %}
{% if add_generation_prompt %}<|start|>assistant
{% endif %}
"""
MODEL = ModelMetadata(
    model_type="toy",
    hidden=HIDDEN,
    vocabulary=VOCABULARY,
    context=CONTEXT,
    layers=(LayerMetadata(heads=1, kv_heads=1, key_dim=8, value_dim=8, experts=1, top_k=1),),
    eos_token_ids=(END,),
    image_token_id=IMAGE,
    ropes=(RopeMetadata(dim=8, theta=100.0, sections=(2, 1, 1), interleaved=False),),
    vision=TOWER,
)
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}


PAGE = 8  # tokens


class ToyEngine:
    """Logits of a token depend on the content, the order and the rope tables of all tokens up to it."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.limits = EngineLimits(1, 1 << 20, 1 << 20, CONTEXT, PAGE)
        self.states = (PagedKV(layer=0, kv_heads=1, key_dim=8, value_dim=8),)
        self.embedding = rng.standard_normal((VOCABULARY, HIDDEN))
        self.rotate = rng.standard_normal((MODEL.ropes[0].dim, HIDDEN)) * 2
        self.head = rng.standard_normal((HIDDEN, VOCABULARY))
        self.head[:, [END, IMAGE]] = 0
        self.steps: list[Step] = []
        self.encoded: list[VisionInputs] = []
        self.fail_at_step: BaseException | None = None
        self.owner: Runtime | None = None  # whose pages they are

    def encode(self, inputs: VisionInputs, *_: object) -> HostFeatures:
        self.encoded.append(inputs)
        blocks = inputs.pixel_patches.reshape(-1, MODEL.vision.merge_size**2, inputs.pixel_patches.shape[1])
        features = blocks[:, 0, :HIDDEN] * 3
        return HostFeatures(features.astype(np.float32), np.zeros((0, *features.shape), np.float32))

    def reserve(self, pages: int, rows: int) -> None:
        # Nothing that was not written may be read: it would make the logits NaN.
        self.pages = np.full((pages, PAGE, HIDDEN), np.nan)
        self.rows = rows

    def tokens(self, step: Step, visual: Sequence[FeatureRows]) -> np.ndarray:
        """[T, H] of a step alone."""
        value = self.embedding[step.input_ids]
        if visual:
            value = np.where(step.visual_index[..., None] >= 0, joined(visual).embeds[step.visual_index], value)
        return value + np.concatenate(step.rope["0"], -1) @ self.rotate

    def read(self, values: np.ndarray) -> np.ndarray:
        """Logits after a sequence [n, H]: later tokens count more."""
        weight = 1 / np.arange(len(values), 0, -1)
        return np.tanh(weight @ values) @ self.head

    def forward(self, step: Step, visual: Sequence[FeatureRows] = (), *_: object) -> StepOutput:
        self.steps.append(step)
        if self.fail_at_step is not None and len(self.steps) > 2:
            raise self.fail_at_step
        assert visual or (step.visual_index < 0).all()
        check_step(step, visual, self.limits, MODEL, len(self.pages), self.rows)
        (kept,) = step.context_len.tolist()
        for place, value in enumerate(self.tokens(step, visual), kept):
            self.pages[step.page_table[0, place // PAGE], place % PAGE] = value
        whole = self.pages[step.page_table[0]].reshape(-1, HIDDEN)
        logits = np.array([self.read(whole[: kept + i + 1]) for i in step.logits_index], np.float32)
        return self.output(logits.reshape(-1, VOCABULARY))

    def output(self, logits: np.ndarray) -> StepOutput:
        return StepOutput(candidates_of(logits, 256), logits.__getitem__)

    def close(self) -> None:
        pass


def _free(runtime: Runtime) -> bool:
    """Whether all pages that were reserved are free again."""
    assert isinstance(runtime.engine, ToyEngine)
    return runtime.loop.used_pages == 0


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE({**{t: i for i, t in enumerate(SPECIAL)}, **{c: i + 3 for i, c in enumerate(alphabet)}}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return Tokenizer(core.to_str())


TOKENIZER = _tokenizer()


def _runtime(engine: ToyEngine | None = None, chunk_tokens: int = 512) -> Runtime:
    images = image_processor(PREPROCESSOR, MODEL.vision)
    engine = engine or ToyEngine()
    engine.owner = Runtime(MODEL, TOKENIZER, ChatTemplate(TEMPLATE), engine, images, chunk_tokens=chunk_tokens)
    return engine.owner


def _picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _text(content: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


TWO_IMAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Compare "},
            {"type": "image", "image": _picture(24, 16, 1)},
            {"type": "text", "text": " and "},
            {"type": "image", "image": _picture(8, 32, 2)},
        ],
    },
    {"role": "assistant", "content": "Both are noise."},
    {"role": "user", "content": "Why?"},
]


def _whole(engine: ToyEngine, prompt: Prompt, ids: list[int], visual: Sequence[VisualFeatures] = ()) -> np.ndarray:
    """Logits after `ids`, the prompt's and later ones, without pages: positions by the rule itself."""
    n = len(ids) - len(prompt.ids)
    positions = np.concatenate([prompt.positions, np.tile(prompt.next_position + np.arange(n), (3, 1))], axis=1)
    index, nothing = np.concatenate([prompt.visual_index, np.full(n, -1)]), np.zeros(1, np.int32)
    step = Step(np.array(ids), index, {"0": rope_tables(positions, MODEL.ropes[0])}, *[nothing] * 5)
    return engine.read(engine.tokens(step, [FeatureRows.all_of(one) for one in visual])).astype(np.float32)


def _expected_ids(engine: ToyEngine, prompt: Prompt, visual: Sequence[VisualFeatures], count: int) -> list[int]:
    """Greedy continuation: the whole sequence again for each token."""
    ids = prompt.ids.tolist()
    for _ in range(count):
        ids.append(int(_whole(engine, prompt, ids, visual).argmax()))
    return ids[len(prompt.ids) :]


def _ids(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 16, 512])
def test_generation_in_chunks_equals_the_whole_sequence_without_a_cache(chunk_tokens):
    engine = ToyEngine()
    runtime = _runtime(engine, chunk_tokens)
    prompt = runtime.prompt(TWO_IMAGES)
    expected = _expected_ids(engine, prompt, runtime.encode([prompt]), 12)
    assert len(set(expected)) > 3
    pieces = list(runtime.generate(TWO_IMAGES, max_new_tokens=12))
    assert _ids(pieces) == expected
    prefill = engine.steps[:-11]
    assert [step.tokens for step in prefill[:-1]] == [chunk_tokens] * (len(prefill) - 1)
    assert sum(step.tokens for step in prefill) == len(prompt.ids)
    assert [len(step.logits_index) for step in engine.steps] == [0] * (len(prefill) - 1) + [1] * 12
    assert len(engine.encoded) == 2  # one packed call by this test, one by generate


def test_prompt_places_images_and_text():
    runtime = _runtime()
    prompt = runtime.prompt(TWO_IMAGES)
    is_image = prompt.ids == IMAGE
    assert prompt.image_tokens == is_image.sum() == 3 * 2 + 1 * 4
    assert prompt.visual_index[is_image].tolist() == list(range(10))
    assert (prompt.visual_index[~is_image] == -1).all()
    positions, next_position = rope_positions(prompt.ids, [(4, 6), (8, 2)], MODEL)
    assert (prompt.positions == positions).all()
    assert prompt.next_position == next_position < len(prompt.ids)


def test_another_image_gives_another_answer():
    other = [
        {"role": "user", "content": [*TWO_IMAGES[0]["content"][:3], {"type": "image", "image": _picture(8, 32, 3)}]}
    ]
    same = [{"role": "user", "content": TWO_IMAGES[0]["content"]}]
    answers = [_ids(list(_runtime().generate(m, max_new_tokens=16))) for m in (same, other, same)]
    assert answers[0] == answers[2] != answers[1]


def test_text_pieces_usage_and_length():
    runtime = _runtime()
    pieces = list(runtime.generate(TWO_IMAGES, max_new_tokens=9, logprobs=2))
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(_ids(pieces))
    assert [piece.finish_reason for piece in pieces] == [None] * 8 + ["length"]
    assert [len(piece.sampled[0].top) for piece in pieces] == [2] * 9
    assert all(piece.sampled[0].logprob == piece.sampled[0].top[0][1] for piece in pieces)  # greedy
    assert all(piece.usage is None for piece in pieces[:-1])
    usage = pieces[-1].usage
    assert usage is not None
    prompt = runtime.prompt(TWO_IMAGES)
    assert (usage.prompt_tokens, usage.image_tokens, usage.new_tokens) == (len(prompt.ids), 10, 9)
    assert min(usage.vision_seconds, usage.prefill_seconds, usage.decode_seconds) > 0


class Scripted(ToyEngine):
    """Writes a given text, then ends the sequence."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.script = [*TOKENIZER.encode(text), END]
        self.at = 0

    def output(self, logits: np.ndarray) -> StepOutput:
        scripted = np.zeros_like(logits)
        scripted[:, self.script[self.at % len(self.script)]] = 1
        self.at += 1
        return super().output(scripted)


def test_end_of_sequence_stops_and_its_token_has_no_text():
    pieces = list(_runtime(Scripted("fine 今天")).generate(_text("hi"), max_new_tokens=50))
    assert "".join(piece.text for piece in pieces) == "fine 今天"
    assert pieces[-1].token_ids == (END,)
    assert pieces[-1].finish_reason == "stop"


def test_end_of_sequence_token_that_is_not_special_has_no_text_either():
    model = msgspec.structs.replace(MODEL, eos_token_ids=(END, TOKENIZER.encode(".")[0]))
    runtime = Runtime(model, TOKENIZER, ChatTemplate(TEMPLATE), Scripted("fine. more"))
    assert "".join(piece.text for piece in runtime.generate(_text("hi"))) == "fine"


def test_ignore_eos_goes_on_to_the_length():
    pieces = list(_runtime(Scripted("ab")).generate(_text("hi"), max_new_tokens=8, ignore_eos=True))
    assert "".join(piece.text for piece in pieces) == "ababab"
    assert len(pieces) == 8
    assert pieces[-1].finish_reason == "length"


def test_stop_string_is_held_back_and_never_shown():
    pieces = list(_runtime(Scripted("one two. STOP more")).generate(_text("hi"), stop=(" STOP", "XX")))
    assert "".join(piece.text for piece in pieces) == "one two."
    assert not any("S" in piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("limit", [None, 6])
def test_held_text_comes_out_when_the_sequence_ends_without_the_stop(limit):
    params = {"max_new_tokens": limit} if limit else {}
    pieces = list(_runtime(Scripted("one ST")).generate(_text("hi"), stop=("STOP",), **params))
    assert "".join(piece.text for piece in pieces) == "one ST"
    assert pieces[-1].finish_reason == ("length" if limit else "stop")


def test_same_seed_same_text_and_the_penalty_sees_the_prompt():
    runtime = _runtime()

    def text(**options: object) -> list[int]:
        return _ids(list(runtime.generate(_text("hi"), max_new_tokens=20, **options)))

    assert text(temperature=1.5, seed=4) == text(temperature=1.5, seed=4)
    assert text(temperature=1.5, seed=4) != text(temperature=1.5, seed=5)

    prompt = runtime.prompt(_text("hi"))
    plain = text()
    assert isinstance(runtime.engine, ToyEngine)
    runtime.engine.steps.clear()
    penalized = text(repetition_penalty=50.0)
    assert penalized != plain
    # Of every step but the last, the logits again: each token is the penalized best of the one before.
    history = prompt.ids.tolist()
    sampler = Sampler(SamplingParams(repetition_penalty=50.0), history)
    engine = ToyEngine()
    for token in penalized:
        value = _whole(engine, prompt, history)
        assert sampler.sample(value).token_id == token
        history.append(token)


def test_overrides_go_on_top_of_params():
    runtime = _runtime(Scripted("abcdef"))
    pieces = list(runtime.generate(_text("hi"), params=SamplingParams(max_new_tokens=2, stop=("b",)), max_new_tokens=5))
    assert "".join(piece.text for piece in pieces) == "a"
    with pytest.raises(RequestError, match="unsupported option max_tokens"):
        runtime.generate(_text("hi"), max_tokens=5)
    with pytest.raises(RequestError, match="top_p = 2"):
        runtime.generate(_text("hi"), top_p=2)


def test_new_tokens_are_cut_to_what_the_context_leaves():
    engine = ToyEngine()
    runtime = _runtime(engine)
    message = _text("x" * 150)
    room = CONTEXT - len(runtime.prompt(message).ids)
    pieces = list(runtime.generate(message, max_new_tokens=10_000))
    assert len(pieces) == room < 50
    assert pieces[-1].finish_reason == "length"


def test_too_long_or_empty_prompt_is_refused_before_any_work():
    engine = ToyEngine()
    runtime = _runtime(engine)
    overhead = len(runtime.prompt(_text("x")).ids) - 1
    with pytest.raises(RequestError, match=rf"has {CONTEXT + 1} tokens, the model's context {CONTEXT}"):
        runtime.generate(_text("x" * (CONTEXT + 1 - overhead)))
    with pytest.raises(RequestError, match=rf"has {CONTEXT} tokens and leaves no room .* of {CONTEXT}"):
        runtime.generate(_text("x" * (CONTEXT - overhead)))
    with pytest.raises(RequestError, match="empty"):
        runtime.generate([])
    with pytest.raises(RequestError, match="empty"):
        runtime.generate(_text(""))
    assert engine.steps == []


def test_too_many_images_are_refused_before_any_is_decoded(monkeypatch):
    monkeypatch.setattr(ImageProcessor, "open", lambda *_: pytest.fail("decoded"))
    picture = {"type": "image", "image": _picture(64, 64, 1)}  # 64 tokens
    remedy = r"\(max_image_tokens makes images smaller\)$"
    with pytest.raises(RequestError, match=rf"first 4 of the prompt's 5 images have 256 tokens, .* {CONTEXT} {remedy}"):
        _runtime().generate([{"role": "user", "content": [picture] * 5}])
    text = {"type": "text", "text": "x" * 100}
    with pytest.raises(RequestError, match=rf"^the prompt has 3\d\d tokens, the model's context {CONTEXT} {remedy}"):
        _runtime().generate([{"role": "user", "content": [*[picture] * 3, text]}])


def test_images_are_made_smaller_on_request():
    runtime = _runtime()
    picture = {"type": "image", "image": _picture(64, 64, 1)}
    small = {"type": "image", "image": _picture(24, 16, 1)}
    sized = {**picture, "max_pixels": 5 * 64}
    messages = [{"role": "user", "content": [*[picture] * 5, small, sized]}]
    prompt = runtime.prompt(messages, max_image_tokens=9)
    assert [image.size for image in prompt.images] == [(24, 24)] * 5 + [(24, 16), (16, 16)]
    assert prompt.image_tokens == 5 * 9 + 6 + 4
    assert runtime.generate(messages, max_image_tokens=9).usage.image_tokens == prompt.image_tokens
    loaded = image_processor(PREPROCESSOR, MODEL.vision, max_tokens=9)
    limited = Runtime(MODEL, TOKENIZER, ChatTemplate(TEMPLATE), ToyEngine(), loaded)
    np.testing.assert_array_equal(limited.prompt(messages).ids, prompt.ids)
    with pytest.raises(RequestError, match=r"^unsupported value max_image_tokens = 0 \(allowed: a whole number"):
        runtime.generate(_text("hi"), max_image_tokens=0)
    for most in (5, 0):
        with pytest.raises(RequestError, match="max_image_tokens has no effect on a prompt that is ready"):
            runtime.generate(prompt, max_image_tokens=most)


def test_an_image_may_come_from_a_file_or_a_stream(tmp_path):
    path = tmp_path / "picture.png"
    _picture(24, 16, 1).save(path)
    stream = io.BytesIO(b"before" + path.read_bytes())
    stream.seek(6)
    with path.open("rb") as file:
        prompts = [
            _runtime().prompt([{"role": "user", "content": [{"type": "image", "image": source}]}])
            for source in (_picture(24, 16, 1), path, path.read_bytes(), file, stream)
        ]
    for prompt in prompts:
        np.testing.assert_array_equal(prompt.ids, prompts[0].ids)
        np.testing.assert_array_equal(prompt.images[0], prompts[0].images[0])


def test_an_image_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path, decode = tmp_path / "picture.png", ImageProcessor.open
    _picture(24, 16, 1).save(path)

    def change(self, source):
        _picture(64, 64, 1).save(path)
        return decode(self, source)

    monkeypatch.setattr(ImageProcessor, "open", change)
    with pytest.raises(RequestError, match=r"^image 1 changed while it was read$"):
        _runtime().prompt([{"role": "user", "content": [{"type": "image", "image": path}]}])


def test_prompt_keeps_resized_images_only_and_generation_none():
    class Watching(ToyEngine):
        alive = None

        def forward(self, step: Step, visual: Sequence[FeatureRows] = (), *_: object) -> StepOutput:
            gc.collect()
            self.alive = image()
            return super().forward(step, visual)

    engine = Watching()
    runtime = _runtime(engine)
    prompt = runtime.prompt([{"role": "user", "content": [{"type": "image", "image": _picture(2000, 1000, 1)}]}])
    assert [(image.width, image.height) for image in prompt.images] == [(88, 40)]
    image = weakref.ref(prompt.images[0])
    stream = runtime.generate(prompt)
    del prompt
    next(stream)
    assert engine.encoded
    assert engine.alive is None


def test_runtime_without_a_tokenizer_continues_prompts_of_ids():
    runtime = Runtime(MODEL, None, None, ToyEngine())
    prompt = _runtime().prompt(_text("hi"))
    pieces = list(runtime.generate(prompt, max_new_tokens=6))
    assert _ids(pieces) == _ids(list(_runtime().generate(_text("hi"), max_new_tokens=6)))
    assert {piece.text for piece in pieces} == {""}
    assert pieces[-1].finish_reason == "length"
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        runtime.generate(_text("hi"))
    with pytest.raises(BundleError, match=r"no chat_template\.jinja"):
        Runtime(MODEL, TOKENIZER, None, ToyEngine()).generate(_text("hi"))


def test_ids_outside_the_vocabulary_and_unmatched_images_are_refused():
    with pytest.raises(RequestError, match=f"token id {VOCABULARY} is outside"):
        Prompt.from_ids([5, VOCABULARY], [], MODEL)
    with pytest.raises(RequestError, match="image tokens"):
        Prompt.from_ids([5, IMAGE], [], MODEL)
    prompt = Prompt.from_ids([5, *[IMAGE] * 6, 5], [(4, 6)], MODEL)
    with pytest.raises(EngineError, match="0 visual features for 6 image tokens"):
        list(_runtime().generate(prompt))


def test_runtime_without_image_input_refuses_images():
    runtime = Runtime(MODEL, TOKENIZER, ChatTemplate(TEMPLATE), ToyEngine())
    assert len(list(runtime.generate(_text("hi"), max_new_tokens=3))) == 3
    with pytest.raises(RequestError, match="2 images"):
        runtime.generate(TWO_IMAGES)


def test_closing_the_generator_frees_the_pages():
    runtime = _runtime()
    stream = runtime.generate(_text("hi"))
    next(stream)
    assert not _free(runtime)
    stream.close()
    assert _free(runtime)


def test_pages_are_free_when_the_last_piece_is_read():
    runtime = _runtime()
    stream = runtime.generate(_text("hi"), max_new_tokens=2)
    pieces = [next(stream), next(stream)]
    assert pieces[-1].finish_reason == "length"
    assert _free(runtime)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineError("broken")], ids=["ctrl-c", "engine"])
def test_interruption_comes_through_and_the_runtime_can_be_used_again(error):
    engine = ToyEngine()
    runtime = _runtime(engine)
    expected = _ids(list(_runtime().generate(_text("hi"), max_new_tokens=4)))
    engine.fail_at_step = error
    stream = runtime.generate(_text("hi"), max_new_tokens=4)
    with pytest.raises(type(error)) as caught:
        list(stream)
    assert caught.value is error
    assert _free(runtime)
    engine.fail_at_step = None
    assert _ids(list(runtime.generate(_text("hi"), max_new_tokens=4))) == expected


def test_pages_are_free_even_while_the_error_of_the_request_is_kept():
    engine = ToyEngine()
    engine.head[:] = np.nan
    runtime = _runtime(engine)
    with pytest.raises(EngineError, match="not usable") as caught:
        list(runtime.generate(_text("hi")))
    assert caught.tb is not None
    assert _free(runtime)


def test_two_streams_on_one_runtime_do_not_mix():
    runtime = _runtime()
    alone = [_ids(list(_runtime().generate(_text(t), max_new_tokens=10))) for t in ("hi", "you")]
    mixed = list(zip(*(runtime.generate(_text(t), max_new_tokens=10) for t in ("hi", "you")), strict=True))
    assert [_ids([pair[i] for pair in mixed]) for i in range(2)] == alone
    assert alone[0] != alone[1]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8"])
def test_chunk_size_is_checked(value):
    told = "true" if value is True else repr(value)
    with pytest.raises(RequestError, match=rf"chunk_tokens = {told} \(allowed: a whole number, 1 or more\)"):
        _runtime(chunk_tokens=value)
