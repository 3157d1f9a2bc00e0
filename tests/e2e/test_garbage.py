"""Garbage collection end to end: what people still have stays whole, what a deleted run left goes."""

from __future__ import annotations

import json
from pathlib import Path

from alveary_archiver.collector import BUCKETS, Collector
from support import embedded, finished, lines, submit, until

from alveary.dataset import Dataset
from alveary.run import Run
from alveary_contracts.digests import manifest_from_json
from alveary_core.eventlog import EventLog, connect
from alveary_core.objectstore import ObjectStore

CODE = """
import os, sys
from alveary import Run
print("a line of", {name!r}, sorted(os.listdir(sys.argv[1])))
os.makedirs("outputs/checkpoints")
for path in ("outputs/m.pt", "outputs/checkpoints/e1"):
    with open(path, "w") as file:
        file.write("weights of " + {name!r})
if {name!r} == "kept":  # a model keeps the source that it was made by
    Run.get_context().register_model("in-run", "outputs/m.pt")
"""


def test_what_people_have_stays_and_what_a_deleted_run_left_goes(tmp_path: Path, source: Path) -> None:
    """On a stack of its own: a collection without grace takes what others are about to use."""
    with embedded(tmp_path / "stack") as stack:
        workspace = stack.workspace()
        known = json.loads((stack.state_dir / "stack.json").read_text())
        (tmp_path / "data").mkdir()
        (tmp_path / "data/row").write_text("1")
        data = Dataset.upload(workspace, str(tmp_path / "data"), "rows")
        store = ObjectStore(f"127.0.0.1:{known['ports']['s3']}", known["secrets"]["s3_access"], known["secrets"]["s3_secret"])

        def run_of(name: str) -> Run:
            return submit(workspace, source, CODE.format(name=name), data.as_mount("data"))

        kept, deleted = run_of("kept"), run_of("deleted")
        for run in (kept, deleted):
            finished(run)
        model = kept.register_model("registered", "outputs")

        async def listed() -> set[str]:
            return {f"{bucket}/{key}" for bucket in (*BUCKETS, "runs", "images") for key in await store.keys(bucket, "")}

        async def files(digest: str) -> set[str]:
            return {f.sha256 for f in manifest_from_json(await store.get("snapshots", f"manifests/{digest}.json")).files}

        async def collected() -> Collector:
            connection = await connect(f"nats://127.0.0.1:{known['ports']['nats']}", "archiver", known["secrets"]["archiver"], "test")
            collector = Collector(EventLog(connection, "test"), store, -1.0)
            try:
                await collector.collect(False)
            finally:
                await connection.close()
            return collector

        until(lambda: any(k.startswith(f"runs/{kept.id}/log-") for k in workspace._call(listed())), "its log is archived")
        until(lambda: any(k.startswith(f"runs/{deleted.id}/log-") for k in workspace._call(listed())), "the other's as well")
        digests = [run.get_details()["spec"]["snapshot"] for run in (kept, deleted)]
        own = workspace._call(files(digests[1])) - workspace._call(files(digests[0]))
        assert own

        until(lambda: workspace._call(store.keys("archive", "ALVEARY/")), "the log has a second copy")
        assert "0 objects of 0 bytes would be removed" in stack.cli("admin", "gc", "--dry-run").stdout
        assert "unused files: 0 objects of 0.0 MB could be removed" in stack.cli("status").stdout
        refused = stack.cli("admin", "gc", "--grace-days", "1", check=False)
        assert refused.returncode == 2 and "--grace-days" in refused.stderr
        deleted.delete()
        until(lambda: not [k for k in workspace._call(listed()) if k.startswith(f"runs/{deleted.id}/")], "its objects are gone")
        before = workspace._call(listed())
        # Its events are purged after its objects.
        until(lambda: ("snapshots", "manifests") in workspace._call(collected()).tallies, "its snapshot is collected")
        gone = {k for k in before - workspace._call(listed()) if "/claims/" not in k and "/probe/" not in k}
        assert gone == {f"snapshots/manifests/{digests[1]}.json", *(f"snapshots/blobs/{digest}" for digest in own)}

        kept.download_files("outputs", str(tmp_path / "outputs"))
        assert (tmp_path / "outputs/outputs/checkpoints/e1").read_text() == "weights of kept"
        assert lines(kept) == ["a line of kept ['row']"]
        assert sorted(model.get_file_names()) == ["checkpoints/e1", "m.pt"]
        for name in ("registered", "in-run"):
            workspace.models[name].download(str(tmp_path / name))
        assert (tmp_path / "in-run/m.pt").read_text() == "weights of kept"
        data.download(str(tmp_path / "rows"))
        assert (tmp_path / "rows/row").read_text() == "1"
        again = submit(workspace, source, CODE.format(name="kept"), data.as_mount("data"), resume_from=kept.id)
        finished(again)
        store.close()
    # And while the stack is stopped: its servers are started for it alone.
    assert "would be removed: nothing refers to them" in stack.cli("admin", "gc", "--dry-run").stdout
