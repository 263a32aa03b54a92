"""Hugging Face transformers on the same checkpoint and the same prompts: what every step is held to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from moevlm.export.parity_cases import Case
from moevlm.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Answer:
    """What transformers computes for one case, float32.

    embeds [V, H], deepstack [L, V, H]: of its images. prefill [S, vocabulary], decode [DECODE_STEPS, vocabulary]:
    logits of the prompt's positions and of those behind it.
    routing, router_logits: per sparse layer of the prompt expert indices [S, k], in no particular order, and logits
    [S, E].
    """

    embeds: np.ndarray
    deepstack: np.ndarray
    prefill: np.ndarray
    decode: np.ndarray
    routing: list[np.ndarray]
    router_logits: list[np.ndarray]


class Oracle:
    """The checkpoint in transformers, float32, attention written out. Raises CheckpointError if it does not load."""

    def __init__(self, checkpoint: Path, router_suffix: str) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self.model = transformers.AutoModelForImageTextToText.from_pretrained(
                checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            ).eval()
        except Exception as error:  # whatever a config makes of it: it is not this project's code that refuses
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"transformers cannot load {checkpoint}: {reason}") from error
        self._routers = [m for name, m in self.model.named_modules() if name.endswith(router_suffix)]

    @torch.no_grad()
    def answer(self, case: Case) -> Answer:
        """Run one case alone, prompt and continuation in one pass: attention is causal, no token sees a later one."""
        ids = torch.from_numpy(case.whole.ids)[None]
        inputs, embeds, deepstack = {"input_ids": ids}, np.zeros((0, 0), np.float32), np.zeros((0, 0, 0), np.float32)
        if case.grids:
            pixels, grid = torch.from_numpy(case.patches), torch.tensor([[1, h, w] for h, w in case.grids])
            features = self.model.model.visual(pixels, grid_thw=grid)
            embeds = features.pooler_output.numpy()
            levels = getattr(features, "deepstack_features", None)
            deepstack = torch.stack(levels).numpy() if levels else deepstack
            is_image = (ids == self.model.config.image_token_id).int()
            inputs |= {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image}
        routers: list[tuple[torch.Tensor, ...]] = []
        hooks = [r.register_forward_hook(lambda _m, _i, out: routers.append(out)) for r in self._routers]
        logits = self.model(**inputs, use_cache=False).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        size = len(case.prompt.ids)
        routing = [index[:size].numpy() for _, _, index in routers]
        router_logits = [scores[:size].numpy() for scores, _, _ in routers]
        return Answer(embeds, deepstack, logits[:size], logits[size:], routing, router_logits)
