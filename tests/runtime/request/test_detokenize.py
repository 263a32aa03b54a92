import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core

from moevlm.runtime.request.detokenize import StreamDecoder
from moevlm.runtime.request.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat",
    "今天天气很好，我们去公园。",
    "naïve café ☕ déjà vu",
    "🙂🙃👩‍👩‍👧‍👦🇩🇪 ok",
    "a\n\nb\n\n",
] * 3


def _byte_level() -> Tokenizer:
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens(
        [AddedToken("<think>", special=False), AddedToken("a b", special=False), AddedToken("xabz", special=False)]
    )
    return Tokenizer(core.to_str())


TOKENIZER = _byte_level()
VOCABULARY = 383 + 5  # five rows of padding, as models have


def _stream(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    decoder = StreamDecoder(TOKENIZER, stop)
    pieces = [decoder.push(token) for token in ids]
    return [*pieces, decoder.flush()], decoder.stopped


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The spec, one character at a time: stop as soon as the text ends with a stop string."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def _random_split(text: str, seed: int) -> list[int]:
    """Token ids of `text` from a random segmentation of its bytes: characters are cut anywhere."""
    rng = random.Random(seed)
    data = text.encode()
    alphabet = _alphabet()
    ids: list[int] = []
    at = 0
    while at < len(data):
        sizes = [n for n in range(1, 9) if "".join(alphabet[b] for b in data[at : at + n]) in VOCAB]
        size = min(rng.choice(sizes), len(data) - at)
        ids.append(VOCAB["".join(alphabet[b] for b in data[at : at + size])])
        at += size
    return ids


def _alphabet() -> list[str]:
    """GPT-2's spelling of bytes as printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


VOCAB = {TOKENIZER.token(i): i for i in range(380)}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=80))
def test_pieces_of_any_ids_add_up_to_the_whole_text(ids):
    pieces, _ = _stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="今天気🙂👩\u200d🇩é☕�ab <>\n", max_size=60), st.integers(0, 1000))
def test_only_whole_characters_come_out_however_bytes_are_split(text, seed):
    ids = _random_split(text, seed)
    assert TOKENIZER.decode(ids) == text
    pieces, _ = _stream(ids)
    assert "".join(pieces) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


def test_emoji_comes_with_its_last_byte():
    ids = [VOCAB[_alphabet()[b]] for b in "é🙂".encode()]
    assert _stream(ids)[0] == ["", "é", "", "", "", "🙂", ""]


def test_unfinished_character_is_replaced_at_the_end():
    ids = [VOCAB[_alphabet()[b]] for b in b"ok" + "🙂".encode()[:3]]
    assert _stream(ids)[0] == ["o", "k", "", "", "", "�"]


def test_output_that_is_never_at_a_character_boundary_still_streams():
    tails = [b[2:] + a[:2] for a, b in zip(["天".encode()] * 40, ["天".encode()] * 40, strict=True)]
    ids = [VOCAB[_alphabet()[b]] for b in "天".encode()[:2]]
    decoder = StreamDecoder(TOKENIZER)
    text = "".join(decoder.push(token) for token in ids)
    for tail in tails:
        fresh = "".join(decoder.push(VOCAB[_alphabet()[b]]) for b in tail)
        assert fresh == "天"
        text += fresh
    assert text == "天" * 40


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "今", "\n", "🙂", "<", "aab"]), max_size=30),
    st.lists(st.sampled_from(["aab", "ab", "b\n", "\n\n", "今今", "🙂a", "bab🙂", "<<"]), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_text_ends_before_the_first_complete_stop_however_it_is_split(parts, stops, seed):
    text = "".join(parts)
    pieces, stopped = _stream(_random_split(text, seed), tuple(stops))
    assert "".join(pieces) == _cut(text, tuple(stops))
    assert (stopped is not None) == any(stop in text for stop in stops)


def test_beginning_of_a_stop_is_held_back_and_released_when_it_is_none():
    decoder = StreamDecoder(TOKENIZER, ("END",))
    assert [decoder.push(VOCAB[c]) for c in "xENzEND!"] == ["x", "", "", "ENz", "", "", "", ""]
    assert decoder.stopped == "END"
    assert decoder.flush() == ""


def test_held_text_comes_out_at_the_end_without_a_stop():
    decoder = StreamDecoder(TOKENIZER, ("END",))
    assert [decoder.push(VOCAB[c]) for c in "xEN"] == ["x", "", ""]
    assert decoder.flush() == "EN"
    assert decoder.stopped is None


def test_stop_inside_one_token_cuts_the_token():
    the = TOKENIZER.encode("the")
    assert len(the) == 1
    assert _stream([*the, VOCAB["x"]], ("h",)) == (["t", "", ""], "h")


def test_stop_that_is_complete_first_wins_within_one_token():
    whole = TOKENIZER.encode("xabz")
    assert len(whole) == 1
    for ids in (whole, [VOCAB[c] for c in "xabz"]):
        pieces, stopped = _stream(ids, ("xabz", "ab"))
        assert ("".join(pieces), stopped) == ("x", "ab")


def test_special_tokens_inside_a_character_do_not_break_it():
    data = [VOCAB[_alphabet()[b]] for b in "🙂".encode()]
    ids = [*data[:2], *[TOKENIZER.special["<|end|>"]] * 40, *data[2:]]
    assert "".join(_stream(ids)[0]) == TOKENIZER.decode(ids) == "🙂"


def test_special_and_unknown_ids_have_no_text():
    end = TOKENIZER.special["<|end|>"]
    assert "".join(_stream([end, VOCAB["a"], end, VOCABULARY - 1, VOCAB["b"]])[0]) == "ab"


@pytest.mark.parametrize("ids", [[VOCAB["a"]], [VOCAB[_alphabet()[0x80]]], [VOCAB[_alphabet()[0xE4]]]])
def test_work_per_token_does_not_grow_with_the_output(ids):
    decoded: list[int] = []

    class Counting:
        special_ids = TOKENIZER.special_ids
        token = staticmethod(TOKENIZER.token)

        def decode(self, window: list[int], skip_special_tokens: bool = True) -> str:
            decoded.append(len(window))
            return TOKENIZER.decode(window, skip_special_tokens)

    decoder = StreamDecoder(Counting(), ("never seen",))
    text = "".join(decoder.push(token) for token in ids * 500) + decoder.flush()
    assert text == TOKENIZER.decode(ids * 500)
    assert max(decoded) <= 16
    assert len(decoded) <= 2 * 500 + 1


def test_special_tokens_are_shown_where_they_are_not_to_be_skipped():
    end = TOKENIZER.special["<|end|>"]
    decoder = StreamDecoder(TOKENIZER, (), skip_special_tokens=False)
    ids = [VOCAB["a"], end, VOCAB["b"], end]
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == "a<|end|>b<|end|>"
    decoder = StreamDecoder(TOKENIZER, ("|>b",), skip_special_tokens=False)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == "a<|end"
    assert decoder.stopped == "|>b"


def test_special_token_without_text_may_be_a_stop():
    end = TOKENIZER.special["<|end|>"]
    decoder = StreamDecoder(TOKENIZER, ("xyz", "<|end|>"))
    assert "".join([*map(decoder.push, [VOCAB["a"], VOCAB["x"], end, VOCAB["b"]]), decoder.flush()]) == "ax"
    assert decoder.stopped == "<|end|>"
    decoder = StreamDecoder(TOKENIZER, ("xyz",))
    assert "".join([*map(decoder.push, [VOCAB["a"], VOCAB["x"], end, VOCAB["b"]]), decoder.flush()]) == "axb"
