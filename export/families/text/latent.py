"""What text models with latent attention have in common: fields of config.json, and where the weights lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from moevlm.export.config import DecoderConfig, LayerConfig, MLAConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope_scaling import yarn_mscale
from moevlm.export.families.sources import Source, halves, reordered, rows_of_heads
from moevlm.export.families.text.base import TextModel
from moevlm.runtime.core.manifest import QueryScaleMetadata, RopeMetadata

_EPSILON = 1e-6  # of the latents' norms, whatever rms_norm_eps says


@dataclass(frozen=True)
class HeadSizes:
    """nope, rope: dimensions of a query and a key without and with rotation. value: of a value. latent: of all heads.

    interleaved: what turns together lies side by side on the disk.
    """

    nope: int
    rope: int
    value: int
    latent: int
    interleaved: bool

    @classmethod
    def of(cls, text: Fields) -> Self:
        rope = text.positive("qk_rope_head_dim")
        if rope % 2:
            raise text.invalid("qk_rope_head_dim", rope, "an even number")
        return cls(
            nope=text.positive("qk_nope_head_dim"),
            rope=rope,
            value=text.positive("v_head_dim"),
            latent=text.positive("kv_lora_rank"),
            interleaved=text.flag("rope_interleave", True),
        )

    @property
    def query(self) -> int:
        """Of a query."""
        return self.nope + self.rope


class LatentText(TextModel):
    """Rows that turn are read as two halves; kv_b_proj comes apart into what is done to queries and to results."""

    router_suffix = "mlp.gate"
    config_names: ClassVar[Mapping[str, str]] = {
        "experts": "n_routed_experts",
        "head_dim without a window": "kv_lora_rank",
        "rope_dim": "qk_rope_head_dim",
    }

    def __init__(self, sizes: HeadSizes) -> None:
        self.sizes = sizes

    @classmethod
    def of(cls, text: Fields) -> Self:
        return cls(HeadSizes.of(text))

    def weights(self, model: str, head: str) -> shared.Weights:
        ours, theirs = "decoder.layers.{i}.attention.", f"{model}layers.{{i}}.self_attn."
        sizes = self.sizes
        query, latent = (sizes.nope, sizes.query), (sizes.latent, sizes.latent + sizes.rope)

        def turned(name: str, places: tuple[int, int]) -> str | Source:
            """Rows of a projection; from the first of `places` to the second, of so many rows, they turn."""
            start, size = places
            return reordered(f"{theirs}{name}", halves(sizes.rope, start, size)) if sizes.interleaved else theirs + name

        up = f"{theirs}kv_b_proj.weight"
        return {
            **shared.decoder_weights(Experts(f"{model}layers.{{i}}.mlp.experts", per_expert=True), model),
            "decoder.head": head,
            f"{ours}q.weight": turned("q_proj.weight", query),
            **shared.renamed({f"{ours}q_down": f"{theirs}q_a_proj"}, shared.BOTH),
            f"{ours}q_norm.weight": f"{theirs}q_a_layernorm.weight",
            f"{ours}q_up.weight": turned("q_b_proj.weight", query),
            **{f"{ours}kv_down.{part}": turned(f"kv_a_proj_with_mqa.{part}", latent) for part in shared.BOTH},
            f"{ours}kv_norm.weight": f"{theirs}kv_a_layernorm.weight",
            f"{ours}key_up": rows_of_heads(up, sizes.nope + sizes.value, 0, turned=True),
            f"{ours}value_up": rows_of_heads(up, sizes.nope + sizes.value, sizes.nope),
        }


def latent_decoder(
    text: Fields,
    *,
    tied: bool,
    rope: RopeMetadata,
    scale: float,
    moe: MoEConfig,
    kv_heads: int,
    q_rank: int,
    epsilon: float = 1e-6,
    sparse: Sequence[bool] | None = None,
    query_scale: QueryScaleMetadata | None = None,
) -> DecoderConfig:
    """A decoder of latent attention. scale: of the scores of attention. moe: the sparse layers.

    kv_heads, q_rank, epsilon: num_key_value_heads, q_lora_rank and rms_norm_eps where config.json has none. sparse: of
    each layer, where first_k_dense_replace does not say so.
    """
    heads, sizes = text.positive("num_attention_heads"), HeadSizes.of(text)
    text.choice("num_key_value_heads", (heads,), heads if text.is_null("num_key_value_heads") else kv_heads)
    text.choice("qk_head_dim", (sizes.query,), sizes.query)
    attention = MLAConfig(
        heads=heads,
        q_rank=0 if text.is_null("q_lora_rank") else text.positive("q_lora_rank", q_rank),
        kv_rank=sizes.latent,
        nope_dim=sizes.nope,
        rope_dim=sizes.rope,
        value_dim=sizes.value,
        bias=text.flag("attention_bias", False),
        epsilon=_EPSILON,
        scale=scale,
        query_scale=query_scale is not None,
    )
    dense = MLPConfig(text.positive("intermediate_size"), moe.expert.activation)
    if sparse is None:
        first = text.count("first_k_dense_replace")
        sparse = [i >= first for i in range(text.positive("num_hidden_layers"))]
    text.choice("moe_layer_freq", (1,), 1)
    return shared.decoder(
        text,
        epsilon=epsilon,
        tied=tied,
        rope=rope,
        layer=lambda i: LayerConfig(attention, moe if sparse[i] else dense),
        query_scale=query_scale,
    )


def score_scale(rope: Fields, size: int) -> float:
    """The scale of the scores: size**-0.5, and twice what yarn lengthens by mscale_all_dim (DeepSeek-V2, appendix).

    rope: fields of the rope, whose other half of that factor is on cosine and sine. size: of a query.
    """
    all_dims = rope.number("mscale_all_dim") if rope.get("mscale_all_dim", 0) else 0.0
    if not all_dims or rope.get("rope_type" if "rope_type" in rope else "type", "default") == "default":
        return size**-0.5
    return size**-0.5 * yarn_mscale(rope.number("factor"), all_dims) ** 2
