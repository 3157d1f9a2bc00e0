"""Launches what an attempt runs on this node: the program itself, or the launcher that starts it as ranks."""

from __future__ import annotations

from collections.abc import Sequence

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import AttemptPaths, Limits, ProcessTree, StagingFailed
from alveary_trainer.assignment import Assignment
from alveary_trainer.ranks import Ranks
from alveary_trainer.staging import StagedAttempt


class ProcessLauncher:
    """Of one attempt on this node; what it decides without side effects is in launch.py."""

    def __init__(self, assignment: Assignment, paths: AttemptPaths, staged: StagedAttempt, team: launch.Team) -> None:
        self._assignment, self._paths, self._staged, self._team = assignment, paths, staged, team
        self._view = assignment.node.runtime.view(paths, staged.environment)

    async def launch(self, ranks: Ranks, command: Sequence[str]) -> ProcessTree:
        """Start the processes; `ranks` listens for those that a launcher starts. `command`: see ProcessSupervisor.run.

        Raises:
            StagingFailed: they cannot be started.
        """
        it, python = self._assignment, self._staged.environment.python
        program = launch.program(it.spec, python, self._view.inputs)
        argv = self._argv(program, command)
        if launch.has_ranks(it.spec):
            ranks.start(program, self._view.work)
        env = launch.variables(it.spec, self._view, python, it.run_id, it.number, self._team)
        if self._staged.resume is not None:
            env["ALVEARY_RESUME_FROM"] = f"{self._view.work}/{self._staged.resume}"
        return await it.node.runtime.launch(self._paths, self._staged.environment, argv, env, self._limits())

    def _argv(self, program: list[str], command: Sequence[str]) -> list[str]:
        it, team, environment = self._assignment, self._team, self._staged.environment
        if it.spec.launcher == c.LAUNCHER_TORCHRUN:
            return launch.torchrun(it.spec, environment.python, self._view.lib, team, it.attempt_id)
        if it.is_mpi_daemon:
            return launch.mpi_daemon(command)
        if it.spec.launcher == c.LAUNCHER_MPI:
            try:
                return launch.mpirun(it.spec, it.node.runtime.command("mpirun", environment), team)
            except StagingFailed as error:
                raise StagingFailed(f"{error}: {launch.NO_MPIRUN}") from error
        return program

    def _limits(self) -> Limits:
        it = self._assignment
        gpus = tuple(it.node.settings.gpus[i] for i in it.allocation.gpu_indexes)
        return Limits(it.spec.resources, gpus, it.network, it.gang_name, self._team.host.name)
