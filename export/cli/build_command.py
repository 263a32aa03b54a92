"""`moevlm build`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moevlm.export.backends.registry import all_options, counting
from moevlm.export.cli.plan_text import plan_lines
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.cli.command_line import require
from moevlm.runtime.cli.console import console, progress_bar
from moevlm.runtime.cli.memory_text import memory_text
from moevlm.runtime.cli.option_types import OneOf, WholeNumber
from moevlm.runtime.core import defaults
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.gpus import gpu_text
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.printable import bytes_text, in_shell
from moevlm.runtime.perf.memory import memory_report

if TYPE_CHECKING:
    from moevlm.export.dry_run import Plan

_LAYOUT = click.option(
    "--expert-layout",
    type=OneOf(["auto", "out_in", "in_out"]),
    default="auto",
    show_default=True,
    help="How fused expert tensors lie on disk, if their shape does not tell.",
)

_IGNORED = click.option(
    "--ignore-config",
    "ignored_config",
    metavar="FIELD",
    multiple=True,
    help="Build in spite of a field of config.json that is not supported, such as text_config.x; repeatable.",
)

_FORCE = click.option("--force", is_flag=True, help="Replace a bundle that is there, with all its engines.")


def _backend_options(command: Any) -> Any:
    """Every option of any backend, as its options class states it."""
    for name, (default, told) in reversed(all_options().items()):
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            command = click.option(flag, is_flag=True, help=told.help)(command)
            continue
        named = all(isinstance(choice, str) for choice in told.choices) and told.choices
        command = click.option(
            flag,
            metavar=None if named else "N",
            type=OneOf(told.choices) if named else WholeNumber(),
            default=default or None,
            show_default=True,
            help=told.help,
        )(command)
    return command


@click.command(short_help="Build engines from a checkpoint, or add them to a bundle.")
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to write, from a checkpoint.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Where BUNDLE came from: adds targets to it.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="reference, ort-cpu, ort-cpu:int8, ort-cpu:int4, cpu:int8, cpu:int4, rtx:sm86,sm89,... for TensorRT-RTX, "
    f"trt:sm90 for TensorRT on its GPU; repeatable.  [default: {defaults.TARGET}]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be built and how large it is, or what is refused and why. Exit status 1 where a --target is "
    "refused.",
)
@click.option(
    "--lora", metavar="DIR", type=click.Path(path_type=Path), help="A LoRA adapter, as PEFT saves it, to merge."
)
@_FORCE
@_LAYOUT
@_IGNORED
@_backend_options
def build(
    source: Path,
    output: Path | None,
    checkpoint: Path | None,
    targets: tuple[str, ...],
    dry_run: bool,
    lora: Path | None,
    force: bool,
    expert_layout: str,
    ignored_config: tuple[str, ...],
    **options: Any,
) -> None:
    """Trace a checkpoint and build one engine per target, or add targets to a bundle.

    \b
    moevlm build CHECKPOINT -o BUNDLE [--target ...]
    moevlm build BUNDLE --checkpoint CHECKPOINT [--target ...]
    moevlm build CHECKPOINT|config.json --dry-run [--target ...]
    """
    require("torch", "export")
    source_of = click.get_current_context().get_parameter_source
    given = {name: value for name, value in options.items() if source_of(name) is ParameterSource.COMMANDLINE}
    reading: dict[str, Any] = {"lora": lora, "expert_layout": expert_layout, "ignored_config": ignored_config}
    if dry_run:
        if output or checkpoint or force:
            raise click.UsageError("--dry-run takes a checkpoint or its config.json, and writes nothing")
        _require_no_bundle(source)
        _dry_run(source, targets, reading, given)
        return
    from moevlm.export.build import add_targets
    from moevlm.export.build import build as build_bundle
    from moevlm.export.passes.base import checked

    notes: list[str] = []
    names = targets or (defaults.TARGET,)
    with ExitStack() as stack:
        if click.get_current_context().obj:  # --debug
            stack.enter_context(checked())
        telling: Any = {"note": notes.append, "planned": _say_memory, "progress": stack.enter_context(progress_bar())}
        if checkpoint is None and output is not None:
            _require_no_bundle(source)
            if source.is_file():
                planning = f"moevlm build {in_shell(source)} --dry-run says what it would become"
                raise click.UsageError(f"{source} is a file: a build needs a checkpoint's folder ({planning})")
            bundle, origin = output, source
            built = build_bundle(origin, bundle, names, replace=force, **telling, **reading, **given)
        elif checkpoint is not None and output is None:
            for option, said in (("--expert-layout", expert_layout != "auto"), ("--ignore-config", ignored_config)):
                if said:
                    raise click.UsageError(f"{option} was decided when the bundle was made from its checkpoint")
            if force:
                raise click.UsageError("--force is for CHECKPOINT -o BUNDLE: targets are added, or built anew, without")
            bundle, origin = source, checkpoint
            built = add_targets(bundle, origin, names, lora=lora, **telling, **given)
        elif checkpoint is None:
            raise click.UsageError("missing -o BUNDLE, the bundle to write (to add to one: --checkpoint CHECKPOINT)")
        else:
            raise click.UsageError("either CHECKPOINT -o BUNDLE, or BUNDLE --checkpoint CHECKPOINT")
    _report(bundle, notes)
    if sparsity := given.get("sparsity"):
        zeros = max(engine.pruned_weights for engine in built.manifest.engines.values())
        console().print(
            f"pruned {sparsity}: {zeros:,} weights of dense layers are zero: check the accuracy, which this costs"
        )
    if any(engine.weight_errors for engine in built.manifest.engines.values()):
        console().print(
            "weight error: root mean square of what rounding weights anew changed, over that of the weights; "
            "what it costs, in KL divergence and in experts that change places, parity says"
        )
    parity = f"moevlm parity {in_shell(bundle)} --checkpoint {in_shell(origin)}"
    console().print(_next_step(names, built, parity + (f" --lora {in_shell(lora)}" if lora else "")))


def _require_no_bundle(source: Path) -> None:
    if (source / "manifest.json").is_file():
        adding = f"moevlm build {in_shell(source)} --checkpoint CHECKPOINT adds targets to it"
        raise click.UsageError(f"{source} is a bundle, not a checkpoint ({adding})")


def _dry_run(source: Path, targets: tuple[str, ...], reading: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Exit status 1 where a target that was named is refused, or all are. reading, given: options of the build."""
    from moevlm.export.dry_run import dry_run

    with progress_bar() as progress:
        plan = dry_run(source, targets, progress=progress, **reading, **given)
    for line in plan_lines(source, plan, list(_options_of(plan, reading, given)), bool(targets)):
        console().print(line)
    refused = [bool(target.refused) for target in plan.targets]
    if any(refused) if targets else all(refused):
        click.get_current_context().exit(1)


