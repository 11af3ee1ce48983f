"""`unicom report`: one HTML page for one or several runs, and the same in MLflow."""

from pathlib import Path
from typing import Annotated

import typer

from unicom_dist.cli.screen import logged, say


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="The page to write [default: report.html in the first run].")] = None,
) -> None:
    """Write a self-contained page. Curves, pictures over time, reconstructions, figures, configuration, environment."""
    from unicom_dist.tracking import mirror, report

    with logged():
        page = report.run(runs, out)
        say(f"report: {page}")
        for run in runs:
            result = mirror.sync(run)
            say(result.message)
            if result.ui_command:
                say(f"open the MLflow UI: {result.ui_command}")
