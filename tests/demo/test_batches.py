"""Template, answer mask and patches agree with transformers."""

import numpy as np
import pytest

from demo import images, tasks, tokenizer
from demo.batches import Encoder, patches
from demo.model import image_processor


@pytest.fixture(scope="module")
def encoder():
    rng = np.random.default_rng(0)
    turns = [turn for _ in range(300) for turn in tasks.draw(rng).turns]
    return Encoder(tokenizer.train(text for turn in turns for text in (turn.question, turn.answer)))


def test_template_renders_turns_images_and_system(encoder):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And now?"},
    ]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi?<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_tokenizer_keeps_any_text_and_splits_figures_and_han(encoder):
    words = encoder.tokenizer
    text = "Read 407 / 12! 一千零五 naïve\n\n?"
    assert words.decode(words.encode(text)) == text
    assert len(words) == tokenizer.VOCAB_SIZE
    assert len(words.encode("407")) == 3


def test_answer_mask_covers_each_answer_and_its_end(encoder):
    rng = np.random.default_rng(3)
    for task in tasks.TASKS:
        sample = tasks.TASKS[task][0](rng, False)
        item = encoder.encode(sample, rng)
        kept = [i for i, keep in zip(item.ids, item.is_answer, strict=True) if keep]
        wanted = "".join(f"{turn.answer}<|im_end|>" for turn in sample.turns)
        assert encoder.tokenizer.decode(kept) == wanted


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 5), (3, 3)])
def test_patches_equal_the_image_processor(shape):
    rng = np.random.default_rng(4)
    picture = images.render(images.draw_grid(rng, *shape, held_out=False), rng)
    rows, grid = patches(picture)
    theirs = image_processor()(images=[picture], return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    np.testing.assert_allclose(rows, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_photo_is_shrunk_into_the_position_table():
    photo = np.zeros((900, 1200, 3), np.uint8)
    _, height, width = image_processor()(images=[photo], return_tensors="np")["image_grid_thw"][0]
    assert height * width <= 256
