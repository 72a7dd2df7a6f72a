"""The command line: `dyndepth info | demo | fit | train | calibrate | report | exits | generate | plan | profile | tune`."""

from __future__ import annotations

import typer

from dyndepth.cli import look, make, plan, profile, run, tune
from dyndepth.cli.common import ERRORS, app

__all__ = ["app", "look", "main", "make", "plan", "profile", "run", "tune"]


def main() -> None:
    """Entry point: our own errors are one line, not a traceback."""
    try:
        app()
    except ERRORS as error:
        typer.secho(f"dyndepth: {error}", fg="red", err=True)
        raise SystemExit(1) from None
