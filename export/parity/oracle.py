"""Hugging Face transformers on the same checkpoint and the same prompts: what every step is held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.families import Family
from moevlm.export.parity.cases import Case
from moevlm.export.parity.dequantized import dequantized
from moevlm.export.parity.oracle_adapter import merge_when_run
from moevlm.export.parity.oracle_images import IMAGE_TYPES, Features, oracle_images
from moevlm.export.parity.oracle_weights import OracleWeights
from moevlm.runtime.core.errors import CheckpointError, reason, shown
from moevlm.runtime.core.towers import VisionMetadata

Routed = tuple[torch.Tensor, torch.Tensor]  # logits [T, E] and chosen experts [T, k]


@dataclass(frozen=True)
class ReferenceOutput:
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
    """The checkpoint in transformers, float32, attention and experts written out, a layer in memory at a time.

    Raises CheckpointError if it does not load.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, vision: VisionMetadata | None) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._family, self._vision, self._adapter = family, vision, checkpoint.adapter
        try:
            config = reference_config(checkpoint, family)
            with torch.device("meta"):
                self.model = (
                    auto_model(vision)
                    .from_config(
                        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
                    )
                    .eval()
                )
            family.mend(self.model)
            self.weights = OracleWeights(self.model, dequantized(checkpoint), family.older)
        except Exception as error:  # whatever a config makes of it: it is not this project's code that refuses
            raise CheckpointError(f"transformers cannot load {checkpoint.directory}: {reason(error)}") from error

    @torch.no_grad()
    def outputs(
        self, cases: list[Case], progress: Callable[[int, int], None] = lambda *_: None
    ) -> list[ReferenceOutput]:
        """Run all cases, prompts and continuations, in one pass of the model, layer by layer; once.

        Short rows are filled up with more of their last token: attention is causal, so no token sees a later one.
        progress: called with the number of parts that ran and their total.
        """
        length = max(len(case.whole.ids) for case in cases)
        filled = [np.pad(case.whole.ids, (0, length - len(case.whole.ids)), mode="edge") for case in cases]
        ids, wanted = torch.from_numpy(np.stack(filled)), torch.zeros(len(cases), length, dtype=torch.bool)
        for row, case in enumerate(cases):
            wanted[row, : len(case.whole.ids)] = True
        routers: list[Routed] = []
        features: list[Features] = []
        for name, module in self.model.named_modules():
            if name.endswith(self._family.router_suffix):
                module.register_forward_hook(lambda _m, _i, out: routers.append(self._family.routed(out)))
        if self._vision is not None:
            oracle_images(self._vision).watch(self.model, features.append)
        self.model.get_output_embeddings().register_forward_pre_hook(lambda _m, inputs: (inputs[0][wanted],))
        self.weights.stream()
        if self._adapter is not None:
            merge_when_run(self.model, self.weights.parts, self._adapter.updates)
        for done, part in enumerate(self.weights.parts.values()):
            part.register_forward_hook(lambda _m, _i, _o, done=done: progress(done + 1, len(self.weights.parts)))
        inputs = inputs_of(self.model.config, self._vision, ids, cases)
        logits = self.model(**inputs, use_cache=False).logits.numpy()
        mask = None if (types := inputs.get(IMAGE_TYPES)) is None else types.flatten().bool()
        routers = routers if mask is None else _joined(routers, mask)
        embeds, levels = features[0] if features else (torch.zeros(0, 0), ())
        deepstack = torch.stack(list(levels)).numpy() if levels else np.zeros((0, len(embeds), 0), np.float32)
        outputs, row, image_row = [], 0, 0
        for number, case in enumerate(cases):
            size, whole = len(case.prompt.ids), len(case.whole.ids)
            tokens = slice(number * length, number * length + size)
            images = slice(image_row, image_row + case.prompt.image_tokens)
            outputs.append(
                ReferenceOutput(
                    embeds=embeds.numpy()[images],
                    deepstack=deepstack[:, images],
                    prefill=logits[row : row + size],
                    decode=logits[row + size : row + whole],
                    routing=[index[tokens].numpy() for _, index in routers],
                    router_logits=[logits[tokens].numpy() for logits, _ in routers],
                )
            )
            row, image_row = row + whole, images.stop
        return outputs


def _joined(routers: list[Routed], is_image: torch.Tensor) -> list[Routed]:
    """Of two routers a layer, the first for text and the second for images: as if they were one.

    Of one, where there are no images. is_image: [T] bool.
    """
    if not is_image.any():
        return routers
    joined = []
    for text, images in zip(routers[::2], routers[1::2], strict=True):
        whole = [torch.empty(len(is_image), one.shape[1], dtype=one.dtype) for one in text]
        for rows, of_text, of_images in zip(whole, text, images, strict=True):
            rows[~is_image], rows[is_image] = of_text, of_images
        joined.append((whole[0], whole[1]))
    return joined


def reference_config(checkpoint: Checkpoint, family: Family) -> Any:
    """transformers' config of the family's part of a checkpoint.

    Of a model_type that transformers does not know it is that of the architecture (Kimi-K2). Raises CheckpointError
    for one that it does not know, either.
    """
    given, directory = checkpoint.config, checkpoint.directory
    if given["model_type"] in transformers.CONFIG_MAPPING:
        config: Any = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    else:
        names = given.get("architectures")
        name = names[0] if isinstance(names, list) and names else ""
        kind = getattr(getattr(transformers, str(name), None), "config_class", None)
        if kind is None:
            allowed = f"a model of transformers {transformers.__version__} first"
            raise CheckpointError(f"invalid value in config.json: architectures = {shown(names)} (allowed: {allowed})")
        config = kind.from_dict({**given, "model_type": kind.model_type})
    return getattr(config, family.part) if family.part else config


def auto_model(vision: VisionMetadata | None) -> Any:
    """transformers' class for models with such a tower, or with none."""
    return transformers.AutoModelForCausalLM if vision is None else transformers.AutoModelForImageTextToText


def inputs_of(
    config: Any, vision: VisionMetadata | None, ids: torch.Tensor, cases: Sequence[Case]
) -> dict[str, torch.Tensor]:
    """What a model of transformers is called with. config: its own. ids: [B, S] int64, a case a row."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # without a mask, Qwen3-Omni sees no images
    if vision is not None:
        inputs |= oracle_images(vision).types(ids, config)
    if vision is not None and any(case.grids for case in cases):
        inputs |= oracle_images(vision).inputs(cases, vision)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs
