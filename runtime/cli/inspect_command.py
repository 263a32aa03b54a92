"""`moevlm inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.core.printable import in_shell

if TYPE_CHECKING:
    from moevlm.runtime.bundle.reader import Bundle
    from moevlm.runtime.cli.inspect_report import EngineReport, InspectReport


@click.command(short_help="Show a bundle: model, engines, sizes, parity.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file of the bundle and check its hash.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle is: the model, its engines, sizes, and parity results."""
    from moevlm.runtime.bundle.reader import Bundle
    from moevlm.runtime.cli.console import console, print_json, progress_bar
    from moevlm.runtime.cli.inspect_report import inspect_report
    from moevlm.runtime.core.reports import to_json

    opened = Bundle.open(bundle)
    if verify:
        with progress_bar() as progress:
            opened.verify(progress=lambda done, total: progress("verifying", done, total))
    report = inspect_report(opened, verify)
    problems = [f"{engine.target}: {problem}" for engine in report.engines for problem in engine.problems]
    if as_json:
        print_json(to_json(report))
    else:
        console().print(_metadata(opened, report))
    if problems:
        raise BundleError(f"{bundle}: {'; '.join(problems)}")
    if as_json:
        return
    on_gpu = {name for name, engine in opened.manifest.engines.items() if engine.sms}
    if not report.engines:
        console().print(f"\nnext: moevlm build {in_shell(bundle)} --checkpoint CHECKPOINT --target {defaults.TARGET}")
    elif any(engine.parity == "not checked" for engine in report.engines if engine.target not in on_gpu):
        console().print(f"\nnext: moevlm parity {in_shell(bundle)} --checkpoint CHECKPOINT")


def _weights(engine: EngineReport) -> str:
    """int4/32, 2:4 for groups of 32 weights that share a scale, pruned; mixed where layers differ."""
    from moevlm.runtime.core.engine_metadata import MIXED

    one = engine.group_size and engine.dtype != MIXED
    text = f"{engine.dtype}/{engine.group_size}" if one else engine.dtype
    return f"{text}, {engine.sparsity}" if engine.sparsity else text


def _metadata(bundle: Bundle, report: InspectReport) -> str:
    from moevlm.runtime.cli.console import table
    from moevlm.runtime.cli.memory_text import memory_text
    from moevlm.runtime.cli.model_text import model_rows
    from moevlm.runtime.core.printable import bytes_text, recoded_text, stored_text
    from moevlm.runtime.request.generation_file import FIELDS, sampling_text
    from moevlm.runtime.request.sampling import SamplingParams

    model = bundle.manifest.model
    sampling = SamplingParams(**{name: getattr(report.sampling, name) for name in FIELDS})
    rows = [
        *model_rows(model),
        *((("lacks", lacking),) if (lacking := _lacking(bundle)) else ()),
        ("sampling", sampling_text(sampling)),
        ("size", bytes_text(report.bytes) + (", every hash checked" if report.verified else "")),
        *((("ignored fields", ", ".join(report.ignored_config)),) if report.ignored_config else ()),
        *((("checkpoint", stored_text(report.stored_as)),) if report.stored_as else ()),
        *((("left out", left_out_text(report.left_out)),) if report.left_out else ()),
        *((name, number) for name, number in report.tools.items()),
    ]
    text = table(report.bundle, ("", ""), rows, header=False) + "\n\n"
    if not report.engines:
        return text + "no engine yet"
    engines = [
        (
            e.target,
            _weights(e),
            e.kv_cache,
            bytes_text(e.bytes),
            bytes_text(e.cache_bytes_per_token),
            bytes_text(e.bytes + e.cache_bytes_per_token * model.context + e.state_bytes),
            e.built.replace("T", " ").removesuffix("Z") or "-",
            e.parity,
        )
        for e in report.engines
    ]
    heads = ("target", "weights/group", "KV cache", "size", "a token", "at full context", "built (UTC)", "parity")
    text += table("engines, with the memory that weights and one sequence need", heads, engines)
    fates = [
        f"{e.target}, weights made of tensors in codes: {recoded_text(e.recoded, e.weight_errors)}"
        for e in report.engines
        if e.recoded
    ]
    fates += [
        f"{e.target}, parity could not compare: {', '.join(e.not_compared)}" for e in report.engines if e.not_compared
    ]
    memory = (memory_text(e.target, e.memory, model) for e in report.engines if e.memory is not None)
    return "\n\n".join(("\n".join((text + _tables(bundle), *fates)), *memory))


def _lacking(bundle: Bundle) -> str:
    """tokenizer.json (takes no messages), preprocessor.json (takes no images)"""
    needed = {"tokenizer.json": "messages", "chat_template.jinja": "messages"}
    needed |= {"preprocessor.json": "images"} if bundle.manifest.model.vision is not None else {}
    needed |= {"video_preprocessor.json": "videos"} if bundle.manifest.model.video is not None else {}
    absent = {name: what for name, what in needed.items() if name not in bundle.manifest.files}
    return ", ".join(f"{name} (takes no {what})" for name, what in absent.items())


def left_out_text(left_out: Mapping[str, int]) -> str:
    """2 tensors rotary_emb.inv_freq"""
    from moevlm.runtime.core.printable import counted

    return ", ".join(f"{counted(count, 'tensor')} {name}" for name, count in left_out.items())


def _tables(bundle: Bundle) -> str:
    """What each backend tells of its engines; empty where nothing is to tell."""
    from moevlm.runtime.backends.registry import Backends
    from moevlm.runtime.cli.console import table

    engines, backends, text = bundle.manifest.engines, Backends(), ""
    for backend in dict.fromkeys(map(backends.of, engines.values())):
        own = {name: engine for name, engine in sorted(engines.items()) if backends.of(engine) is backend}
        if (told := backend.table(bundle, own)) is not None:
            text += "\n\n" + "\n".join([table(told.title, told.heads, told.rows), *told.lines])
    return text
