"""`alveary doctor`: what this machine is like, what is wrong with it, and what to do. Needs no stack, and changes nothing."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import asdict
from pathlib import Path

import click

from alveary.cli.common import json_option, print_json, state_dir_option, state_folder
from alveary.cli.findings import BROKEN, NOTE, OK, WARNING, Check, Finding, Patient
from alveary.errors import AlvearyError

# Longest time of one check, seconds: a name server or a mount may not answer at all.
_PATIENCE = 10.0


@click.command()
@state_dir_option
@json_option
def doctor(state_dir: Path | None, as_json: bool) -> None:
    """Check this machine, and say what to do about what is wrong.

    Exit code 1: something is broken. Warnings are what works less well than it could, or will fail later.
    """
    from alveary.cli import checks

    try:
        folder = state_folder(state_dir)
    except AlvearyError as error:  # no home
        folder = Path("/nonexistent/.alveary")
        found = [Finding("home", BROKEN, str(error))]
    else:
        found = []
    found += [one for name, check in checks.CHECKS.items() for one in examined(name, check, Patient(folder))]
    broken, warnings = (sum(f.state == state for f in found) for state in (BROKEN, WARNING))
    if as_json:
        print_json({"broken": broken, "warnings": warnings, "state_dir": str(folder), "findings": [asdict(f) for f in found]})
    else:
        _print(found, broken, warnings)
    raise click.exceptions.Exit(1 if broken else 0)


def examined(name: str, check: Check, patient: Patient) -> list[Finding]:
    """What one check finds. One that takes too long, or fails, is a finding itself: the others go on."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=f"doctor-{name}")
    try:
        return pool.submit(lambda: list(check(patient))).result(_PATIENCE)
    except TooLate:
        return [
            Finding(name, BROKEN, f"looking at it took longer than {_PATIENCE:g} s", "see whether a mount or a name server does not answer")
        ]
    except Exception as error:
        return [Finding(name, WARNING, f"it could not be looked at: {type(error).__name__}: {error}")]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _print(found: list[Finding], broken: int, warnings: int) -> None:
    from alveary.text import printable

    colours = {OK: "green", NOTE: None, WARNING: "yellow", BROKEN: "red"}
    width = max(len(f.check) for f in found)
    for one in found:
        click.echo(f"{click.style(f'{one.state:7}', fg=colours[one.state])}  {one.check:{width}}  {printable(one.text)}")
        if one.advice:
            click.echo(f"{'':7}  {'':{width}}  -> {printable(one.advice)}")
    click.echo(f"{broken} broken, {warnings} warnings" if broken or warnings else "nothing is wrong")
    sys.stdout.flush()
    if any(one.text.startswith("looking at it took longer") for one in found):
        os._exit(1 if broken else 0)  # its thread would be waited for
