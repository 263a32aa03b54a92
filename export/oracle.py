"""Hugging Face transformers on the same checkpoint and the same prompts: what every step is held to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from moevlm.export.parity_cases import Case
from moevlm.export.tolerances import GREEDY_TOKENS
from moevlm.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Answer:
    """What transformers computes for one case, float32.

    embeds [V, H], deepstack [L, V, H]: of its images. prefill [S, vocabulary], decode [GREEDY_TOKENS, vocabulary]:
    logits of the prompt's positions and of the greedy steps. tokens [GREEDY_TOKENS].
    routing, router_logits: per sparse layer expert indices [S, k], in no particular order, and logits [S, E].
    """

    embeds: np.ndarray
    deepstack: np.ndarray
    prefill: np.ndarray
    decode: np.ndarray
    tokens: np.ndarray
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
        # Greedy means greedy: the checkpoint's own penalties and bans would change the tokens.
        self.model.generation_config = transformers.GenerationConfig()
        self._routers = [m for name, m in self.model.named_modules() if name.endswith(router_suffix)]

    @torch.no_grad()
    def answer(self, case: Case) -> Answer:
        """Run one case alone, without padding."""
        ids = torch.from_numpy(case.prompt.ids)[None]
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
        prefill = self.model(**inputs).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        generated = self.model.generate(
            **inputs,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY_TOKENS,
            min_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        decode = torch.cat(generated.logits).numpy()
        tokens = generated.sequences[0, ids.shape[1] :].numpy()
        routing, logits = [index.numpy() for _, _, index in routers], [scores.numpy() for scores, _, _ in routers]
        return Answer(embeds, deepstack, prefill, decode, tokens, routing, logits)
