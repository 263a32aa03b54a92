"""`moevlm inspect`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.reports import EngineReport, InspectReport, SamplingReport, to_json
from moevlm.runtime.perf.limits import cache_bytes_per_token


@click.command(short_help="Show a bundle: model, engines, sizes, parity.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file and check its hash.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle is: the model, its engines, sizes, and parity results."""
    from moevlm.runtime.bundle.reader import Bundle
    from moevlm.runtime.cli.console import console, print_json, progress_bar

    opened = Bundle.open(bundle)
    if verify:
        with progress_bar() as progress:
            opened.verify(progress=lambda done, total: progress("verifying", done, total))
    report = _inspect_report(opened, verify)
    problems = [f"{engine.target}: {problem}" for engine in report.engines for problem in engine.problems]
    if as_json:
        print_json(to_json(report))
    else:
        console().print(_metadata(opened.manifest, report))
    if problems:
        raise BundleError(f"{bundle}: {'; '.join(problems)}")
    if as_json:
        return
    if not report.engines:
        console().print(f"\nnext: moevlm build {bundle} --checkpoint CHECKPOINT --target {defaults.TARGET}")
    elif any(engine.parity == "not checked" and engine.tensorrt is None for engine in report.engines):
        console().print(f"\nnext: moevlm parity {bundle} --checkpoint CHECKPOINT")


def _inspect_report(bundle: Any, verified: bool) -> InspectReport:
    from moevlm.runtime.backends.tensorrt.kernel_resources import kernels_of
    from moevlm.runtime.backends.tensorrt.plan_check import plan_problems
    from moevlm.runtime.request.generation_file import FIELDS, bundle_sampling

    manifest, sampling = bundle.manifest, bundle_sampling(bundle)
    return InspectReport(
        bundle=str(bundle.directory),
        bytes=sum(metadata.size for metadata in manifest.files.values()),
        verified=verified,
        model=manifest.model,
        engines=[
            EngineReport(
                target=name,
                dtype=engine.dtype,
                bytes=sum(manifest.files[path].size for path in bundle.engine_files(name)),
                parity=_verdict(manifest.parity.get(name)),
                block_size=engine.block_size,
                kv_cache=engine.kv_cache,
                cache_bytes_per_token=cache_bytes_per_token(manifest.model, engine),
                built=engine.built,
                sparsity=engine.sparsity,
                tensorrt=engine.tensorrt,
                problems=plan_problems(bundle, engine),
                kernels=kernels_of(bundle, engine),
            )
            for name, engine in sorted(manifest.engines.items())
        ],
        source={name: metadata.sha256 for name, metadata in manifest.source.items()},
        tools=manifest.tools,
        ignored_config=list(manifest.ignored_config),
        left_out=manifest.left_out,
        sampling=SamplingReport(**{name: getattr(sampling, name) for name in FIELDS}),
    )


def _verdict(parity: Any) -> str:
    result = parity.get("result") if isinstance(parity, dict) else None
    return result if result in ("passed", "failed") else "not checked"


def _weights(engine: EngineReport) -> str:
    """int4/32, 2:4 for blocks of 32 that share a scale, pruned."""
    text = f"{engine.dtype}/{engine.block_size}" if engine.block_size else engine.dtype
    return f"{text}, {engine.sparsity}" if engine.sparsity else text


def _parameters(model: ModelMetadata) -> str:
    """, 30.5 B parameters, 3.3 B for a token; empty where the bundle does not say."""
    from moevlm.runtime.cli.console import count_text

    if not model.parameters:
        return ""
    return f", {count_text(model.parameters)} parameters, {count_text(model.active_parameters)} active for a token"


def _metadata(manifest: Any, report: InspectReport) -> str:
    from moevlm.runtime.cli.console import bytes_text, table
    from moevlm.runtime.request.generation_file import sampling_text

    model = manifest.model
    sparse = f"{model.layers - len(model.dense_layers)} sparse, top {model.top_k} of {model.experts} experts"
    rows = [
        ("model", f"{model.model_type}{_parameters(model)}"),
        ("decoder", f"{model.layers} layers of width {model.hidden}, {sparse}"),
        ("attention", f"{model.heads} heads on {model.kv_heads} key-value heads of {model.head_dim}"),
        ("vocabulary", f"{model.vocabulary} tokens, context {model.context}"),
        ("images", f"patches of {model.vision.patch_size}, {model.vision.deepstack} deepstack levels"),
        ("sampling", sampling_text(report.sampling)),
        ("size", bytes_text(report.bytes) + (", every hash checked" if report.verified else "")),
        *((("ignored fields", ", ".join(report.ignored_config)),) if report.ignored_config else ()),
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
            bytes_text(e.bytes + e.cache_bytes_per_token * model.context),
            e.built.replace("T", " ").removesuffix("Z") or "-",
            e.parity,
        )
        for e in report.engines
    ]
    heads = ("target", "weights/block", "KV cache", "size", "a token", "at full context", "built (UTC)", "parity")
    text += table("engines, with the memory that weights and the cache of one sequence need", heads, engines)
    return text + _plans(manifest, report)


def left_out_text(left_out: Mapping[str, int]) -> str:
    """2 tensors rotary_emb.inv_freq"""
    return ", ".join(f"{count} tensors {pattern}" for pattern, count in left_out.items())


def _plans(manifest: Any, report: InspectReport) -> str:
    """What TensorRT engines were built with and for; empty without one."""
    from moevlm.runtime.cli.console import bytes_text, table
    from moevlm.runtime.core.gpus import sms_text

    rows = []
    for engine in report.engines:
        if (t := engine.tensorrt) is not None:
            experts = bytes_text(manifest.files[t.experts].size) if t.experts else "-"
            versions = " or its lean runtime" if t.version_compatible else ""
            steps = f"{t.max_batch} x {t.chunk_tokens} tokens, {t.max_visual} of images"
            product = f"{t.product} {t.version}{versions}"
            sizes = experts, steps, str(t.capacity), str(t.max_patches)
            rows.append((engine.target, product, sms_text(t.sms), t.activations, *sizes))
    heads = ("target", "runs on", "GPUs", "activations", "experts", "a step", "context", "patches")
    text = "\n\n" + table("TensorRT engines, up to", heads, rows) if rows else ""
    return text + "".join(
        f"\n{engine.target}: {k.count} kernels, up to {bytes_text(k.shared)} of shared memory, "
        + (f"spills of up to {k.spilled} bytes a thread" if k.spilled else "no spills")
        for engine in report.engines
        if (k := engine.kernels) is not None
    )
