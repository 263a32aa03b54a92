"""Canonical PyTorch one layer at a time, on the inputs that an engine's own layers had and the weights that it stores.

An error inside a layer is seen there, alone: none is carried on, and a token that went to other experts at a near tie
changes nothing, because the reference sends it to the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moevlm.export.config import DecoderConfig, ModelConfig
from moevlm.export.formats.activations import rounded
from moevlm.export.formats.stored import EncodedFrom
from moevlm.export.graph.weights import Weight, read, slices
from moevlm.export.model import CanonicalModel, load
from moevlm.export.modules.decoder import Layer, of_images
from moevlm.export.modules.layers import ExactLinear
from moevlm.export.modules.mixers import StepTensors
from moevlm.export.modules.ops import Arithmetic, computing, recorded_taps
from moevlm.export.parity.recorded_engine import RecordedSequence
from moevlm.export.parity.torch_engine import zeros
from moevlm.export.parity.torch_images import Images
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.states import PagedKV
from moevlm.runtime.engine.visual import HostFeatures
from moevlm.runtime.request.vision_inputs import VisionInputs

Array = np.ndarray
FLOAT32 = 1e-5  # what float32 sums may differ by, relative to their result


@dataclass(frozen=True)
class Rounding:
    """The rounding in an engine besides its weights: activations to int8 in groups, and caches of some layers."""

    group_size: int
    int8_caches: frozenset[int]

    @classmethod
    def of(cls, engine: EngineMetadata) -> Rounding:
        caches = (state.layer for state in engine.states if isinstance(state, PagedKV) and state.dtype == "int8")
        return cls(engine.group_size, frozenset(caches))


@dataclass(frozen=True)
class Deviation:
    """Rows of one value. All fields [rows], Euclidean lengths.

    found: from exact arithmetic to the engine. rounding: from there to the same arithmetic with rounded activations.
    size: of what was computed; of a layer, of what it adds to its input.
    """

    name: str
    found: Array
    rounding: Array
    size: Array

    @classmethod
    def of(cls, name: str, engine: Array, exact: Array, rounding: Array, start: Array | float = 0.0) -> Deviation:
        """Rows [T, N] of the value in the engine and in both references. start: what they were added to.

        Infinitely far where the engine's are not finite or of another shape.
        """
        if engine.shape != exact.shape or not (np.isfinite(engine).all() and np.isfinite(exact).all()):
            return cls(name, *(np.array([length]) for length in (np.inf, 1.0, 1.0)))
        return cls(name, _lengths(engine - exact), _lengths(rounding - exact), _lengths(exact - start))

    @property
    def allowed(self) -> Array:
        """`rounding`, but never less than what float32 itself loses."""
        usual = FLOAT32 * np.sqrt(np.mean(self.size**2))
        return np.maximum(self.rounding, max(usual, float(np.finfo(np.float32).tiny)))

    @property
    def overall(self) -> float:
        """Root mean square of what was found, over that of what rounding explains."""
        return float(np.linalg.norm(self.found) / np.linalg.norm(self.allowed))

    @property
    def relative(self) -> float:
        """Root mean square of what was found, over that of what was computed."""
        return float(np.linalg.norm(self.found) / max(np.linalg.norm(self.size), np.finfo(np.float32).tiny))

    @property
    def worst_row(self) -> float:
        """The same for the row where it is largest. Its rounding may be small by chance: the usual one is added."""
        return float((self.found / (self.allowed + np.median(self.allowed))).max())


def layer_deviations(
    config: ModelConfig, weights: Mapping[str, Weight], rounding: Rounding, sequences: Sequence[RecordedSequence]
) -> Iterator[Deviation]:
    """Yield the deviation of every decoder layer and its router, in order, and of the head.

    weights: of the decoder as the engine stores them, by parameter name; head: also where the embedding is the head.
    """
    decoder = config.decoder
    inputs = _embedded(weights["embedding"], decoder.embedding_scale, sequences)
    for i in range(len(decoder.layers)):
        layer = _filled(decoder, i, weights)
        chosen = _joined(sequences, f"layers.{i}.expert_index") if i in config.moe else None
        exact, logits = _outputs(layer, decoder, i, sequences, inputs, Arithmetic(chosen))
        groups = partial(group_of, weights, rounding.group_size)
        with rounded_inputs(layer, partial(_of_layer, groups, i)):
            arithmetic = Arithmetic(chosen, groups(f"layers.{i}.feed_forward.gate_up"), i in rounding.int8_caches)
            others, other_logits = _outputs(layer, decoder, i, sequences, inputs, arithmetic)
        if logits is not None and other_logits is not None:
            yield Deviation.of(f"router of layer {i}", _joined(sequences, _logits(i)), logits, other_logits)
        found = [s.values[f"layers.{i}.hidden"] for s in sequences]
        yield Deviation.of(f"layer {i}", np.concatenate(found), exact, others, np.concatenate(inputs))
        inputs = found
    yield _head(decoder, weights, rounding, sequences, inputs)


def vision_deviations(
    model: CanonicalModel, inputs: VisionInputs, group_size: int, found: HostFeatures
) -> Iterator[Deviation]:
    """Yield the deviation of image features and each deepstack level, through the whole tower: its layers are not seen.

    model: with the weights of vision that the engine stores.
    """
    (tower, _), (other, _) = model.towers(), model.towers()
    exact = Images(tower, model).encode(inputs)
    with rounded_inputs(other, lambda name: group_of(model.vision_weights, group_size, f"{name}.weight")):
        rounding = Images(other, model).encode(inputs)
    yield Deviation.of("image features", found.embeds, exact.embeds, rounding.embeds)
    for i, level in enumerate(found.deepstack):
        yield Deviation.of(f"deepstack features {i}", level, exact.deepstack[i], rounding.deepstack[i])


def group_of(weights: Mapping[str, Weight], usual: int, name: str) -> int:
    """Weights that share a scale in a parameter as the engine stores it, and activations that are rounded with one."""
    encoding: EncodedFrom | None = getattr(weights.get(name), "encoding", None)
    return usual if encoding is None else encoding.form.group_size


def _of_layer(groups: Callable[[str], int], index: int, name: str) -> int:
    return groups(f"layers.{index}.{name}.weight")


@contextmanager
def rounded_inputs(module: nn.Module, group_size: Callable[[str], int]) -> Iterator[None]:
    """Activations are rounded to int8 on their way into every linear layer but exact ones. group_size: by its name."""

    def through(size: int, _: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(rounded(inputs[0].numpy(), size))

    hooks = [
        linear.register_forward_pre_hook(partial(through, group_size(name)))
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and not isinstance(linear, ExactLinear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _lengths(rows: Array) -> Array:
    """Added up in float64, without a copy of the rows: those of logits are many."""
    return np.sqrt(np.einsum("...i,...i->...", rows, rows, dtype=np.float64))


def _logits(layer: int) -> str:
    return f"layers.{layer}.router_logits"


def _joined(sequences: Sequence[RecordedSequence], name: str) -> Array:
    return np.concatenate([sequence.values[name] for sequence in sequences])


def _embedded(embedding: Weight, scale: float, sequences: Sequence[RecordedSequence]) -> list[Array]:
    """The first layer's input: rows of the embedding times `scale`, and of the engine's image features."""
    rows = []
    for sequence in sequences:
        ids, place = sequence.values["input_ids"], sequence.values["visual_index"]
        x = np.stack([embedding.rows(i, i + 1)[0] for i in ids]).astype(np.float32) * np.float32(scale)
        if sequence.visual is not None:
            x[place >= 0] = sequence.visual.embeds[place[place >= 0]]
        rows.append(x)
    return rows


def _filled(config: DecoderConfig, index: int, weights: Mapping[str, Weight]) -> Layer:
    with torch.device("meta"):
        layer = Layer(config, index).eval()
    load(layer, weights, f"layers.{index}.")
    return layer


@torch.no_grad()
def _outputs(
    layer: Layer,
    config: DecoderConfig,
    index: int,
    sequences: Sequence[RecordedSequence],
    inputs: list[Array],
    arithmetic: Arithmetic,
) -> tuple[Array, Array | None]:
    """Rows of all sequences behind a layer, and its router's logits if it has one."""
    attended, normed, added = [], [], []
    specs = config.layers[index].mixer.states(index)
    with computing(arithmetic), recorded_taps() as outputs:
        for sequence, rows in zip(sequences, inputs, strict=True):
            x = torch.from_numpy(rows)
            # A pool of one page, which the whole sequence fits into.
            y, fed, _ = layer.mix(x, _whole(sequence, config), zeros(specs, 2, 2, len(x)))
            attended.append(y)
            normed.append(fed)
            added.append(torch.zeros_like(x))
            place = sequence.values["visual_index"]
            if sequence.visual is not None and index < config.deepstack:
                added[-1][place >= 0] = torch.from_numpy(sequence.visual.deepstack[index][place[place >= 0]])
        ids = torch.from_numpy(_joined(sequences, "input_ids"))
        x = layer.feed(torch.cat(attended), torch.cat(normed), of_images(ids, config)) + torch.cat(added)
    logits = outputs.get(_logits(index))
    return x.numpy(), None if logits is None else logits.numpy()


