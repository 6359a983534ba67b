"""`python -m deploy.local`: the stack's commands without the client. `up --detach` starts its supervisor this way."""

from __future__ import annotations

import typer

from deploy.local import commands

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(commands.up)
app.command()(commands.down)
app.command()(commands.doctor)
app.add_typer(commands.keys, name="keys")
app.command("add-model")(commands.add_model)

if __name__ == "__main__":
    app()
