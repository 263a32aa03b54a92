"""The decoder's plan with everything that stays on the device: expert weights, KV caches, recorded decode steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import numpy as np

from moevlm.runtime.backends.tensorrt.cuda import ALIGNMENT, DeviceMemory
from moevlm.runtime.backends.tensorrt.expert_memory import ExpertMemory, expert_weights
from moevlm.runtime.backends.tensorrt.plan import Execution, Plan
from moevlm.runtime.bundle.verified_file import MappedFile
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import ModelMetadata, TensorRTMetadata
from moevlm.runtime.core.states import PagedKV, StateSpec, output_name
from moevlm.runtime.engine.step import Step
from moevlm.runtime.engine.visual import HostFeatures

PREFILL, DECODE = 0, 1  # profiles
ACTIVATIONS = ("bfloat16", "float16", "float32")

Bindings = dict[str, tuple[int, tuple[int, ...]]]  # address and shape


class Slot:
    """A page: a sequence's caches on the device, and the context that decodes with them: its addresses never change."""

    def __init__(self, memory: DeviceMemory, caches: Bindings, decode: Execution) -> None:
        self.memory, self.caches, self.decode = memory, caches, decode

    def free(self) -> None:
        try:
            self.decode.close()
        finally:
            self.memory.free()


class Decoder:
    """Steps of sequences, one at a time. Everything is freed by `close`, inside the device's context."""

    def __init__(
        self,
        plan: Plan,
        experts: MappedFile | None,
        model: ModelMetadata,
        states: tuple[StateSpec, ...],
        metadata: TensorRTMetadata,
        host_layers: int = 0,
    ) -> None:
        """experts: a file whose hash was checked, if the plan needs one. host_layers: see `ExpertMemory`.

        Raises EngineError if it or the plan is not what the metadata say.
        """
        self._plan, self._device, self._model, self._metadata = plan, plan.device, model, metadata
        self._cache_shapes = _cache_shapes(plan, states, metadata)
        self._deepstack = plan.inputs["deepstack_embeds"][0] if "deepstack_embeds" in plan.inputs else 0
        self._slots: dict[int, Slot] = {}  # by page
        self._fixed: Bindings = {}
        self._resources = ExitStack()
        try:
            weights = expert_weights(plan, _weight_inputs(plan, model, self._cache_shapes), experts)
            self._require_what_was_said()
            memory = ExpertMemory(self._device, weights, host_layers)
            self._resources.callback(memory.free)
            self._fixed = {name: (address, plan.inputs[name]) for name, address in memory.addresses.items()}
            self._blank = self._allocate_blank()
            self._prefill = plan.execution(PREFILL)
            self._resources.callback(self._prefill.close)
            self._bind_fixed(self._prefill)
        except BaseException:
            self._resources.close()
            raise

    @property
    def graphs(self) -> str:
        """Whether decoding replays recorded steps: "replayed", "refused: why" or "not yet"."""
        refused = next((slot.decode.graph_refused for slot in self._slots.values() if slot.decode.graph_refused), None)
        if refused is not None:
            return f"refused: {refused}"
        return "replayed" if any(slot.decode.replays for slot in self._slots.values()) else "not yet"

    def free_slots(self) -> None:
        """Free the memory of all pages."""
        with ExitStack() as stack:
            for slot in self._slots.values():
                stack.callback(slot.free)
            self._slots.clear()

    def step(self, step: Step, visual: HostFeatures | None) -> np.ndarray:
        """Logits [L, vocabulary] float32. The step was checked before; it has one sequence, in one page."""
        slot = self._slot(int(step.page_table[0, 0]))
        if int(step.context_len[0]) == 0:
            self._device.clear(slot.memory)  # what the page's last sequence left may be no number
        arrays = plan_arrays(step)
        used = np.unique(step.visual_index[step.visual_index >= 0])
        if not len(used) and step.tokens == len(step.logits_index) == 1:
            return slot.decode.run(arrays)["logits"]
        for name, (address, shape) in slot.caches.items():
            self._prefill.bind(name, address, shape)
        if visual is not None and len(used):
            arrays |= self._rows(arrays["visual_index"], visual, used)
        else:
            for name, (address, shape) in self._blank.items():
                self._prefill.bind(name, address, shape)
        groups = [self._prefill.run(arrays | group)["logits"] for group in self._groups(step.logits_index)]
        return np.concatenate(groups)[: len(step.logits_index)]

    def _slot(self, page: int) -> Slot:
        if page not in self._slots:
            self._slots[page] = self._new_slot()
        return self._slots[page]

    def _groups(self, wanted: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """As many positions at a time as the profile has room for. A step writes the same caches each time.

        The profile allows no empty axis: where nothing is wanted, one row is computed and dropped.
        """
        wanted = wanted if len(wanted) else np.zeros(1, wanted.dtype)
        for start in range(0, len(wanted), self._metadata.max_logits):
            yield {"logits_index": wanted[start : start + self._metadata.max_logits]}

    def _rows(self, visual_index: np.ndarray, visual: HostFeatures, used: np.ndarray) -> dict[str, np.ndarray]:
        """The visual rows that the step uses and no others, and where it finds them."""
        if len(used) > self._metadata.max_visual:
            raise EngineError(
                f"the step uses {len(used)} visual rows (allowed: up to {self._metadata.max_visual}; "
                "fewer tokens in a step use fewer)"
            )
        index = np.where(visual_index >= 0, np.searchsorted(used, visual_index), -1)
        rows = {"visual_embeds": visual.embeds[used], "visual_index": index}
        return rows | ({"deepstack_embeds": visual.deepstack[:, used]} if self._deepstack else {})

    def _require_what_was_said(self) -> None:
        """That the plan's shapes and profiles are those of the manifest."""
        plan, model, metadata = self._plan, self._model, self._metadata
        if metadata.activations not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise EngineError(f"unsupported value activations = {metadata.activations!r} (supported: {allowed})")
        dtype = DTYPES[metadata.activations].tensorrt
        for name, shape in self._cache_shapes.items():
            if (plan.inputs[name], plan.dtypes[name]) != ((-1, *shape), dtype):
                shown = f"{plan.dtypes[name]} {plan.inputs[name]}"
                raise EngineError(f"{plan.name} has {name} {shown}, manifest.json says {dtype} {(-1, *shape)}")
        for what, found, said in (
            ("hidden", plan.inputs["visual_embeds"][1], model.hidden),
            ("vocabulary", plan.outputs["logits"][1], model.vocabulary),
            ("deepstack", self._deepstack, model.vision.deepstack),
        ):
            if found != said:
                raise EngineError(f"{plan.name} has {what} = {found}, manifest.json says {said}")
        for name, profile, wanted in (
            ("input_ids", PREFILL, (metadata.max_batch, metadata.chunk_tokens)),
            ("input_ids", DECODE, (metadata.max_batch, 1)),
            ("logits_index", PREFILL, (metadata.max_logits,)),
            ("logits_index", DECODE, (metadata.max_batch,)),
            ("visual_embeds", PREFILL, (metadata.max_visual, model.hidden)),
        ):
            most = plan.most(name, profile)
            if any(a < b for a, b in zip(most, wanted, strict=True)):
                raise EngineError(f"{plan.name} takes {name} up to {most}, manifest.json says {wanted}")

    def _allocate_blank(self) -> Bindings:
        """One row of zeros that no visual_index points at, for steps without images."""
        hidden = self._model.hidden
        memory = self._device.allocate(max(1, self._deepstack) * hidden * 4)
        self._resources.callback(memory.free)
        self._device.clear(memory)
        blank: Bindings = {"visual_embeds": (memory.address, (1, hidden))}
        return blank | ({"deepstack_embeds": (memory.address, (self._deepstack, 1, hidden))} if self._deepstack else {})

    def _new_slot(self) -> Slot:
        places, end = {}, 0
        for name, shape in self._cache_shapes.items():
            places[name] = end
            size = math.prod(shape) * DTYPES[self._metadata.activations].bytes
            end += -(-size // ALIGNMENT) * ALIGNMENT
        with ExitStack() as undo:
            memory = self._device.allocate(end)
            undo.callback(memory.free)
            caches: Bindings = {}
            for name, place in places.items():
                caches[name] = caches[output_name(name)] = memory.address + place, (1, *self._cache_shapes[name])
            decode = self._plan.execution(DECODE, graphs=True)
            undo.callback(decode.close)
            self._bind_fixed(decode)
            for name, (address, bound) in (caches | self._blank).items():
                decode.bind(name, address, bound)
            undo.pop_all()
        return Slot(memory, caches, decode)

    def _bind_fixed(self, execution: Execution) -> None:
        for name, (address, shape) in self._fixed.items():
            execution.bind(name, address, shape)

    def close(self) -> None:
        with self._resources:
            self.free_slots()


def _cache_shapes(plan: Plan, states: tuple[StateSpec, ...], metadata: TensorRTMetadata) -> dict[str, tuple[int, ...]]:
    """[kv_heads, capacity, D] of every cache, by the name of the plan's input."""
    shapes: dict[str, tuple[int, ...]] = {}
    for state in states:
        if not isinstance(state, PagedKV):
            raise EngineError(f"{plan.name} keeps {state.tensor} (supported: keys and values)")
        shapes |= {name: (state.kv_heads, metadata.capacity, width) for name, width in state.widths.items()}
    return shapes


def plan_arrays(step: Step) -> dict[str, np.ndarray]:
    """A packed step of one sequence as the plan takes it: a batch of one."""
    arrays = {
        "input_ids": step.input_ids,
        "visual_index": step.visual_index,
        **{f"rope_cos.{group}": cos for group, (cos, _) in step.rope.items()},
        **{f"rope_sin.{group}": sin for group, (_, sin) in step.rope.items()},
    }
    batch = {name: array[None] for name, array in arrays.items()}
    return batch | {"cache_position": step.context_len.astype(np.int64), "logits_index": step.logits_index}


def _weight_inputs(plan: Plan, model: ModelMetadata, caches: Iterable[str]) -> list[str]:
    """Every input of the plan that is no part of a step and no cache. Raises EngineError for those that it lacks."""
    ropes = [f"rope_{name}.{group}" for group in range(len(model.ropes)) for name in ("cos", "sin")]
    step = {"input_ids", "visual_embeds", "visual_index", *ropes, "cache_position", "logits_index"}
    for names, given, kind in (
        ((*step, *caches), plan.inputs, "input"),
        (("logits", *map(output_name, caches)), plan.outputs, "output"),
    ):
        if missing := sorted(set(names) - set(given)):
            raise EngineError(f"{plan.name} has no {kind} {missing[0]}")
    return [name for name in plan.inputs if name not in {*step, *caches, "deepstack_embeds"}]