def _whole(sequence: RecordedSequence, config: DecoderConfig) -> StepTensors:
    """All tokens of a sequence in one step, in page 1 and state row 1."""
    tables = [
        (sequence.values[f"rope_cos.{group}"], sequence.values[f"rope_sin.{group}"])
        for group in range(len(config.ropes))
    ]
    start, kept, table, row = (
        torch.tensor(values, dtype=torch.int32) for values in ([0, len(tables[0][0])], [0], [[1]], [1])
    )
    ropes = tuple((torch.from_numpy(cos), torch.from_numpy(sin)) for cos, sin in tables)
    end, scale = (
        None if (found := sequence.values.get(name)) is None else torch.from_numpy(found)
        for name in ("visible_end", "query_scale")
    )
    return StepTensors(ropes, start, kept, table, row, end, scale)


def _head(
    config: DecoderConfig,
    weights: Mapping[str, Weight],
    rounding: Rounding,
    sequences: Sequence[RecordedSequence],
    hidden: list[Array],
) -> Deviation:
    rows = np.stack([x[place] for s, x in zip(sequences, hidden, strict=True) for place in s.logits])
    found = np.stack([row for sequence in sequences for row in sequence.logits.values()])
    norm = torch.from_numpy(read(weights["norm.weight"]).astype(np.float32))
    normed = F.rms_norm(torch.from_numpy(rows), norm.shape, norm, config.epsilon).numpy()
    both, parts = np.concatenate([normed, rounded(normed, group_of(weights, rounding.group_size, "head"))]), []
    parts = [both @ piece.reshape(-1, config.hidden).T for piece in slices(weights["head"])]
    logits, softcap = np.concatenate(parts, axis=1), config.logit_softcap
    exact, other = np.split(np.tanh(logits / softcap) * softcap if softcap else logits, 2)
    return Deviation.of("head", found, exact, other)
