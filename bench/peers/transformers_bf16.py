"""Hugging Face transformers in bfloat16, experts by grouped matrix products, in the project's own environment."""

from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench.peers.protocol import System, Timed, arguments, serve


class TransformersBf16(System):
    """Eager mode, a dynamic cache, scaled-dot-product attention; logits of the last position alone."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.bfloat16, experts_implementation="grouped_mm", attn_implementation="sdpa"
        ).eval()
        self._images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.vocabulary = self._model.config.text_config.vocab_size
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def prefill(self, ids: np.ndarray) -> Timed:
        cache = self._cache()
        started = perf_counter()
        chosen = self._step(ids[None], 0, cache)
        return perf_counter() - started, int(chosen[0])

    def decode(self, history: np.ndarray, steps: np.ndarray) -> Timed:
        cache, past = self._cache(), history.shape[1]
        self._step(history, 0, cache)
        started = perf_counter()
        for i, column in enumerate(steps.T):
            chosen = self._step(column[:, None], past + i, cache)
        return perf_counter() - started, int(chosen[0])

    def first_token(self, pixels: np.ndarray, ids: np.ndarray) -> Timed:
        image, config, cache = Image.fromarray(pixels), self._model.config, self._cache()
        started = perf_counter()
        inputs = self._images(images=[image], return_tensors="pt")
        count = int(inputs["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
        tokens = torch.from_numpy(np.concatenate([np.full(count, config.image_token_id), ids])[None])
        out = self._model(
            input_ids=tokens,
            mm_token_type_ids=(tokens == config.image_token_id).int(),
            past_key_values=cache,
            logits_to_keep=1,
            **inputs,
        )
        chosen = int(out.logits[0, -1].argmax())
        return perf_counter() - started, chosen

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config.text_config)

    def _step(self, ids: np.ndarray, past: int, cache: DynamicCache) -> torch.Tensor:
        """ids: [B, S] after `past` tokens. Returns the argmax [B] behind each row."""
        positions = torch.arange(past, past + ids.shape[1]).expand(3, *ids.shape)
        tokens = torch.from_numpy(np.ascontiguousarray(ids))
        out = self._model(input_ids=tokens, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)


if __name__ == "__main__":
    given = arguments(__doc__)
    serve(lambda: TransformersBf16(given.checkpoint, given.threads))
