"""transformers' own reading of a checkpoint, its names and conversions, for a few modules of a model at a time."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig

from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.families.names import Tensors
from moevlm.export.graph.rearranged import swap_last
from moevlm.export.graph.weights import Concat, Stack, Weight, read
from moevlm.export.modules.streaming import parts_of, stream
from moevlm.export.parity.dequantized import Dequantized
from moevlm.runtime.core.errors import CheckpointError


class OracleWeights:
    """Fills a model that is on the meta device, float32.

    model: what `from_config` made there. tensors: of the checkpoint, those in codes by the names of plain ones.
    older: see `families.base.Family`.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Weight], older: Mapping[str, str]) -> None:
        self._model, self._tensors, self._older = model, dict(tensors), older
        self._stored = self._stored_names()
        self._fuse_experts()
        self._compute_buffers()
        self.parts = parts_of(model, (PreTrainedModel, nn.ModuleList))
        inside = tuple(f"{name}." for name in self.parts)
        outside = [name for name in model.state_dict() if not name.startswith(inside)]
        self._read(outside)

    def stream(self) -> None:
        """Read each part just before it runs and release it behind that."""
        stream(self.parts, self.load)

    def load(self, part: str) -> None:
        """Read all tensors of a part. Raises CheckpointError for one that transformers does not find or fit in."""
        self._read([f"{part}.{name}" for name in self.parts[part].state_dict()])

    def _read(self, targets: list[str]) -> None:
        """Set these tensors of the model."""
        with ExitStack() as stack:
            files: dict[Path, safe_open] = {}
            state = {}
            for name, on_disk in (pair for target in targets for pair in self._on_disk(target).items()):
                tensor = self._tensors[on_disk]
                if not isinstance(tensor, Stored):
                    state[name] = self._made(name, tensor)
                    continue
                path = tensor.path
                if path not in files:  # and closed behind this part: pages of a map count as memory in use
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                state[name] = files[path].get_slice(on_disk)
            conversions: Any = get_model_conversion_mapping(self._model)
            config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=conversions)
            self._model._load_pretrained_model(self._model, state, None, config)
        for target in targets:
            if self._model.get_parameter_or_buffer(target).is_meta:
                raise CheckpointError(f"transformers finds no tensor of the right shape for {target} in the checkpoint")

    def _made(self, name: str, tensor: Weight) -> torch.Tensor:
        """A tensor that is stored otherwise, the way round that the model has it."""
        if not isinstance(tensor, Dequantized):
            return torch.from_numpy(read(tensor))
        whole = tensor.make().float()
        module = self._model.get_submodule(name.rpartition(".")[0]) if tensor.out_in else None
        return whole.mT.contiguous() if getattr(module, "is_transposed", False) else whole

    def _on_disk(self, target: str) -> dict[str, str]:
        """The parts of a tensor of the model: names that transformers' loader takes for it, to names on disk."""
        if target in self._stored:
            return {name: name for name in self._stored[target]}
        twin = self._model.all_tied_weights_keys.get(target, "")
        return dict.fromkeys([target], self._stored[twin][0]) if twin in self._stored else {}

    def _stored_names(self) -> dict[str, list[str]]:
        """Per tensor of the model the names on disk that it is made of, as transformers says."""
        model, state = self._model, self._model.state_dict()
        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        stored = defaultdict(list)
        for name in self._tensors:
            target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            stored[target].append(name)
        return dict(stored)

    def _fuse_experts(self) -> None:
        """Experts that lie one by one, which transformers does not read for every model that has them fused."""
        on_disk = Tensors(self._tensors, older=self._older)
        for name, tensor in self._model.state_dict().items():
            base, _, last = name.rpartition(".")
            parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
            experts = [[f"{base}.{e}.{part}.weight" for part in parts] for e in range(len(tensor) if parts else 0)]
            if name in self._stored or not experts or not all(part in on_disk for part in chain(*experts)):
                continue
            fused = Stack([Concat([on_disk[part] for part in expert]) for expert in experts])
            self._tensors[name] = fused if fused.shape == tuple(tensor.shape) else swap_last(fused)
            self._stored[name] = [name]

    def _compute_buffers(self) -> None:
        """Tensors that no checkpoint holds, such as rotary frequencies, stay in memory."""
        for name, buffer in self._model.named_non_persistent_buffers():
            path, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(path), leaf, torch.empty_like(buffer, device="cpu"))
        self._model.initialize_weights()
