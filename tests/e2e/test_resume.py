"""Checkpoints: an attempt that dies is followed by one that goes on where it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support import Embedded, embedded, finished, lines, recorded, submit, until

from alveary import Environment, Experiment, PyTorchConfiguration, Retry, Run, ScriptRunConfig, Workspace
from alveary.errors import AlvearyError

EXAMPLE = Path(__file__).parents[2] / "examples/resume"
HERE = Environment("here", user_managed=True)


def train(workspace: Workspace, seconds: float, epochs: int = 8, resume_from: Run | str | None = None) -> Run:
    config = ScriptRunConfig(
        str(EXAMPLE), "train.py", ["--epochs", epochs, "--seconds", seconds], environment=HERE, resume_from=resume_from
    )
    return Experiment(workspace, "resume").submit(config)


def test_killed_with_its_node_half_way_it_reaches_the_same_loss(tmp_path: Path) -> None:
    with embedded(tmp_path / "stack") as stack:
        workspace = stack.workspace()
        undisturbed = train(workspace, 0.0)
        finished(undisturbed)
        run = train(workspace, 1.0)
        until(lambda: any(line.startswith("epoch 3") for line in lines(run)), "it is half-way")
        for pid in stack.trainer_pids():
            os.kill(pid, signal.SIGKILL)
        details = finished(run)
        assert details["attempt"] == 2
        resumed = [int(line.rsplit(" ", 1)[1]) for line in lines(run) if line.startswith("resumed after epoch")]
        assert len(resumed) == 1 and resumed[0] >= 1, "it began anew"
        assert lines(run)[-1] == lines(undisturbed)[-1], "not the same loss"
        assert run.get_metrics()["loss"][-1] == undisturbed.get_metrics()["loss"][-1]
        # What the first attempt did is not done again.
        epochs = [line.split()[1] for line in lines(run) if line.startswith("epoch")]
        assert len(epochs) <= 8 + 2


def test_another_run_is_resumed_from_and_trains_on(workspace: Workspace) -> None:
    first = train(workspace, 0.0, epochs=3)
    finished(first)
    second = train(workspace, 0.0, epochs=5, resume_from=first)
    finished(second)
    assert lines(second)[0] == "resumed after epoch 2" and [x.split()[1] for x in lines(second)[1:]] == ["3:", "4:"]
    whole = train(workspace, 0.0, epochs=5)
    finished(whole)
    assert lines(second)[-1] == lines(whole)[-1]
    with pytest.raises(AlvearyError, match="nothing to resume from"):
        train(workspace, 0.0, resume_from="no-such-run")


def test_a_preempted_run_goes_on_from_what_it_saved_in_its_grace(stack: Embedded, workspace: Workspace, source: Path) -> None:
    code = """
        import os, signal, sys, time
        from alveary import Run
        path = Run.get_context().resume_path
        if path:
            print("found", open(os.path.join(path, "state")).read(), flush=True)
            sys.exit()
        os.makedirs("outputs/checkpoints")
        def leave(*_):
            open("outputs/checkpoints/state", "w").write("42")
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        print("begun", flush=True)
        while True:
            time.sleep(0.1)
        """
    from alveary.compute import AmlCompute, ComputeTarget

    spec = AmlCompute.provisioning_configuration(max_nodes=1, cpus=1, idle_seconds_before_scaledown=5)
    ComputeTarget.create(workspace, "one-at-a-time", spec)
    run = submit(workspace, source, code, compute_target="one-at-a-time", priority=-1)
    until(lambda: "begun" in lines(run), "it runs")
    finished(submit(workspace, source, "print()", compute_target="one-at-a-time"))
    finished(run)
    assert lines(run)[-1] == "found 42"


def test_a_policy_says_which_failures_are_attempted_again(workspace: Workspace, source: Path) -> None:
    code = (
        "import os, sys; print(os.environ['ALVEARY_ATTEMPT']); sys.exit(int(sys.argv[1]) if int(os.environ['ALVEARY_ATTEMPT']) < 3 else 0)"
    )
    policy = Retry(on=["exited"], exit_codes=[75], backoff_seconds=0.5)
    run = submit(workspace, source, code, 75, retry=policy)
    details = finished(run)
    assert details["attempt"] == 3 and lines(run) == ["1", "2", "3"]
    told = [e.data for e in recorded(run) if (e.type, e.subject) == ("run.retrying", run.id)]
    assert [t["delaySeconds"] for t in told] == [0.5, 1] and "exit code 75; again in 0.5 s" in told[0]["reason"]
    other = submit(workspace, source, code, 1, retry=policy)
    assert finished(other, "Failed")["attempt"] == 1
    spent = submit(workspace, source, code, 75, retry=policy, max_attempts=2)
    assert finished(spent, "Failed")["attempt"] == 2
    with pytest.raises(AlvearyError, match="always attempted again"):
        submit(workspace, source, code, retry=Retry(on=["trainer_lost"]))
    slow = submit(workspace, source, code, 75, retry=Retry(on=["exited"], backoff_seconds=600))
    until(lambda: "again in 600 s" in slow.get_details()["reason"], "it waits")
    assert "retry policy" in slow.why_queued()["would_help"]
    slow.cancel()
    finished(slow, "Canceled")


def test_the_example_of_data_parallel_training_learns_what_one_process_learns(workspace: Workspace) -> None:
    told = []
    for processes in (1, 2):
        config = ScriptRunConfig(
            str(EXAMPLE.parent / "ddp"), "train.py", environment=HERE, distributed_job_config=PyTorchConfiguration(process_count=processes)
        )
        run = Experiment(workspace, "ddp").submit(config)
        finished(run)
        (said,) = (line for line in lines(run) if "weights alike" in line)
        told.append(said)
        assert "outputs/model.pt" in run.get_file_names() and len(run.get_metrics()["loss"]) == 60
    assert told[0].startswith("1 ranks") and told[1].startswith("2 ranks") and told[1].endswith("alike: True")
    losses = [float(said.split("loss ")[1].split(",")[0]) for said in told]
    assert abs(losses[0] - losses[1]) < 1e-4
