"""The `milliner` command: its names, its options, and what each one prints.

Owns: one function per command. What is more than a call and a print lives beside: connect, submit, estimate, follow,
download, preview, report, verify, show. The stack's own commands come from `deploy.local`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import openai
import typer
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel
from rich.console import RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from client import download, estimate, preview, report, show, submit, verify
from client.connect import connect, disconnect, explain, file_of, job_of
from client.follow import events_since, follow, watch
from deploy.local import commands as stack
from deploy.local.commands import AsJson, Data
from shared.errors import Conflict, MillinerError, NotFound
from shared.schemas.preview import MOST_ROWS
from shared.schemas.requests import ExportName, MethodName, Quantization, State
from shared.schemas.responses import Artifact, Model

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, ftjob-…")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; made if new.", file_okay=False)]
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many to list.")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="K=V", help="A pair of metadata; may be repeated.")]
Dataset = Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True)]

app = typer.Typer(
    help="LoRA fine-tuning on your own server, behind the OpenAI API.", no_args_is_help=True, add_completion=False
)
models = typer.Typer(help="The catalog of base models, and your fine-tuned ones; alone, it lists them.")
files = typer.Typer(help="Datasets and result files; alone, it lists them.")

app.command()(stack.up)
app.command()(stack.down)
app.command()(stack.doctor)
app.add_typer(stack.keys, name="keys")
app.add_typer(models, name="models")
models.command("add")(stack.add_model)
app.add_typer(files, name="files")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point, with the process's arguments: an error that a user can meet is one line, never a traceback."""
    try:
        app(arguments, prog_name="milliner")
    except MillinerError as error:
        _fail(error.message)
    except openai.OpenAIError as error:
        _fail(explain(error))
    except OSError as error:
        # A folder that cannot be written to, a disk that is full.
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    finally:
        disconnect()


# ---------------------------------------------------------------- models


@models.callback(invoke_without_command=True)
def models_alone(context: typer.Context, data: Data = None, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        list_models(data, as_json)


@models.command("ls")
def list_models(data: Data = None, as_json: AsJson = False) -> None:
    """List base models and your fine-tuned ones."""
    page = connect(data).models.list()
    if as_json:
        show.print_json(page)
    else:
        show.console().print(show.models([Model.model_validate(item.to_dict()) for item in page.data]))


@models.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(help="Name in the catalog.")],
    folder: Folder,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Download a base model's files and check each hash."""
    wire = connect(data).models.retrieve(name)
    model = Model.model_validate(wire.to_dict())
    if not model.files:
        raise NotFound(f"{name} is no base model; fetch an adapter with: milliner pull {model.job or 'JOB'} DIR")
    _pull(model.files, folder)
    if as_json:
        show.print_json(wire)
    else:
        show.console().print(f"{name} lies in {folder}")


