"""Samples -> tensors: token ids, answer mask, patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from demo import tasks
from demo.images import render
from demo.model import VISION

PATCH, MERGE, FRAMES = (VISION[k] for k in ("patch_size", "spatial_merge_size", "temporal_patch_size"))
SORTED_BATCHES = 8  # samples are sorted by length within this many batches


def patches(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """What Qwen2VLImageProcessor gives for an image that needs no resizing.

    image: [H, W, 3] uint8. Returns (patches [P, 3 * FRAMES * PATCH**2] float32, (1, gh, gw)).
    """
    height, width = image.shape[0] // PATCH, image.shape[1] // PATCH
    scaled = image.astype(np.float32) * np.float32(2 / 255) - np.float32(1)
    blocks = scaled.reshape(height // MERGE, MERGE, PATCH, width // MERGE, MERGE, PATCH, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(height * width, 3, 1, PATCH * PATCH)
    return np.repeat(blocks, FRAMES, axis=2).reshape(height * width, -1), (1, height, width)


@dataclass
class Encoded:
    ids: list[int]
    is_answer: list[bool]
    patches: list[np.ndarray]
    grids: list[tuple[int, int, int]]
    cells: list[tuple[int, int, int]]


class Encoder:
    """Encodes samples with the tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.head = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad = tokenizer.pad_token_id
        self.image = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def prompt(self, messages: list[dict], grids: Sequence[tuple[int, int, int]], generate: bool) -> list[int]:
        """Token ids, with one image token per merged patch."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        pieces = str(text).split("<|image_pad|>")
        for number, (_, height, width) in enumerate(grids):
            pieces[number] += "<|image_pad|>" * (height * width // MERGE**2)
        return self.tokenizer.encode("".join(pieces), add_special_tokens=False)

    def encode(self, sample: tasks.Sample, rng: np.random.Generator) -> Encoded:
        cut = [patches(render(grid, rng)) for grid in sample.grids]
        grids = [grid for _, grid in cut]
        ids = self.prompt(sample.messages(), grids, generate=False)
        cells = [
            (value, row, column)
            for grid in sample.grids
            for row, line in enumerate(grid.values)
            for column, value in enumerate(line)
        ]
        return Encoded(ids, self._answers(ids), [rows for rows, _ in cut], grids, cells)

    def _answers(self, ids: list[int]) -> list[bool]:
        """Marks each assistant turn, its end token included."""
        mask, inside, head = [False] * len(ids), False, self.head
        for i in range(len(ids)):
            if inside:
                mask[i] = True
                inside = ids[i] != self.end
            elif ids[i + 1 - len(head) : i + 1] == head:
                inside = True
        return mask

    def collate(self, items: list[Encoded]) -> dict[str, torch.Tensor]:
        length = max(len(item.ids) for item in items)
        ids = torch.full((len(items), length), self.pad)
        attend = torch.zeros(len(items), length, dtype=torch.long)
        answer = torch.zeros(len(items), length, dtype=torch.bool)
        for row, item in enumerate(items):
            ids[row, : len(item.ids)] = torch.tensor(item.ids)
            attend[row, : len(item.ids)] = 1
            answer[row, : len(item.ids)] = torch.tensor(item.is_answer)
        batch = {"input_ids": ids, "attention_mask": attend, "answer": answer}
        batch["mm_token_type_ids"] = (ids == self.image).int()
        if any(item.grids for item in items):
            rows = [patch for item in items for patch in item.patches]
            batch["pixel_values"] = torch.from_numpy(np.concatenate(rows))
            batch["image_grid_thw"] = torch.tensor([g for item in items for g in item.grids])
            batch["cells"] = torch.tensor([cell for item in items for cell in item.cells])
        return batch


class Stream(IterableDataset):
    """Endless training batches; samples of similar length are padded together."""

    def __init__(self, encoder: Encoder, size: int, seed: int) -> None:
        self.encoder, self.size, self.seed = encoder, size, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = np.random.default_rng(self.seed)
        while True:
            draws = (tasks.draw(rng) for _ in range(self.size * SORTED_BATCHES))
            items = [self.encoder.encode(sample, rng) for sample in draws]
            items.sort(key=lambda item: len(item.ids))
            for start in rng.permutation(SORTED_BATCHES) * self.size:
                yield self.encoder.collate(items[start : start + self.size])


def stream(encoder: Encoder, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches, made one process ahead of the training loop."""
    loader = DataLoader(Stream(encoder, size, seed), batch_size=None, num_workers=1, prefetch_factor=16)
    return iter(loader)
