"""Trains the demo checkpoint on a CPU: `python -m demo.train --minutes 40`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from demo import checkpoint, evaluate, report, tasks, tokenizer
from demo.batches import Encoder, stream
from demo.loss import Objective
from demo.model import build

WARMUP = 0.02  # share of the run in which the learning rate rises
VISION_ONLY = 0.08  # share of the run in which only the vision tower learns
EMA = 0.998
SAVE_EVERY = 480  # seconds


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    rng = np.random.default_rng(seed)
    samples = [tasks.draw(rng) for _ in range(8000)]
    lines = [text for s in samples for turn in s.turns for text in (turn.question, turn.answer)]
    return tokenizer.train(lines + ["system", "user", "assistant"] * 2000)


def pace(done: float) -> float:
    """Share of the peak learning rate: linear up, then a cosine down to 1 %."""
    if done < WARMUP:
        return done / WARMUP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizer_of(objective: Objective, rate: float) -> torch.optim.AdamW:
    """No weight decay on biases, norms and embeddings."""
    decay: list[torch.nn.Parameter] = []
    keep: list[torch.nn.Parameter] = []
    for name, parameter in objective.named_parameters():
        plain = parameter.ndim < 2 or "embed" in name
        (keep if plain else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


class Average:
    """Exponential moving average of the weights: steadier than the last step's."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        keep = min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_([a for a, _ in self.pairs], [b for _, b in self.pairs], 1 - keep)


def budget(steps: int | None, minutes: float) -> Iterator[tuple[int, float]]:
    """Step numbers with the share of the run that is done, until steps or time are up."""
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        yield step, done
        step += 1
        done = step / steps if steps else (time.monotonic() - start) / (60 * minutes)


def fit(
    objective: Objective,
    batches: Iterator[dict[str, torch.Tensor]],
    progress: Iterator[tuple[int, float]],
    rate: float,
    vision_only: float,
    on_save: Callable[[torch.nn.Module], None],
) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Returns the averaged model and the loss curve; saves on the way."""
    optimizer, average = optimizer_of(objective, rate), Average(objective.model)
    curve: list[dict[str, float]] = []
    saved = time.monotonic()
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        job = bar.add_task("start", total=1.0)
        for step, done in progress:
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = rate * pace(done)
            if done < vision_only:
                while "pixel_values" not in batch:
                    batch = next(batches)
                cell, _ = objective.cells(batch)
                losses = {"total": cell, "cell": cell}
            else:
                losses = objective(batch)
            optimizer.zero_grad(set_to_none=True)
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimizer.step()
            average.update(step)
            curve.append({"step": step, **{k: round(v.item(), 5) for k, v in losses.items()}})
            if step % 50 == 0:
                recent = report.mean_of(curve[-50:])
                text = "  ".join(f"{k} {v:.3f}" for k, v in recent.items())
                bar.update(job, completed=done, description=f"step {step}  {text}")
                if not bar.console.is_terminal:
                    print(f"{done:5.1%} step {step}  {text}", flush=True)
            if time.monotonic() - saved > SAVE_EVERY:
                on_save(average.model)
                saved = time.monotonic()
        bar.update(job, completed=1.0)
    return average.model, curve


@click.command(help=__doc__)
@click.option("--minutes", default=40.0, show_default=True, help="Length of the run.")
@click.option("--steps", type=int, help="Length in steps instead: repeatable on any machine.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--start", type=click.Path(path_type=Path), help="Continue from this checkpoint.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=checkpoint.CHECKPOINT,
    show_default="demo/checkpoint",
)
def main(
    minutes: float,
    steps: int | None,
    batch_size: int,
    rate: float,
    start: Path | None,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if start:
        fresh, words = checkpoint.load(start)
    else:
        words = make_tokenizer(seed)
        fresh = build(words)
    objective = Objective(fresh.train())
    parameters = sum(p.numel() for p in objective.model.parameters())
    click.echo(f"{parameters / 1e6:.2f} M parameters, vocabulary {len(words)}, seed {seed}")
    began = time.monotonic()
    model, curve = fit(
        objective,
        stream(Encoder(words), batch_size, seed + 1),
        budget(steps, minutes),
        rate,
        VISION_ONLY / 4 if start else VISION_ONLY,
        on_save=lambda average: checkpoint.save(average, words, out),
    )
    spent = time.monotonic() - began
    checkpoint.save(model, words, out)
    click.echo(f"{len(curve)} steps in {spent / 60:.1f} minutes")
    result = evaluate.evaluate(*checkpoint.load(out))
    metadata = {
        "parameters": parameters,
        "seed": seed,
        "continued": start is not None,
        "steps": len(curve),
        "batch_size": batch_size,
        "peak_rate": rate,
        "minutes": round(spent / 60, 1),
        "threads": threads,
        **result,
        "curve": report.thin(curve),
    }
    folder = checkpoint.HERE if out == checkpoint.CHECKPOINT else out
    report.write(metadata, folder / "training.json")
    report.plot(curve, folder / "loss.png")
    evaluate.show(result)


if __name__ == "__main__":
    main()