@models.command("rm")
def remove_model(
    name: Annotated[str, typer.Argument(metavar="ID", help="A fine-tuned model, ft:…")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Delete a fine-tuned model and its adapter's files."""
    wire = connect(data).models.delete(name)
    _print(wire, f"deleted {name}", as_json)


# ---------------------------------------------------------------- files


@files.callback(invoke_without_command=True)
def files_alone(context: typer.Context, data: Data = None, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        list_files(data, as_json)


@files.command("ls")
def list_files(
    data: Data = None,
    as_json: AsJson = False,
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Go on after this file.")] = None,
) -> None:
    """List your files, newest first."""
    page = connect(data).files.list(limit=limit, after=after or openai.omit)
    if as_json:
        show.print_json(page)
    else:
        show.console().print(show.files([file_of(item) for item in page.data]))


@files.command("add")
def add_file(file: Dataset, data: Data = None, as_json: AsJson = False) -> None:
    """Upload a dataset; every row of it is read and checked."""
    with file.open("rb") as stream:
        wire = connect(data).files.create(file=stream, purpose="fine-tune")
    added = file_of(wire)
    if as_json:
        show.print_json(wire)
    elif added.status == "error":
        show.console().print(show.problems(added))
    else:
        show.console().print(show.files([added]))
    if added.status == "error":
        raise typer.Exit(1)


@files.command("rm")
def remove_file(
    file_id: Annotated[str, typer.Argument(metavar="ID")], data: Data = None, as_json: AsJson = False
) -> None:
    """Delete a file that no unfinished job needs."""
    wire = connect(data).files.delete(file_id)
    _print(wire, f"deleted {file_id}", as_json)


@files.command("cat")
def cat_file(file_id: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> None:
    """Write a file's bytes to standard output."""
    with connect(data).files.with_streaming_response.content(file_id) as response:
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)


# ---------------------------------------------------------------- jobs


@app.command("submit")
def submit_job(
    file: Dataset,
    *,
    model: Annotated[str | None, typer.Option(help="Base or fine-tuned model; see: milliner models")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Go on from this adapter: ft:… or ftckpt_…")] = None,
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Rows to evaluate on.")
    ] = None,
    method: Annotated[
        MethodName, typer.Option(help="What the rows are: answers, preferences, or labels.")
    ] = "supervised",
    suffix: Annotated[str | None, typer.Option(help="Part of the adapter's name.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", show_default="auto")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows an optimizer step.", show_default="auto")] = None,
    lr_multiplier: Annotated[float | None, typer.Option(help="Multiplies the rate.", show_default="auto")] = None,
    beta: Annotated[float | None, typer.Option(help="How close DPO keeps to the base.", show_default="auto")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of rows and the adapter's start.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the adapter.", show_default="auto")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha.", show_default="auto")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA's dropout.", show_default="0")] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="How the frozen base is held.", show_default="nf4")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens.", show_default="auto")] = None,
    skip_bad_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Leave out up to N bad rows of a file.", show_default="0")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many optimizer steps.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    export: Annotated[list[ExportName] | None, typer.Option(help="A further form of it; may be repeated.")] = None,
    no_packing: Annotated[bool, typer.Option("--no-packing", help="One row in a sequence.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights of a small base, and no adapter.")] = False,
    priority: Annotated[int | None, typer.Option(help="Higher goes first, -100 to 100.", show_default="0")] = None,
    metadata: Metadata = None,
    follow_it: Annotated[bool, typer.Option("--follow", help="Watch it; Ctrl-C detaches.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, train nothing, keep nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter: check the data, show the plan, send the job."""
    body = submit.body_of(
        model=submit.model_of(model, start),
        method=method,
        hyperparameters={
            "n_epochs": epochs,
            "batch_size": batch_size,
            "learning_rate_multiplier": lr_multiplier,
            "beta": beta,
        },
        lora={"r": r, "alpha": alpha, "dropout": dropout},
        trainer={
            "max_length": max_length,
            "skip_bad_rows": skip_bad_rows,
            "max_steps": max_steps,
            "eval_every": eval_every,
            "save_every": save_every,
            "exports": export or None,
            "packing": False if no_packing else None,
            "full_finetuning": full or None,
        },
        quantization=quantization,
        from_checkpoint=start,
        suffix=suffix,
        seed=seed,
        priority=priority,
        metadata=_pairs(metadata),
    )
    out, notes, client = show.console(), show.console(stderr=True), connect(data)
    spinner = notes.status(f"reading {file.name}")

    def accept(rehearsal: FineTuningJob) -> bool:
        spinner.stop()
        if dry_run and as_json:
            show.print_json(rehearsal)
        plan = job_of(rehearsal).plan
        if plan is not None and not as_json:
            out.print(show.plan(plan))
        if dry_run or yes or as_json or not sys.stdin.isatty():
            return not dry_run
        return typer.confirm("Send this job?", default=True)

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
        _follow(client, wire.id, as_json)
    else:
        _print(wire, f"{wire.id} is sent; watch it with: milliner show {wire.id} --follow", as_json)


@app.command("estimate")
def estimate_job(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Base model; see: milliner models")],
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A dataset, or the id of an uploaded one.")
    ] = None,
    *,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the adapter.", show_default="auto")] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="How the frozen base is held.", show_default="nf4")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens.", show_default="auto")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows at a time.", show_default="auto")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", show_default="auto")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.", show_default="cuda")] = None,
    device_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="What there is, such as 24GB.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a job fits, how long it takes, and what would make it fit; exit 1 if it does not."""
    answer = estimate.ask(
        connect(data),
        file,
        model=model,
        lora={"r": r},
        quantization=quantization,
        trainer={"max_length": max_length, "micro_batch": micro_batch},
        hyperparameters={"n_epochs": epochs},
        device=device,
        device_memory_bytes=estimate.bytes_of(device_memory) if device_memory else None,
    )
    _print(answer, estimate.verdict(answer), as_json)
    if answer.fits is False:
        raise typer.Exit(1)


@app.command("preview")
def preview_rows(
    file: Annotated[str, typer.Argument(metavar="FILE_OR_ID", help="A dataset, or the id of an uploaded one.")],
    *,
    model: Annotated[str, typer.Option(help="Base model; see: milliner models")],
    rows: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="How many, from the first.")] = 5,
    line: Annotated[
        list[int] | None, typer.Option(metavar="N", min=1, help="This row instead; may be repeated.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens.", show_default="auto")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as tokens, and which of them are trained; exit 1 if a row cannot be trained on."""
    out, question = show.console(), {"model": model, "rows": rows}
    question |= {"lines": line} if line else {}
    question |= {"trainer": {"max_length": max_length}} if max_length else {}
    with show.console(stderr=True).status(f"reading {file}"):
        answer = preview.ask(connect(data), file, **question)
    if as_json:
        show.print_json(answer.model_dump(mode="json"))
    else:
        out.print(preview.rows(answer, colour=out.color_system is not None), soft_wrap=True)
    if answer.problems:
        raise typer.Exit(1)


@app.command("ls")
def list_jobs(
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(metavar="JOB", help="Go on after this job.")] = None,
    metadata: Metadata = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """List your jobs, newest first."""
    page = connect(data).fine_tuning.jobs.list(
        limit=limit, after=after or openai.omit, metadata=_pairs(metadata) or openai.omit
    )
    if as_json:
        show.print_json(page)
    else:
        show.console().print(show.jobs([job_of(item) for item in page.data]))


@app.command("show")
def show_job(
    job_id: JobId,
    follow_it: Annotated[bool, typer.Option("--follow", help="Watch it first; Ctrl-C detaches.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show a job: state, queue position, progress, plan, result, adapter."""
    client = connect(data)
    if follow_it:
        _follow(client, job_id, as_json)
        return
    wire = client.fine_tuning.jobs.retrieve(job_id)
    _print(wire, show.job(job_of(wire)), as_json)


@app.command("report")
def report_job(job_id: JobId, data: Data = None, as_json: AsJson = False) -> None:
    """Say what a job learned: base against tuned, how sure that is, samples of both, what it cost."""
    job = job_of(connect(data).fine_tuning.jobs.retrieve(job_id))
    if job.report is None:
        raise Conflict(f"{job_id} has no report: it is {job.status}; see: milliner show {job_id}", code="no_report")
    exports = job.adapter.exports if job.adapter else []
    _print(job.report, report.document(job.report, exports), as_json)


@app.command()
def logs(
    job_id: JobId,
    follow_it: Annotated[bool, typer.Option("--follow", help="Go on to the job's end.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's events, oldest first; with --follow --json, one event a line."""
    client, out = connect(data), show.console()
    if as_json and not follow_it:
        events = [event.model_dump(mode="json") for event in events_since(client, job_id)]
        show.print_json({"object": "list", "data": events, "has_more": False})
        return
    batches = (sight.events for sight in watch(client, job_id)) if follow_it else [events_since(client, job_id)]
    try:
        for batch in batches:
            for event in batch:
                if as_json:
                    print(json.dumps(event.model_dump(mode="json"), ensure_ascii=False), flush=True)
                else:
                    out.print(show.event(event), soft_wrap=True)
    except KeyboardInterrupt:
        _detached(job_id, "milliner logs {} --follow")


@app.command()
def cancel(job_id: JobId, data: Data = None, as_json: AsJson = False) -> None:
    """Cancel a job: at once if it waits, within a heartbeat if it runs."""
    wire = connect(data).fine_tuning.jobs.cancel(job_id)
    done = job_of(wire).status == State.CANCELLED
    _print(wire, f"{job_id} is {'cancelled' if done else 'being cancelled'}", as_json)


@app.command()
def pull(job_id: JobId, folder: Folder, data: Data = None, as_json: AsJson = False) -> None:
    """Download a job's adapter and check each hash."""
    wire = connect(data).fine_tuning.jobs.retrieve(job_id)
    job = job_of(wire)
    if job.adapter is None:
        raise Conflict(f"{job_id} has no adapter: it is {job.status}; see: milliner show {job_id}", code="no_adapter")
    _pull(job.adapter.files, folder)
    signed_by = verify.signer(folder)
    signed = f"signed by {signed_by}" if signed_by else "not signed"
    _print(job.adapter, f"the adapter of {job_id} lies in {folder}, every hash checked, {signed}", as_json)


@app.command("verify")
def verify_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter.", exists=True, file_okay=False)],
    key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Public key that must have signed it.", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter's hashes and signature, without a server; exit 1 if anything is not as published."""
    found = verify.verify(folder, key)
    _print(found, verify.verdict(found), as_json)
    if not found.ok:
        raise typer.Exit(1)


# ---------------------------------------------------------------- what several commands do


def _follow(client: OpenAI, job_id: str, as_json: bool) -> None:
    """Watch to the end and show how it came out; the live line goes to stderr where stdout is for a program."""
    try:
        follow(client, job_id, show.console(stderr=as_json))
    except KeyboardInterrupt:
        _detached(job_id, "milliner show {} --follow")
    wire = client.fine_tuning.jobs.retrieve(job_id)
    job = job_of(wire)
    if as_json:
        show.print_json(wire)
    else:
        show.console().print(show.outcome(job))
    if job.status != State.SUCCEEDED:
        raise typer.Exit(1)


def _detached(job_id: str, again: str) -> NoReturn:
    """Exit as a shell expects of Ctrl-C: what waits for this command's success must not go on."""
    show.console(stderr=True).print(f"\ndetached; {job_id} goes on. Watch it again with: {again.format(job_id)}")
    raise typer.Exit(130)


def _pull(artifacts: list[Artifact], folder: Path) -> None:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = show.console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(artifact.bytes for artifact in artifacts))
        download.pull(artifacts, folder, on_bytes=lambda count: bar.advance(task, count))


def _pairs(items: list[str] | None) -> dict[str, str] | None:
    if not items:
        return None
    for item in items:
        if "=" not in item:
            raise typer.BadParameter(f"found {item!r}; allowed: key=value", param_hint="--metadata")
    return dict(item.split("=", 1) for item in items)


def _print(wire: BaseModel, text: RenderableType, as_json: bool) -> None:
    if as_json:
        show.print_json(wire)
    else:
        show.console().print(text, soft_wrap=isinstance(text, str))  # a line that is copied must stay one


def _fail(text: str) -> NoReturn:
    show.console(stderr=True).print(f"milliner: {text}", soft_wrap=True)
    sys.exit(1)
