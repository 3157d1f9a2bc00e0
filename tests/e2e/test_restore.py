"""The event log's disk is destroyed; the second copy brings every run and model back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import embedded, finished, lines, submit, until

from alveary import Model


def admin(state: Path, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alveary.cli", "admin", what, "--state-dir", str(state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)


def test_every_run_and_model_is_there_after_the_event_log_was_destroyed(tmp_path: Path, source: Path) -> None:
    state = tmp_path / "stack"
    with embedded(state) as stack:
        workspace = stack.workspace()
        run = submit(
            workspace, source, "from alveary import Run; Run.get_context().log('x', 3); print('hi'); open('outputs/m', 'w').write('m')"
        )
        before = finished(run)
        model = run.register_model("kept", "outputs/m")
        until(lambda: admin(state, "verify").stdout.count(", 0 are not copied yet") == 2, "all is copied")
        assert admin(state, "restore").returncode == 1
    shutil.rmtree(state / "nats")
    done = admin(state, "restore")
    assert done.returncode == 0 and "messages restored" in done.stdout, done.stderr
    for file in (state / "services").glob("*.sqlite*"):
        file.unlink()
    with embedded(state, port=None) as stack:
        workspace = stack.workspace()
        again = workspace.get_run(run.id)
        after = again.get_details()
        for name in ("status", "submitted_at", "ended_at", "metrics", "exit", "manifest_digest"):
            assert json.dumps(after[name]) == json.dumps(before[name]), name
        assert lines(again) == ["hi"] and again.get_metrics() == {"x": 3.0}
        assert Model(workspace, "kept").version == model.version
        finished(submit(workspace, source, "print('and on')"))
        until(lambda: admin(state, "verify").stdout.count(", 0 are not copied yet") == 2, "the copy goes on")
