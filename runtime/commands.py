"""`moevlm run` and `moevlm inspect`."""

import json
from pathlib import Path
from typing import Any

import click

from moevlm.runtime.errors import RequestError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="The user's text; - reads it from standard input.")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="An image file; repeatable.")
@click.option("--system", help="A system message.")
@click.option("--messages", type=click.File(), help="A whole conversation as JSON: [{role, content}, ...].")
@click.option("--target", help="Which engine of the bundle.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Sample among the k likeliest tokens.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens that hold this share.")
@click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest one.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens that occurred less likely.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="Text that ends the answer, left out of it; repeatable.")
@click.option("--logprobs", type=int, help="With --json: this many alternatives for each token.")
@click.option("--threads", type=int, help="Cores for one operator.  [default: all]")
@click.option("--chunk-tokens", type=int, default=512, show_default=True, help="Prompt tokens in one step.")
@click.option("--max-image-megapixels", type=float, help="Larger images are refused.  [default: 50]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of streamed text.")
def run(
    bundle: Path,
    prompt: str | None,
    images: tuple[Path, ...],
    system: str | None,
    messages: Any,
    target: str | None,
    threads: int | None,
    chunk_tokens: int,
    max_image_megapixels: float | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer one prompt, the text streaming as it is made."""
    from moevlm.runtime import load
    from moevlm.runtime.bundle import Bundle
    from moevlm.runtime.sampling import SamplingParams

    params = SamplingParams(**{name: value for name, value in sampling.items() if value is not None})
    conversation = _conversation(prompt, images, system, messages)
    name, _ = Bundle.open(bundle).engine(target)
    pixels = None if max_image_megapixels is None else int(max_image_megapixels * 1e6)
    runtime = load(bundle, name, threads=threads, chunk_tokens=chunk_tokens, max_image_pixels=pixels)
    pieces = []
    for piece in runtime.generate(conversation, params=params):
        pieces.append(piece)
        if not as_json:
            click.echo(piece.text, nl=False)
    if as_json:
        click.echo(_run_report(name, pieces, params.logprobs is not None))
    else:
        click.echo()


def _conversation(
    prompt: str | None, images: tuple[Path, ...], system: str | None, messages: Any
) -> list[dict[str, Any]]:
    if messages is not None:
        if prompt is not None or images or system is not None:
            raise click.UsageError("--messages stands alone: it holds the prompt, the images and the system message")
        try:
            return json.load(messages)
        except ValueError as error:
            raise RequestError(f"--messages is not valid JSON: {error}") from None
    if prompt is None:
        raise click.UsageError('say what to ask: --prompt "..." (and --image FILE), or --messages FILE')
    text = click.get_text_stream("stdin").read() if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty")
    content = [{"type": "image", "image": str(image)} for image in images] + [{"type": "text", "text": text}]
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": content}]


def _run_report(target: str, pieces: list[Any], logprobs: bool) -> str:
    from moevlm.runtime.reports import RunReport, TokenReport, to_json

    usage = pieces[-1].usage
    sampled = [token for piece in pieces for token in piece.sampled]
    return to_json(
        RunReport(
            target=target,
            text="".join(piece.text for piece in pieces),
            token_ids=[token.token_id for token in sampled],
            finish_reason=pieces[-1].finish_reason,
            logprobs=[TokenReport(id=t.token_id, logprob=t.logprob, top=list(t.top)) for t in sampled]
            if logprobs
            else None,
            **vars(usage),
        )
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file and check its hash.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle is: the model, its engines, sizes, and parity results."""
    import msgspec

    from moevlm.runtime.bundle import Bundle
    from moevlm.runtime.console import bytes_text, console, progress_bar, table
    from moevlm.runtime.reports import EngineReport, InspectReport, to_json

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if verify:
        with progress_bar() as progress:
            opened.verify(progress=lambda done, total: progress("verifying", done, total))
    engines = [
        EngineReport(
            target=name,
            dtype=engine.dtype,
            bytes=sum(manifest.files[path].size for path in opened.engine_files(name)),
            parity=manifest.parity.get(name, {}).get("result", "not checked"),
        )
        for name, engine in sorted(manifest.engines.items())
    ]
    report = InspectReport(
        bundle=str(bundle),
        bytes=sum(facts.size for facts in manifest.files.values()),
        verified=verify,
        model=msgspec.to_builtins(manifest.model),
        engines=engines,
        source={name: facts.sha256 for name, facts in manifest.source.items()},
        tools=manifest.tools,
    )
    if as_json:
        click.echo(to_json(report))
        return
    model = manifest.model
    sparse = f"{model.layers - len(model.dense_layers)} sparse layers, top {model.top_k} of {model.experts} experts"
    rows = [
        ("model", model.model_type),
        ("decoder", f"{model.layers} layers, width {model.hidden}; {sparse}"),
        ("attention", f"{model.heads} heads on {model.kv_heads} key-value heads of {model.head_dim}"),
        ("vocabulary", f"{model.vocabulary} tokens, context {model.context}"),
        ("images", f"patches of {model.vision.patch_size}, {model.vision.deepstack} deepstack levels"),
        ("size", bytes_text(report.bytes) + (", every hash checked" if verify else "")),
        ("tools", ", ".join(f"{name} {number}" for name, number in manifest.tools.items())),
    ]
    console().print(table(str(bundle), ("", ""), rows, header=False))
    if not engines:
        console().print("no engine yet: moevlm build", f"{bundle} --checkpoint CHECKPOINT --target ort-cpu")
        return
    rows = [(e.target, e.dtype, bytes_text(e.bytes), e.parity) for e in engines]
    console().print(table("engines", ("target", "dtype", "size", "parity"), rows))
    if any(engine.parity == "not checked" for engine in engines):
        console().print(f"next: moevlm parity {bundle} --checkpoint CHECKPOINT")
