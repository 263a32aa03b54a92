"""Bytes of an engine that the model's config and the options tell, before anything is built."""

from collections.abc import Mapping

from moevlm.export.backends.tensorrt.expert_weights import storing
from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.config import GatedDeltaConfig, MixerConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig
from moevlm.export.graph.planned_cost import planned_cost
from moevlm.export.graph.weights import Weight
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.engine_metadata import CostMetadata

_FLOAT32 = 4
_CHUNK = 32  # tokens of a chunk of the delta rule, at most: see `plugins.gpu.tiles`


def cost_of(config: ModelConfig, weights: Mapping[str, Weight], options: Options, exact_router: bool) -> CostMetadata:
    """As the lowered graphs will have it. weights: as `Target.planned` has them. exact_router: as in `passes.typed`."""
    width = DTYPES[options.activations].bytes

    def expert_bytes(names: tuple[str, str], moe: MoEConfig) -> int:
        plain = ExpertsOp(
            moe.expert,
            moe.experts,
            moe.router.top_k,
            config.decoder.hidden,
            moe.width,
            options.activations,
            has_biases=moe.expert_biases,
        )
        matrices = [weights[name] for name in names if name in weights]
        return storing(plain, options.weights, options.group, *matrices).weight_bytes

    return planned_cost(config, width, _FLOAT32 if exact_router else width, expert_bytes)


def workspace(config: ModelConfig, options: Options, max_patches: int) -> int:
    """Bytes beside weights and caches, roughly: TensorRT decides.

    What lives at once in a layer of a step of the most tokens, or of a call of the most patches, whichever is more; the
    features of such a call, twice while they are split by image, and of such a step; logits.
    """
    value, decoder, vision = DTYPES[options.activations].bytes, config.decoder, config.vision
    mixed = max(_mixed(layer.mixer) for layer in decoder.layers)
    fed = max(_fed(layer.feed_forward, decoder.hidden) for layer in decoder.layers)
    step = options.max_tokens * (2 * decoder.hidden + max(mixed, fed)) * value
    logits = options.max_logits * decoder.vocabulary * _FLOAT32
    if vision is None:
        return step + logits
    tower = vision.metadata()
    block = max(4 * vision.heads * vision.head_dim, vision.mlp.width * (3 if vision.mlp.gated else 2))
    images = max_patches * ((2 * vision.hidden + block) * value + tower.patch_width * _FLOAT32)
    rows = 2 * tower.rows(max_patches, tower.most_images(max_patches)) + options.max_tokens
    features = rows * (1 + tower.deepstack) * decoder.hidden * value
    return max(step, images) + features + logits


def _mixed(mixer: MixerConfig) -> int:
    """Values of a token in attention: queries, keys, values and the result.

    Of the delta rule: its row before and after the convolution, and of each value head what its chunk does to a state,
    see `plugins.gpu.ops.gated_delta`, and the result.
    Of latent attention: queries as projected, as they meet latents, and beside what is rotated; latents.
    """
    if isinstance(mixer, GatedDeltaConfig):
        spec = mixer.spec
        return 2 * (spec.channels + spec.value_heads) + spec.value_heads * (spec.key_dim + 2 * spec.value_dim + _CHUNK)
    if isinstance(mixer, MLAConfig):
        query = mixer.nope_dim + mixer.rope_dim
        return mixer.heads * (query + mixer.kv_rank + mixer.key_dim) + mixer.q_rank + 2 * mixer.key_dim
    layer = mixer.metadata()
    return layer.heads * (layer.key_dim + layer.value_dim) + layer.kv_heads * (layer.key_dim + layer.value_dim)


def _fed(feed_forward: MLPConfig | MoEConfig, hidden: int) -> int:
    """Values of a token in a feed-forward layer. Each expert's result is a row until they are added up."""
    if isinstance(feed_forward, MoEConfig):
        beside = 3 * (feed_forward.shared_width + feed_forward.dense_width)
        return feed_forward.router.top_k * (max(feed_forward.width, feed_forward.image_width) + hidden) + beside
    return 3 * feed_forward.width
