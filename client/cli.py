"""The `milliner` command: registers every command, and turns an error into one line.

Owns: the commands about existing jobs, one function per command. client/new_job.py has those that create jobs,
client/catalog.py those for models and files, `deploy.local` those of the stack. Anything longer than a call and a print
is in a module of its own: connect, download, follow, report, show, verify.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import openai
import typer

from client import catalog, new_job, report, show, verify
from client.connect import connect, disconnect, explain, job_of
from client.follow import events_since, watch
from client.terminal import Folder, Limit, Metadata, detached, follow_job, pairs, print_result, pull_files
from deploy.local import commands as stack
from deploy.local.commands import AsJson, Data
from shared.errors import Conflict, MillinerError
from shared.schemas.requests import State

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, ftjob-…")]

app = typer.Typer(help="LoRA fine-tuning on your own server, behind the OpenAI API.", no_args_is_help=True)
app.command()(stack.up)
app.command()(stack.down)
app.command()(stack.doctor)
app.add_typer(stack.keys, name="keys")
app.add_typer(catalog.models, name="models")
app.add_typer(catalog.files, name="files")
app.command("submit")(new_job.submit_job)
app.command("estimate")(new_job.estimate_job)
app.command("preview")(new_job.preview_rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An expected error is one line on stderr, without a traceback."""
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


@app.command("ls")
def list_jobs(
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(metavar="JOB", help="List those after this job.")] = None,
    metadata: Metadata = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """List your jobs, newest first."""
    page = connect(data).fine_tuning.jobs.list(
        limit=limit, after=after or openai.omit, metadata=pairs(metadata) or openai.omit
    )
    if as_json:
        show.print_json(page)
    else:
        show.console().print(show.jobs([job_of(item) for item in page.data]))


@app.command("show")
def show_job(
    job_id: JobId,
    follow_it: Annotated[bool, typer.Option("--follow", help="Watch the job until it ends; Ctrl-C detaches.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show a job: state, queue position, progress, plan, result, adapter."""
    client = connect(data)
    if follow_it:
        follow_job(client, job_id, as_json)
        return
    wire = client.fine_tuning.jobs.retrieve(job_id)
    print_result(wire, show.job(job_of(wire)), as_json)


@app.command("report")
def report_job(job_id: JobId, data: Data = None, as_json: AsJson = False) -> None:
    """Report what a job learned: scores of base and tuned model, confidence interval, samples, cost."""
    job = job_of(connect(data).fine_tuning.jobs.retrieve(job_id))
    if job.report is None:
        raise Conflict(f"{job_id} has no report: it is {job.status}; see: milliner show {job_id}", code="no_report")
    exports = job.adapter.exports if job.adapter else []
    print_result(job.report, report.document(job.report, exports), as_json)


@app.command()
def logs(
    job_id: JobId,
    follow_it: Annotated[bool, typer.Option("--follow", help="Follow until the job ends.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's events, oldest first; with --follow --json, one event per line."""
    client, out = connect(data), show.console()
    if as_json and not follow_it:
        events = [event.model_dump(mode="json") for event in events_since(client, job_id)]
        show.print_json({"object": "list", "data": events, "has_more": False})
        return
    batches = (snapshot.events for snapshot in watch(client, job_id)) if follow_it else [events_since(client, job_id)]
    try:
        for batch in batches:
            for event in batch:
                if as_json:
                    print(json.dumps(event.model_dump(mode="json"), ensure_ascii=False), flush=True)
                else:
                    out.print(show.event(event), soft_wrap=True)
    except KeyboardInterrupt:
        detached(job_id, "milliner logs {} --follow")


@app.command()
def cancel(job_id: JobId, data: Data = None, as_json: AsJson = False) -> None:
    """Cancel a job: at once if it is waiting, within a heartbeat if it is running."""
    wire = connect(data).fine_tuning.jobs.cancel(job_id)
    done = job_of(wire).status == State.CANCELLED
    print_result(wire, f"{job_id} is {'cancelled' if done else 'being cancelled'}", as_json)


@app.command()
def pull(job_id: JobId, folder: Folder, data: Data = None, as_json: AsJson = False) -> None:
    """Download a job's adapter and check each hash."""
    wire = connect(data).fine_tuning.jobs.retrieve(job_id)
    job = job_of(wire)
    if job.adapter is None:
        raise Conflict(f"{job_id} has no adapter: it is {job.status}; see: milliner show {job_id}", code="no_adapter")
    pull_files(job.adapter.files, folder)
    signed_by = verify.signer(folder)
    signed = f"signed by {signed_by}" if signed_by else "not signed"
    print_result(job.adapter, f"saved the adapter of {job_id} to {folder}, every hash checked, {signed}", as_json)


@app.command("verify")
def verify_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter.", exists=True, file_okay=False)],
    key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Public key that must have signed it.", dir_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter's hashes and signature, without a server; exit 1 if anything differs from what was published."""
    found = verify.verify(folder, key)
    print_result(found, verify.verdict(found), as_json)
    if not found.ok:
        raise typer.Exit(1)


def _fail(text: str) -> NoReturn:
    show.console(stderr=True).print(f"milliner: {text}", soft_wrap=True)
    sys.exit(1)
