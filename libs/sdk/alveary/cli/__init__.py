"""The command line: `alveary --help`.

Exit codes: 0 it worked; 1 the platform refused or failed; 2 the command line is wrong; 3 the run Failed; 4 the run
was Canceled; 5 no platform runs.
"""

from __future__ import annotations

import os
import sys

import typer

from alveary.cli import stack
from alveary.cli.admin import admin_app
from alveary.cli.common import NO_PLATFORM, err
from alveary.cli.compute import compute_app
from alveary.cli.events import events_app
from alveary.cli.images import image_app
from alveary.cli.models import dataset_app, model_app
from alveary.cli.nodes import node_app
from alveary.cli.runs import run_app
from alveary.errors import AlvearyError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train PyTorch models at scale and register them.")
app.command("up")(stack.up)
app.command("down")(stack.down)
app.command("status")(stack.status_command)
for _name, _group in (
    ("run", run_app),
    ("compute", compute_app),
    ("node", node_app),
    ("image", image_app),
    ("model", model_app),
    ("dataset", dataset_app),
    ("admin", admin_app),
    ("events", events_app),
):
    app.add_typer(_group, name=_name)


def main() -> None:
    """Entry point: errors are sentences, never tracebacks."""
    try:
        app()
    except AlvearyError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(NO_PLATFORM if "start it with `alveary up`" in str(error) or "no config.json" in str(error) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
