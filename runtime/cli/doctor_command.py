"""`moevlm doctor`."""

import click

from moevlm.runtime.cli.doctor import DoctorReport, examine


@click.command(short_help="Show what this machine has and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def doctor(as_json: bool) -> None:
    """Show what this machine has, which targets it can run and build, and how to install what is missing."""
    from moevlm.runtime.cli.console import console, print_json
    from moevlm.runtime.core.reports import to_json

    report = examine()
    if as_json:
        print_json(to_json(report))
    else:
        console().print(_text(report))


def _text(report: DoctorReport) -> str:
    from moevlm.runtime.cli.console import table
    from moevlm.runtime.core.gpus import gpu_text
    from moevlm.runtime.core.printable import bytes_text

    cores = f"{report.cores} cores"
    if report.quota is not None:
        cores += f" (a quota of {report.quota:g})"
    memory = bytes_text(report.memory) if report.memory is not None else "unknown"
    if report.available_memory is not None:
        memory += f", {bytes_text(report.available_memory)} available"
    gpu = report.gpu
    rows = [
        ("moevlm", f"{report.moevlm} in {report.folder}"),
        ("Python", f"{report.python} on {report.system}"),
        ("processor", f"{report.processor}, {cores}"),
        (
            "instructions",
            f"{report.instruction_set}, chosen by the cpu operators"
            if report.instruction_set
            else report.instruction_problem,
        ),
        ("memory", memory),
        ("GPU", f"{gpu.name}, {gpu_text(gpu.sm)}, driver for CUDA {_cuda(gpu.driver)}" if gpu else report.gpu_problem),
        ("compiler", report.compiler or "no g++"),
        *((name, path or "not built") for name, path in report.libraries.items()),
        *((name, number or "not installed") for name, number in report.packages.items()),
    ]
    targets = [(t.target, _verdict(t.missing_to_run), _verdict(t.missing_to_build)) for t in report.targets]
    text = table("this machine", ("", ""), rows, header=False)
    text += "\n\n" + table("targets", ("", "run here", "build here"), targets)
    missing = dict.fromkeys(line for t in report.targets for line in (*t.missing_to_run, *t.missing_to_build))
    notes = [(line, ", ".join(_needed(report, line))) for line in missing]
    return text + "\n\n" + table("missing", ("", "for"), notes, header=False) if notes else text


def _verdict(missing: list[str]) -> str:
    return "no" if missing else "yes"


def _needed(report: DoctorReport, line: str) -> list[str]:
    """The uses that need a missing thing: run rtx, build rtx."""
    uses = []
    for target in report.targets:
        verbs = [
            v for v, missing in (("run", target.missing_to_run), ("build", target.missing_to_build)) if line in missing
        ]
        if verbs:
            uses.append(f"{' and '.join(verbs)} {target.target}")
    return uses


def _cuda(driver: int) -> str:
    """13.0 for 13000."""
    return f"{driver // 1000}.{driver % 1000 // 10}"
