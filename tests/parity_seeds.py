"""Parity of right engines over many random models: none may fail.

    python -m tests.parity_seeds [--seeds 20] [--first 0]

Prints, for each model, the widest value of every check, and ends with 1 if one failed. Some 20 seconds a seed.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from moevlm.export.build import build
from moevlm.export.parity.report import Check
from moevlm.export.parity.run import check_parity
from tests.support.families.internvl import GPT_OSS
from tests.support.tiny import TinyCheckpoint

TARGETS = ("cpu:int8", "cpu:int4", "ort-cpu:int8", "ort-cpu:int4")
MODELS = {
    "qwen3_vl_moe": TinyCheckpoint(text={"moe_intermediate_size": 48}),
    "glm4v_moe": TinyCheckpoint("glm4v_moe", text={"moe_intermediate_size": 48}),
    "qwen3_5_moe": TinyCheckpoint("qwen3_5_moe", text={"moe_intermediate_size": 48}),
    "gemma4": TinyCheckpoint("gemma4", text={"moe_intermediate_size": 48}),
    "aria": TinyCheckpoint("aria", text={"intermediate_size": 48}),
    "internvl": TinyCheckpoint("internvl", text={"moe_intermediate_size": 48}),
    "internvl, gpt-oss": TinyCheckpoint("internvl", text=GPT_OSS | {"intermediate_size": 48}),
    "mistral3": TinyCheckpoint("mistral3", text={"moe_intermediate_size": 48}),
    "kimi_k25": TinyCheckpoint("kimi_k25", text={"moe_intermediate_size": 48}),
    "llama4": TinyCheckpoint("llama4"),
    "ernie4_5_vl_moe": TinyCheckpoint("ernie4_5_vl_moe", text={"moe_intermediate_size": [48, 32]}),
    "9 of 130 experts": TinyCheckpoint(
        dtype="bfloat16",
        text={
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "moe_intermediate_size": 16,
            "num_experts": 130,
            "num_experts_per_tok": 9,
            "attention_bias": True,
        },
    ),
}


def found(model: TinyCheckpoint, seed: int) -> Iterator[Check]:
    """All checks of all quantized engines of a random model. seed: of its weights and of the prompts."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = replace(model, seed=seed).save(Path(folder) / "checkpoint")
        bundle = build(checkpoint, Path(folder) / "bundle", TARGETS).directory
        yield from check_parity(bundle, checkpoint, seed=seed).checks


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@click.option("--first", type=int, default=0, show_default=True, help="The first of them.")
def main(seeds: int, first: int) -> None:
    """Parity of right engines over many random models: none may fail."""
    failed = 0
    for name, model in MODELS.items():
        widest: dict[str, float] = {}
        for seed in range(first, first + seeds):
            for check in found(model, seed):
                widest[check.quantity] = max(widest.get(check.quantity, 0.0), check.value)
                if not check.passed:
                    failed += 1
                    click.echo(f"{name}, seed {seed}: {check.step}: {check.quantity} = {check.value:.2g} {check.note}")
        click.echo(f"{name}, {seeds} seeds: " + ", ".join(f"{key} {value:.2g}" for key, value in widest.items()))
    click.echo(f"{failed} checks failed")
    click.get_current_context().exit(int(failed > 0))


if __name__ == "__main__":
    main()