def _options_of(plan: "Plan", reading: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The options that a build needs, too, each with the name of a target that it counts for; "" for all of them."""
    if reading["lora"]:
        yield "", f"--lora {in_shell(reading['lora'])}"
    if reading["expert_layout"] != "auto":
        yield "", f"--expert-layout {reading['expert_layout']}"
    for field in reading["ignored_config"]:
        yield "", f"--ignore-config {in_shell(field)}"
    for name in dict.fromkeys(target.asked for target in plan.targets if not target.refused):
        for option, value in counting(name, given).items():
            yield name, f"--{option.replace('_', '-')}" + ("" if value is True else f" {value}")


def _say_memory(model: ModelMetadata, engines: Mapping[str, EngineMetadata]) -> None:
    """Before what may take hours."""
    for name, engine in engines.items():
        if (report := memory_report(model, engine)) is not None:
            console(stderr=True).print(memory_text(name, report, model))


def _next_step(names: tuple[str, ...], built: Bundle, parity: str) -> str:
    """Parity of what was built, on a machine that can run it."""
    kinds = {name.partition(":")[0] for name in names}
    engines = [engine for name, engine in built.manifest.engines.items() if name.partition(":")[0] in kinds]
    if not all(engine.sms for engine in engines):
        return f"next: {parity}"
    sms = sorted({sm for engine in engines for sm in engine.sms})
    return f"next, on a machine with {' or '.join(map(gpu_text, sms))}: {parity}"


def _report(bundle: Path, notes: list[str]) -> None:
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    console().print(f"bundle: {bundle} ({bytes_text(size)})")
    for note in notes:
        console().print(f"note: {note}")
