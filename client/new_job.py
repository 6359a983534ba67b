"""`milliner submit`, and the two questions that come before it: `estimate` and `preview`.

Owns: one function per command. client/cli.py registers them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from openai.types.fine_tuning import FineTuningJob

from client import estimate, preview, show, submit
from client.connect import connect, job_of
from client.terminal import Dataset, Metadata, follow_job, pairs, print_result
from deploy.local.commands import AsJson, Data
from shared.preview import MOST_ROWS
from shared.schemas import ExportName, MethodName, Quantization


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
        metadata=pairs(metadata),
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
        follow_job(client, wire.id, as_json)
    else:
        print_result(wire, f"{wire.id} is sent; watch it with: milliner show {wire.id} --follow", as_json)


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
    print_result(answer, estimate.verdict(answer), as_json)
    if answer.fits is False:
        raise typer.Exit(1)


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
