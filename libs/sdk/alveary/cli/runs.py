"""alveary run: its commands by name; each is imported when it is used."""

from __future__ import annotations

from alveary.cli.lazy import LazyGroup

run = LazyGroup(
    "run",
    help="Submit, look at and end runs.",
    no_args_is_help=True,
    lazy={
        "submit": ("alveary.cli.run_submit:submit", "Submit a run of a source directory; prints its id."),
        "list": ("alveary.cli.run_list:list_runs", "Runs, newest first."),
        "compare": ("alveary.cli.run_compare:compare", "Where runs differ."),
        "show": ("alveary.cli.run_show:show_run", "One run: what it is, how it went, what it left, and where its log is."),
        "metrics": ("alveary.cli.run_list:metrics", "What a run logged."),
        "why": ("alveary.cli.run_show:why", "Why a run is queued, and when it is expected to begin."),
        "watch": ("alveary.cli.run_logs:watch", "States and log lines until it is final."),
        "logs": ("alveary.cli.run_logs:logs", "Its log lines."),
        "cancel": ("alveary.cli.run_show:cancel", "Ask for its end."),
        "delete": ("alveary.cli.run_show:delete", "Erase final runs: their files, checkpoints, logs and metrics."),
        "files": ("alveary.cli.run_files:files", "Files that it stored."),
        "download": ("alveary.cli.run_files:download", "Store its files here."),
    },
)
