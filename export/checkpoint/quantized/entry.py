"""One object of a quantization config, with a memory: what was read is supported, what is left over has to be known."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moevlm.export.checkpoint.directory import CONFIG
from moevlm.export.checkpoint.quantized.patterns import Matches, matches
from moevlm.runtime.core.errors import UnsupportedModelError, quoted, shown

LARGEST = 1 << 20  # a group's or a block's size
# How the quantization was made and labelled, what runs it, and how activations were rounded, which nothing here does.
_BOOKKEEPING = frozenset(
    (
        *("quant_method", "version", "producer", "provider", "meta", "quantizer", "tokenizer", "dataset", "nsamples"),
        *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse", "act_group_aware"),
        *("model_name_or_path", "model_file_base_name", "model_seqlen", "seqlen", "batch_size", "max_input_length"),
        *("block_name_to_quantize", "to_quant_block_names", "modules_in_block_to_quantize", "in_blocks"),
        *("module_name_preceding_first_block", "cache_block_outputs", "pad_token_id", "lm_head", "fixed_by_user"),
        *("exllama_config", "use_exllama", "disable_exllama", "use_cuda_fp16", "backend", "do_fuse"),
        *("fuse_max_seq_len", "modules_to_fuse", "observer", "observer_kwargs"),
        *("scale_dtype", "zp_dtype", "autoround_version", "iters", "lr", "minmax_lr", "enable_minmax_tuning", "amp"),
        *("enable_quanted_input", "gradient_accumulate_steps", "low_gpu_mem_usage", "data_type", "super_bits"),
        *("super_group_size", "act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic"),
        *("input_activations", "output_activations", "activation_scheme", "kv_cache_scheme", "kv_cache_quant_algo"),
        *("dequantize", "run_compressed", "use_optimized_inference", "quantization_status"),
        *("global_compression_ratio",),
    )
)


class Entry:
    """One JSON object of a config, which remembers what was read of it."""

    def __init__(self, values: Mapping[str, Any], path: str, ignored: Sequence[str]) -> None:
        self.path, self._values, self._ignored = path, values, ignored
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def choice(self, key: str, *allowed: Any) -> Any:
        """The value, or the first allowed one where there is none."""
        value = self.get(key)
        if value is None:
            return allowed[0]
        if isinstance(value, dict | list) or not any(value == one and type(value) is type(one) for one in allowed):
            names = ", ".join(
                str(one).lower() if isinstance(one, bool) else str(one) for one in allowed if one is not None
            )
            raise self.refused(key, value, names)
        return value

    def size(self, key: str) -> int | None:
        """A group size: 0 for -1, which is the whole row; None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if type(value) is not int or not (value == -1 or 1 <= value <= LARGEST):
            raise self.refused(key, value, f"-1, or a number from 1 to {LARGEST}")
        return max(0, value)

    def refused(self, key: str, value: Any, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"unsupported value in {self.path}.{key} = {quoted(value)} (supported: {supported})"
        )

    def modules(self, *keys: str) -> Matches:
        lists = [matches(f"{self.path}.{key}", self.get(key)) for key in keys]
        return lambda name: any(fits(name) for fits in lists)

    def entry(self, key: str) -> "Entry | None":
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refused(key, value, "an object")
        return Entry(value, f"{self.path}.{key}", self._ignored)

    def entries(self, key: str) -> Iterator[tuple[str, "Entry | None"]]:
        """The objects in an object, by name; none where it is not there."""
        if (outer := self.entry(key)) is not None:
            yield from ((name, outer.entry(name)) for name in outer._values)

    def refuse_unread(self) -> None:
        """Raise UnsupportedModelError for a field that was not read and is not known to leave weights as they are."""
        for key in sorted(set(self._values) - self._read - _BOOKKEEPING):
            value, name = self._values[key], f"{self.path}.{key}"
            dotted = name.removeprefix(f"{CONFIG}: ")
            if value in (None, False, [], {}) or dotted in self._ignored:
                continue
            raise UnsupportedModelError(
                f"unsupported field in {name} = {shown(value)} (if it leaves the weights as they are: "
                f"--ignore-config {dotted})"
            )
