"""Greedy answers of a checkpoint to the held-out questions: `python -m demo.evaluate`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast, Qwen3VLMoeForConditionalGeneration

from demo import checkpoint
from demo.batches import Encoder
from demo.model import image_processor

QUESTIONS = checkpoint.HERE / "eval" / "questions.jsonl"


def read_questions(path: Path = QUESTIONS) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def answer(
    model: Qwen3VLMoeForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict],
    images: list[Image.Image],
) -> tuple[str, list[np.ndarray]]:
    """The greedy answer, and per layer how often each expert was chosen on the way."""
    inputs, grids = {}, []
    if images:
        inputs = dict(image_processor()(images=images, return_tensors="pt"))
        grids = inputs["image_grid_thw"].tolist()
    encoder = Encoder(tokenizer)
    ids = torch.tensor([encoder.prompt(messages, grids, generate=True)])
    chosen = [np.zeros(model.config.text_config.num_experts, np.int64) for _ in gates(model)]
    hooks = [
        gate.register_forward_hook(lambda _, __, out, row=row: np.add.at(row, out[2].flatten().numpy(), 1))
        for gate, row in zip(gates(model), chosen, strict=True)
    ]
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == encoder.image).int(),
            do_sample=False,
            max_new_tokens=96,
            **inputs,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), chosen


def gates(model: Qwen3VLMoeForConditionalGeneration) -> list[torch.nn.Module]:
    return [layer.mlp.gate for layer in model.model.language_model.layers]


def evaluate(
    model: Qwen3VLMoeForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    path: Path = QUESTIONS,
) -> dict:
    """Exact answers per task, the wrong ones, and the share of tokens per expert and layer."""
    score: dict[str, list[bool]] = defaultdict(list)
    wrong, used = [], 0
    for line in read_questions(path):
        images = [Image.open(path.parent / name) for name in line["images"]]
        text, chosen = answer(model, tokenizer, line["messages"], images)
        score[line["task"]].append(text == line["answer"])
        used = used + np.array(chosen)
        if text != line["answer"]:
            wrong.append({"id": line["id"], "expected": line["answer"], "got": text})
    every = [right for rights in score.values() for right in rights]
    share = used / used.sum(axis=1, keepdims=True)
    return {
        "questions": len(every),
        "exact": round(sum(every) / len(every), 4),
        "exact_per_task": {task: round(sum(r) / len(r), 4) for task, r in score.items()},
        "count_per_task": {task: len(r) for task, r in score.items()},
        "expert_share_per_layer": share.round(4).tolist(),
        "wrong": wrong,
    }


def show(result: dict) -> None:
    table = Table("task", "questions", "exact")
    for task, share in result["exact_per_task"].items():
        table.add_row(task, str(result["count_per_task"][task]), f"{share:.1%}")
    table.add_row("all", str(result["questions"]), f"{result['exact']:.1%}", style="bold")
    console = Console()
    console.print(table)
    for number, row in enumerate(result["expert_share_per_layer"]):
        shares = " ".join(f"{100 * share:4.1f}" for share in row)
        console.print(f"layer {number}: % of tokens per expert  {shares}", soft_wrap=True)


@click.command(help=__doc__)
@click.argument("path", type=click.Path(path_type=Path), default=checkpoint.CHECKPOINT)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--threads", default=2, show_default=True)
def main(path: Path, as_json: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    result = evaluate(*checkpoint.load(path))
    if as_json:
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        show(result)


if __name__ == "__main__":
    main()
