"""The command line: `alveary --help`.

Exit codes: 0 it worked; 1 the platform refused or failed; 2 the command line is wrong; 3 the run Failed; 4 the run
was Canceled; 5 no platform runs; 130 interrupted with Ctrl-C.

A command that reads costs what it reads: modules are imported when a command is used (`alveary.cli.lazy`), and those that
talk to the platform inside of the commands.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Any

import click

from alveary import __version__
from alveary.cli.common import INTERRUPTED, NO_PLATFORM, say
from alveary.cli.lazy import LazyGroup
from alveary.errors import AlvearyError, NoPlatform

app = LazyGroup(
    "alveary",
    help="Train PyTorch models at scale and register them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    lazy={
        "up": ("alveary.cli.stack:up", "Start the whole platform on this machine."),
        "down": ("alveary.cli.stack:down", "Stop the platform on this machine."),
        "status": ("alveary.cli.stack:status", "Say whether the platform runs, and what it has to do."),
        "doctor": ("alveary.cli.doctor:doctor", "Check this machine, and say what to do about what is wrong."),
        "run": ("alveary.cli.runs:run", "Submit, look at and end runs."),
        "experiment": ("alveary.cli.experiments:experiment", "Experiments: runs under one name."),
        "compute": ("alveary.cli.compute:compute", "Compute targets."),
        "node": ("alveary.cli.nodes:node", "Make machines nodes of a compute target of kind `nodes`."),
        "image": ("alveary.cli.images:image", "Images of environments."),
        "model": ("alveary.cli.models:model", "Models."),
        "dataset": ("alveary.cli.models:dataset", "Datasets."),
        "admin": ("alveary.cli.admin:admin", "Verify and restore the event log; remove unused files; see to unhandled events."),
        "events": ("alveary.cli.events:events", "Events."),
        "completion": ("alveary.cli.completion:completion", "Print the shell's code that completes commands and options."),
    },
)
click.version_option(__version__, prog_name="alveary", message="%(prog)s %(version)s")(app)


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"note: {message}")


def main() -> None:
    """Entry point: errors are sentences, never tracebacks."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines say less than our errors do
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale that lacks a character shows its escape
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show
    try:
        code = app.main(prog_name="alveary", standalone_mode=False)
    except AlvearyError as error:
        say(f"error: {error}", red=True)
        code = NO_PLATFORM if isinstance(error, NoPlatform) else 1
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)  # it repeats what was typed
        say(shown.getvalue().rstrip("\n"))
        code = error.exit_code
    except click.Abort:
        code = INTERRUPTED
    except OSError as error:
        if error.filename is None:
            raise  # not a file that the command line named
        say(f"error: {error.filename}: {error.strerror}", red=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
