"""Files end to end: what goes in comes out, whatever people call it, however many there are, and nothing is lost on the way."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from support import TORCH, Embedded, finished, lines, submit, until

from alveary.dataset import Dataset
from alveary.errors import AlvearyError, AlvearyWarning
from alveary.model import Model
from alveary.run import Experiment, Run
from alveary.script_run_config import ScriptRunConfig
from alveary.workspace import Workspace
from alveary_core.eventlog import EventLog, connect
from alveary_core.events import Key
from alveary_core.objectstore import ObjectStore

MANY = 450


@pytest.fixture(scope="module")
def failed(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that stored files, and failed; submitted as people write paths, with what another run left in its source."""
    source = tmp_path_factory.mktemp("source")
    for path in ("outputs/model.pt", "logs/old.log", "lib/v1/helper.py"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text("import sys\n")
    (source / "current").symlink_to("lib/v1")
    (source / "train.py").write_text(
        f"""
import os, sys
sys.path.insert(0, "current")
import helper
assert os.listdir("outputs") == [] and not os.path.exists("logs/old.log")
os.makedirs("outputs/many")
for n in range({MANY}):
    with open(f"outputs/many/{{n:03}}.txt", "w") as file:
        file.write(f"number {{n}}")
with open("outputs/m.pt", "w") as file:
    file.write("weights")
sys.exit(3)
"""
    )
    config = ScriptRunConfig(str(source), "./train.py", environment=TORCH)
    with pytest.warns(AlvearyWarning, match="./outputs is no part"), pytest.warns(AlvearyWarning, match="./logs is no part"):
        run = Experiment(workspace, "files").submit(config)
    finished(run, "Failed")
    return run


def test_a_model_of_a_failed_run_says_so(failed: Run, workspace: Workspace) -> None:
    name = f"failed-{os.getpid()}"
    with pytest.warns(AlvearyWarning, match=f"run {failed.id} had Failed"):
        model = failed.register_model(name, "./outputs//m.pt")
    assert model.get_file_names() == ["m.pt"]
    assert model.lineage["run_state"] == "Failed"
    assert Model(workspace, name).lineage["run_state"] == "Failed"


def test_paths_are_taken_as_people_write_them(failed: Run, tmp_path: Path) -> None:
    names = failed.get_file_names()
    assert len(names) == MANY + 1 and "outputs/m.pt" in names
    for number, name in enumerate(("./outputs/m.pt", "outputs//m.pt", "outputs/./m.pt", "outputs\\m.pt")):
        path = failed.download_file(name, str(tmp_path / str(number)))
        assert Path(path).read_text() == "weights"
    failed.download_files("./outputs/many/", str(tmp_path / "many"))
    assert len(list((tmp_path / "many/outputs/many").iterdir())) == MANY
    for name in ("../outputs/m.pt", "/outputs/m.pt"):
        with pytest.raises(AlvearyError, match="stored no"):
            failed.download_file(name, str(tmp_path / "x"))
        with pytest.raises(AlvearyError, match="stored no"):
            failed.register_model("m", name)
    for name in ("outputs/many/", "./outputs/many/."):
        with pytest.warns(AlvearyWarning):
            assert len(failed.register_model(f"many-{os.getpid()}", name).get_file_names()) == MANY


def test_a_model_of_many_files_is_no_large_event(failed: Run, workspace: Workspace, stack: Embedded, tmp_path: Path) -> None:
    name = f"large-{os.getpid()}"
    with pytest.warns(AlvearyWarning):
        model = failed.register_model(name)
    events = workspace.events.subscribe("model.registered", from_sequence=1, timeout=20)
    body = next(e for e in events if e.subject == name).data
    assert "manifest" not in body and len(json.dumps(body)) < 2000
    assert (body["fileCount"], body["manifestDigest"]) == (str(MANY + 1), model._found.manifest_digest)
    shown = json.loads(stack.cli("model", "show", name, "--json").stdout)
    assert shown["file_count"] == str(MANY + 1) and "manifest" not in shown
    client = workspace._client
    from alveary_contracts.registry.v1 import registry_pb2 as reg

    def page(**more: object) -> reg.ListModelFilesResponse:
        request = reg.ListModelFilesRequest(name=name, **more)  # type: ignore[arg-type]
        return workspace._call(client.call(client.stubs.models.ListModelFiles, request))

    first = page(page_size=200, without_urls=True)
    assert len(first.files) == 200 and not first.files[0].url
    seen = [f.file.path for f in first.files]
    while first.next_page_token:
        first = page(page_size=200, page_token=first.next_page_token)
        seen += [f.file.path for f in first.files]
    assert seen == sorted(model.get_file_names()) and first.files[0].url
    assert [f.file.path for f in page(prefix="./many/00", page_size=3).files] == [f"many/00{n}.txt" for n in range(3)]
    with pytest.raises(AlvearyError, match="1 to 10000"):
        page(page_size=10_001)
    model.download(str(tmp_path))
    assert (tmp_path / "many/449.txt").read_text() == "number 449"
    with pytest.raises(AlvearyError, match=r"has no 'none.pt'; it has m.pt, many/000.txt"):
        model.export_onnx([1, 4], file="none.pt")


def test_downloads_of_the_command_line_overwrite_when_they_are_told_to(failed: Run, stack: Embedded, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/m.pt").write_text("mine")
    refused = stack.cli("run", "download", failed.id, "outputs/m", "--to", str(tmp_path), check=False)
    assert refused.returncode == 1 and "other files are there already" in refused.stderr and "--overwrite" in refused.stderr
    assert (tmp_path / "outputs/m.pt").read_text() == "mine"
    done = stack.cli("run", "download", failed.id, "./outputs/m", "--to", str(tmp_path), "--overwrite")
    assert (tmp_path / "outputs/m.pt").read_text() == "weights"
    assert f"{MANY + 1} files" in done.stdout


def test_large_files_are_uploaded_in_parts_and_verified(workspace: Workspace, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 70
    (tmp_path / "big.bin").write_bytes(data)
    (tmp_path / "empty").touch()
    model = Model.register(workspace, str(tmp_path), f"big-{os.getpid()}")
    target = tmp_path / "to"
    model.download(str(target))
    assert hashlib.sha256((target / "big.bin").read_bytes()).digest() == hashlib.sha256(data).digest()
    assert (target / "empty").read_bytes() == b""


def test_what_is_damaged_in_the_store_is_named_and_replaced(workspace: Workspace, stack: Embedded, source: Path, tmp_path: Path) -> None:
    known = json.loads((stack.state_dir / "stack.json").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text(text := f"right {os.getpid()}")
    key = f"blobs/{hashlib.sha256(text.encode()).hexdigest()}"
    name = f"damaged-{os.getpid()}"
    first = Dataset.upload(workspace, str(tmp_path / "data"), name)

    async def damage() -> None:
        store = ObjectStore(f"127.0.0.1:{known['ports']['s3']}", known["secrets"]["s3_access"], known["secrets"]["s3_secret"])
        await store.put("datasets", key, b"x" * len(text))
        store.close()

    workspace._call(damage())
    with pytest.raises(AlvearyError, match=r"a\.txt is damaged in the object store: .*--verify"):
        first.download(str(tmp_path / "to"))
    code = "import sys; print(open(sys.argv[1] + '/a.txt').read())"
    run = submit(workspace, source, code, first.as_mount("data"))
    assert "a.txt is damaged in the object store" in finished(run, "Failed")["exit"]["message"]
    again = stack.cli("dataset", "upload", name, str(tmp_path / "data"), "--verify")
    assert f"{name}:1" in again.stdout
    run = submit(workspace, source, code, first.as_mount("data"))
    finished(run)
    assert lines(run) == [text]


def test_a_deleted_run_leaves_a_tombstone_and_what_others_have_of_it(
    workspace: Workspace, stack: Embedded, source: Path, tmp_path: Path
) -> None:
    known = json.loads((stack.state_dir / "stack.json").read_text())
    code = """
        import os
        from alveary import Run
        run = Run.get_context()
        run.log("loss", 0.5)
        os.makedirs("outputs/checkpoints")
        for path in ("outputs/m.pt", "outputs/checkpoints/e1"):
            with open(path, "w") as file:
                file.write("weights")
        print("a line")
        """
    run, kept = submit(workspace, source, code, experiment="deleted"), submit(workspace, source, code, experiment="deleted")
    waiting = submit(workspace, source, "import time; time.sleep(600)", experiment="deleted")
    with pytest.raises(AlvearyError, match=r"it is \w+: cancel it"):
        waiting.delete()
    waiting.cancel()
    for one in (run, kept):
        finished(one)
    model = run.register_model(f"kept-{os.getpid()}", "outputs/m.pt")
    until(lambda: run.get_metrics() == {"loss": 0.5}, "its metrics are there")

    async def left() -> list[str]:
        store = ObjectStore(f"127.0.0.1:{known['ports']['s3']}", known["secrets"]["s3_access"], known["secrets"]["s3_secret"])
        try:
            return await store.keys("runs", f"{run.id}/")
        finally:
            store.close()

    async def told() -> list[str]:
        connection = await connect(f"nats://127.0.0.1:{known['ports']['nats']}", "runs", known["secrets"]["runs"], "test")
        try:
            keys = [Key("default", kind, run.id) for kind in ("run", "placement", "log")] + [Key("default", "attempt", f"{run.id}-1")]
            return [event.name for key in keys for event in await EventLog(connection, "test").read(key)]
        finally:
            await connection.close()

    assert len(workspace._call(left())) >= 4 and "submitted" in workspace._call(told())
    refused = stack.cli("run", "delete", run.id, stdin="n\n", check=False)
    assert refused.returncode != 0 and run.get_status() == "Completed"
    assert stack.cli("run", "delete", run.id, "--yes").stdout == f"deleted: {run.id}\n"
    for question in (run.get_status, run.get_metrics, run.get_file_names, run.delete):
        with pytest.raises(AlvearyError, match="there is no run .* deleted it") as caught:
            question()
        assert caught.value.code == "NOT_FOUND"
    until(lambda: not workspace._call(left()), "its objects are gone")
    until(lambda: workspace._call(told()) == ["deleted"], "its events are gone")
    assert [r.id for r in Experiment(workspace, "deleted").get_runs()] == [waiting.id, kept.id]
    assert kept.get_metrics() == {"loss": 0.5} and lines(kept) == ["a line"]
    assert Path(model.download(str(tmp_path))).read_text() == "weights"
    with pytest.raises(AlvearyError, match="there is no run"):
        run.register_model("again", "outputs/m.pt")
    finished(waiting, "Canceled")
