"""adapter_config.json: how much of an adapter is added to each module. What would compute something else is refused.

Source: PEFT 0.21 `tuners/lora/config.py` and `utils/other.get_pattern_key`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moevlm.export.checkpoint.expressions import compile_expression
from moevlm.export.checkpoint.files import read_json
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError, quoted

CONFIG = "adapter_config.json"
_USED = frozenset(("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"))
# Where the adapter came from, which modules it has, and how it was trained.
_HARMLESS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("init_lora_weights", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("megatron_core", "qalora_group_size", "ensure_weight_tying", "monteclora_config", "runtime_config"),
    )
)
_MOST_PATTERNS, _LARGEST_RANK = 1 << 12, 1 << 14


@dataclass(frozen=True)
class Settings:
    """rank, alpha: of modules that no pattern fits. ranks, alphas: by patterns, the first that fits counts.

    root_scale: alpha is divided by the root of the rank instead of the rank (rsLoRA).
    """

    rank: int
    alpha: float
    ranks: Mapping[re.Pattern[str], int]
    alphas: Mapping[re.Pattern[str], float]
    root_scale: bool

    def rank_of(self, module: str) -> int:
        """Of the matrices of one module."""
        return next((rank for pattern, rank in self.ranks.items() if pattern.fullmatch(module)), self.rank)

    def scale(self, module: str) -> float:
        """The factor of B A for one module."""
        alpha = next((alpha for pattern, alpha in self.alphas.items() if pattern.fullmatch(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.root_scale else rank)


def settings_of(directory: Path) -> Settings:
    """Raises UnsupportedModelError for an option that is not supported, CheckpointError for a wrong value."""
    values = read_json(directory, CONFIG)
    if values.get("peft_type") != "LORA":
        raise _unsupported("peft_type", values.get("peft_type"), '"LORA"')
    for name in sorted(set(values) - _USED - _HARMLESS):
        value = values[name]
        if value not in (None, False, [], {}) and (name, value) != ("bias", "none"):
            raise _unsupported(name, value, '"none"' if name == "bias" else "off")
    return Settings(
        rank=_rank("r", values.get("r", 8)),
        alpha=_alpha("lora_alpha", values.get("lora_alpha", 8)),
        ranks=_patterns(values, "rank_pattern", _rank),
        alphas=_patterns(values, "alpha_pattern", _alpha),
        root_scale=values.get("use_rslora") is True,
    )


def _patterns(values: Mapping[str, Any], name: str, read: Any) -> dict[re.Pattern[str], Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict) or len(found) > _MOST_PATTERNS:
        raise _invalid(name, found, f"an object of at most {_MOST_PATTERNS} patterns")
    place = f"{CONFIG}: {name}"
    return {
        compile_expression(place, pattern, r"(.*\.)?({})"): read(f"{name}.{pattern}", value)
        for pattern, value in found.items()
    }


def _rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_RANK:
        raise _invalid(name, value, f"an integer from 1 to {_LARGEST_RANK}")
    return value


def _alpha(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
        raise _invalid(name, value, "a number above 0")
    return float(value)


def _invalid(name: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"invalid value in {CONFIG}: {name} = {quoted(value)} (allowed: {allowed})")


def _unsupported(name: str, value: Any, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"unsupported value in {CONFIG}: {name} = {quoted(value)} (supported: {supported})")
