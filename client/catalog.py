"""`milliner models` and `milliner files`: list, download, add and delete what the server stores.

Owns: one function per command.
"""

from __future__ import annotations

import sys
from typing import Annotated

import openai
import typer

from client import show
from client.connect import connect, file_of
from client.terminal import Dataset, Folder, Limit, print_result, pull_files
from deploy.local import commands as stack
from deploy.local.commands import AsJson, Data
from shared.errors import NotFound
from shared.schemas.responses import Model

models = typer.Typer(help="Base models and your fine-tuned models. Without a subcommand, list them.")
files = typer.Typer(help="Datasets and result files. Without a subcommand, list them.")
models.command("add")(stack.add_model)


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
        raise NotFound(f"{name} is not a base model; download an adapter with: milliner pull {model.job or 'JOB'} DIR")
    pull_files(model.files, folder)
    if as_json:
        show.print_json(wire)
    else:
        show.console().print(f"saved {name} to {folder}")


@models.command("rm")
def remove_model(
    name: Annotated[str, typer.Argument(metavar="ID", help="A fine-tuned model, ft:…")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Delete a fine-tuned model and its adapter's files."""
    wire = connect(data).models.delete(name)
    print_result(wire, f"deleted {name}", as_json)


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
    after: Annotated[str | None, typer.Option(metavar="ID", help="List those after this file.")] = None,
) -> None:
    """List your files, newest first."""
    page = connect(data).files.list(limit=limit, after=after or openai.omit)
    if as_json:
        show.print_json(page)
    else:
        show.console().print(show.files([file_of(item) for item in page.data]))


@files.command("add")
def add_file(file: Dataset, data: Data = None, as_json: AsJson = False) -> None:
    """Upload a dataset; the server checks every row."""
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
    """Delete a file that no unfinished job uses."""
    wire = connect(data).files.delete(file_id)
    print_result(wire, f"deleted {file_id}", as_json)


@files.command("cat")
def cat_file(file_id: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> None:
    """Write a file's bytes to standard output."""
    with connect(data).files.with_streaming_response.content(file_id) as response:
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)
