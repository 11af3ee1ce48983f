"""The command `unicom`. Subcommands import what they need when they run, so that `--help` starts without torch."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from unicom_dist import __version__
from unicom_dist.cli import (
    ablate,
    chat,
    config,
    convert,
    data,
    doctor,
    evaluate,
    features,
    generate,
    latents,
    plan,
    report,
    sample,
    train,
)
from unicom_dist.cli.failure import guarded

app = typer.Typer(
    name="unicom",
    help="Train and run models that read and draw images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("doctor")(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(features.app, name="features")
app.add_typer(latents.app, name="latents")
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.add_typer(ablate.app, name="ablate")
app.command("report")(report.report)
app.add_typer(convert.app, name="convert")


def _print_version(value: bool) -> None:
    if value:
        print(f"unicom {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Train and run models that read and draw images."""


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status."""
    command = typer.main.get_command(app)
    return guarded(lambda: command.main(list(arguments), prog_name="unicom", standalone_mode=False))


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
