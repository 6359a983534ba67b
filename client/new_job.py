"""`milliner submit`, and what one asks before it: `milliner estimate` and `milliner preview`.

Owns: one function per command, and their flags. Every other field of their requests is set by `--set`. client/cli.py
registers them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from openai.types.fine_tuning import FineTuningJob

from client import estimate, fields, preview, show, submit
from client.connect import connect, job_of
from client.request import Body, Flag, body_of, gives
from client.terminal import follow_job, print_result
from deploy.local.commands import AsJson, Data
from shared.errors import InvalidRequest
from shared.estimation.estimate import EstimateCreate
from shared.schemas.preview import MAX_ROWS, PreviewCreate
from shared.schemas.requests import JobCreate, MethodName, Request

Base = Annotated[str | None, typer.Option("--model", help="Base model; see: milliner models")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data.", show_default="auto")]
Rank = Annotated[int | None, typer.Option("--r", help="Rank of the adapter.", show_default="auto")]


def set_option(request: type[Request]) -> Any:
    """The option `--set` of a command that sends such a request."""

    def keys(incomplete: str) -> list[tuple[str, str]]:
        return fields.complete(request, incomplete)

    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any field of the request, such as trainer.max_length=512; may be repeated. "
        "--set trainer lists the keys of trainer; all keys are in docs/reference/commands.md.",
        rich_help_panel="Any other setting",
        autocompletion=keys,
    )


def submit_job(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True, help="Rows to train on."),
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Base or fine-tuned model; see: milliner models")] = None,
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Rows to evaluate on.")
    ] = None,
    method: Annotated[
        MethodName | None,
        typer.Option(help="What the rows are: answers, preferences, or labels.", show_default="supervised"),
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the adapter's name.")] = None,
    epochs: Epochs = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per optimizer step.", show_default="auto")] = None,
    r: Rank = None,
    follow_it: Annotated[bool, typer.Option("--follow", help="Watch the job until it ends; Ctrl-C detaches.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan only; nothing is trained or kept.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Submit without asking.")] = False,
    settings: Annotated[list[str] | None, set_option(JobCreate)] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter: check the data, show the plan, submit the job."""
    flags = (
        Flag("FILE", "training_file", file and str(file)),
        Flag("--model", "model", model),
        Flag("--validation", "validation_file", validation and str(validation)),
        Flag("--method", "method.type", method),
        Flag("--suffix", "suffix", suffix),
        Flag("--epochs", "hyperparameters.n_epochs", epochs),
        Flag("--batch-size", "hyperparameters.batch_size", batch_size),
        Flag("--r", "lora.r", r),
        Flag("--dry-run", "dry_run", dry_run or None),
    )
    body = body_of(JobCreate, flags, settings)
    _require_file(body)
    dry_run = body.pop("dry_run", False)
    out, notes, client = show.console(), show.console(stderr=True), connect(data)
    spinner = notes.status(f"reading {file.name if file else body['training_file']}")

    def accept(rehearsed: FineTuningJob) -> bool:
        spinner.stop()
        if dry_run and as_json:
            show.print_json(rehearsed)
        plan = job_of(rehearsed).plan
        if plan is not None and not as_json:
            out.print(show.plan(plan))
        if dry_run or yes or as_json or not sys.stdin.isatty():
            return not dry_run
        return typer.confirm("Submit this job?", default=True)

    try:
        with spinner:
            wire = submit.submit(client, body, file, validation, accept=accept)
    except submit.BadRows as bad:
        (notes if as_json else out).print(show.problems(bad.file))
        raise typer.Exit(1) from None
    except submit.Refused as refused:
        notes.print(show.failure(refused.error))
        raise typer.Exit(1) from None
    if wire is None:
        raise typer.Exit(0 if dry_run else 1)
    if follow_it:
        follow_job(client, wire.id, as_json)
    else:
        print_result(wire, f"submitted {wire.id}; watch it with: milliner show {wire.id} --follow", as_json)


def estimate_job(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="A dataset, or the id of an uploaded one.")
    ] = None,
    *,
    model: Base = None,
    epochs: Epochs = None,
    r: Rank = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.", show_default="cuda")] = None,
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the device, such as 24GB.")
    ] = None,
    settings: Annotated[list[str] | None, set_option(EstimateCreate)] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Estimate whether a job fits, how long it takes, and what would make it fit; exit 1 if it does not fit."""
    named, file = estimate.read_arguments(words or [], model_given=model is not None or gives("model", settings))
    flags = (
        Flag("FILE", "training_file", file),
        Flag("--model", "model", model),
        Flag("MODEL", "model", named),
        Flag("--epochs", "hyperparameters.n_epochs", epochs),
        Flag("--r", "lora.r", r),
        Flag("--device", "device", device),
        Flag("--device-memory", "device_memory_bytes", estimate.bytes_of(device_memory) if device_memory else None),
    )
    answer = estimate.ask(connect(data), body_of(EstimateCreate, flags, settings))
    print_result(answer, estimate.verdict(answer), as_json)
    if answer.fits is False:
        raise typer.Exit(1)


def preview_rows(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE_OR_ID", help="A dataset, or the id of an uploaded one.")
    ] = None,
    *,
    model: Base = None,
    rows: Annotated[
        int | None, typer.Option(min=1, max=MAX_ROWS, help="How many rows, from the first.", show_default="5")
    ] = None,
    line: Annotated[
        list[int] | None, typer.Option(metavar="N", min=1, help="Number of a row to show instead; may be repeated.")
    ] = None,
    settings: Annotated[list[str] | None, set_option(PreviewCreate)] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as tokens, and which tokens are trained; exit 1 if a row cannot be trained on."""
    flags = (
        Flag("FILE", "training_file", file),
        Flag("--model", "model", model),
        Flag("--rows", "rows", rows),
        Flag("--line", "lines", line or None),
    )
    body = body_of(PreviewCreate, flags, settings)
    _require_file(body)
    out = show.console()
    with show.console(stderr=True).status(f"reading {body['training_file']}"):
        answer = preview.ask(connect(data), body)
    if as_json:
        show.print_json(answer.model_dump(mode="json"))
    else:
        out.print(preview.rows(answer, colour=out.color_system is not None), soft_wrap=True)
    if answer.problems:
        raise typer.Exit(1)


def _require_file(body: Body) -> None:
    if body.get("training_file") is None:
        raise InvalidRequest("no dataset is given; name a FILE, or an uploaded one with --set training_file=file-…")
