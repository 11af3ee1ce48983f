"""`unicom doctor`: what this machine has, what is missing, what to do."""

from dataclasses import asdict
from typing import Annotated

import typer

from unicom_dist.cli.checks import all_checks
from unicom_dist.cli.screen import AsJson, console, print_json, say
from unicom_dist.config.errors import PreflightError

MARKS = {"good": ("ok     ", "green"), "optional": ("absent ", "yellow"), "missing": ("MISSING", "red")}


def doctor(
    as_json: AsJson = False,
    environment: Annotated[bool, typer.Option("--env", help="Print versions only, to paste into a report.")] = False,
) -> None:
    """Say what this machine has, what is missing and what to do. Exit status 3 if something needed is missing."""
    if environment:
        from unicom_dist.tracking.env import collect_env

        print_json(collect_env(["unicom", "doctor"]))
        return
    checks = all_checks()
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        from rich.text import Text

        width = max(len(check.name) for check in checks)
        for check in checks:
            mark, colour = MARKS[check.state]
            console().print(Text(mark, colour), Text(f" {check.name:<{width}}  {check.found}"))
            if check.remedy:
                say(f"{'':{len(mark) + width + 3}}  -> {check.remedy}")
    missing = [check for check in checks if check.state == "missing"]
    if missing:
        raise PreflightError(
            "missing: " + ", ".join(check.name for check in missing),
            "training would stop there",
            missing[0].remedy,
            "docs/getting-started.md",
        )
