"""What is started for a run: its program, the launcher around it, and their environment. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.proxies import exempt
from alveary_trainer.adapters.runtime import Host, View

# Started by the launcher in place of the program, which it starts and reports on.
_RANK = 'exec "$ALVEARY_PYTHON" -I -S "$ALVEARY_LIB/alveary_rank.py"'
_WITH_AGENT = ("/bin/sh", "-c", 'PATH="$ALVEARY_LIB:$PATH"; export PATH; exec "$@"', "mpirun")
# What a shell ends with that finds no such program.
NOT_FOUND = 127
NO_MPIRUN = (
    "mpirun was not found: where the platform builds container images, ask for Horovod (pip_packages) or for "
    "apt_packages=['openmpi-bin']; else install Debian's openmpi-bin on the nodes"
)
_BACKENDS = {c.COMMUNICATION_BACKEND_NCCL: "nccl", c.COMMUNICATION_BACKEND_GLOO: "gloo"}
# How long torchrun's nodes wait for each other: they are launched together.
_JOIN_SECONDS = 300


@dataclass(frozen=True)
class Team:
    """Where the members of a gang are, and which of them this one is."""

    index: int
    hosts: Sequence[str]
    port: int
    # Of this member.
    host: Host

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.hosts)


def program(spec: c.RunSpec, python: str, inputs: Mapping[str, str]) -> list[str]:
    """The argv of the run's own program; a command's first word is left as it was given."""
    arguments = list(spec.arguments)
    for name, folder in inputs.items():
        arguments = [a.replace(f"{{inputs.{name}}}", folder) for a in arguments]
    if spec.command:
        first, *rest = spec.command
        start = [python, "-u"] if first in ("python", "python3") else [first]
        return [*start, *rest, *arguments]
    return [python, "-u", *(["-m", spec.module] if spec.module else [spec.entry_script]), *arguments]


def has_ranks(spec: c.RunSpec) -> bool:
    """Whether a launcher starts the program, rather than the trainer."""
    return spec.launcher in (c.LAUNCHER_TORCHRUN, c.LAUNCHER_MPI)


def ranks_per_node(spec: c.RunSpec) -> int:
    """How many processes each node has."""
    return spec.process_count_per_node if has_ranks(spec) else 1


def torchrun(spec: c.RunSpec, python: str, lib: str, team: Team, name: str) -> list[str]:
    """torchrun on one node of `team`; the first one's holds the c10d store.

    https://docs.pytorch.org/docs/stable/elastic/run.html
    """
    # Addresses, not names: torchrun would look up the name of the machine, which need not resolve, nor be a name by the
    # rules of DNS, and would wait for what answers there. Port 0: one that is free.
    endpoint, address = ("127.0.0.1:0", "127.0.0.1") if team.count == 1 else (f"{_bracketed(team.hosts[0])}:{team.port}", team.host.name)
    where = [
        f"--nnodes={team.count}", "--rdzv-backend=c10d", f"--rdzv-id={name}", f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf=is_host={int(team.index == 0)},join_timeout={_JOIN_SECONDS}", f"--local-addr={address}",
    ]  # fmt: skip
    run = [python, "-u", "-m", "torch.distributed.run", *where, f"--nproc-per-node={spec.process_count_per_node}"]
    return [*run, f"--max-restarts={spec.max_restarts}", "--no-python", python, "-I", "-S", f"{lib}/alveary_rank.py"]


def _bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def mpi_host(index: int) -> str:
    """What mpirun calls a node. No resolver knows the names: only the launch agent needs them."""
    return "localhost" if index == 0 else f"alveary-{index}"


def mpi_index(host: str) -> int:
    """The inverse.

    Raises:
        ValueError: no node of a run is called so.
    """
    prefix, _, number = host.rpartition("-")
    if prefix != "alveary" or not number.isdigit():
        raise ValueError(f"no node of this run is called {host!r}")
    return int(number)


def mpirun(spec: c.RunSpec, mpirun_path: str, team: Team) -> list[str]:
    """Open MPI's mpirun (4.x) on the first node; its daemons on the others go through `alveary-rsh`.

    The daemons stay in the foreground, because the trainers that started them wait for their end; each is started by the first node
    itself; processes are not bound to cores, which the run may share.
    """
    each = spec.process_count_per_node
    options = {
        "plm_rsh_agent": "alveary-rsh", "plm_rsh_no_tree_spawn": "1", "orte_leave_session_attached": "1",
        "btl_vader_single_copy_mechanism": "none", "orte_abort_on_non_zero_status": "1",
    }  # fmt: skip
    if team.count > 1 and team.host.subnet and not team.host.subnet.startswith("127."):
        options |= {"oob_tcp_if_include": team.host.subnet, "btl_tcp_if_include": team.host.subnet}
    mca = [word for name, value in options.items() for word in ("--mca", name, value)]
    hosts = ",".join(f"{mpi_host(i)}:{each}" for i in range(team.count))
    return [*_WITH_AGENT, mpirun_path, "-np", str(each * team.count), "--host", hosts, "--bind-to", "none", *mca, "/bin/sh", "-c", _RANK]


def mpi_daemon(command: Sequence[str]) -> list[str]:
    """What mpirun's launch agent was asked to start on another node: a line for a shell."""
    return [*_WITH_AGENT, "/bin/sh", "-c", *command]


def variables(spec: c.RunSpec, view: View, python: str, run_id: str, attempt: int, team: Team) -> dict[str, str]:
    """The environment of what is launched, beside what the image brings."""
    env = dict(view.inherited) | dict(spec.environment.environment_variables)
    if "PATH" in view.inherited:
        env["PATH"] = view.inherited["PATH"]
    # The module that talks to the trainer is in every environment: standard library alone, first on the path.
    env |= {
        "PYTHONPATH": ":".join(filter(None, [view.lib, env.get("PYTHONPATH")])), "PYTHONUNBUFFERED": "1", "TMPDIR": view.tmp,
        "ALVEARY_RUN_ID": run_id, "ALVEARY_ATTEMPT": str(attempt), "ALVEARY_SOCKET": view.socket,
        "ALVEARY_EXPERIMENT": spec.experiment, "ALVEARY_WORK_DIR": view.work,
        "ALVEARY_NODE_RANK": str(team.index), "ALVEARY_NODE_COUNT": str(team.count),
    }  # fmt: skip
    if spec.communication_backend in _BACKENDS:
        env["ALVEARY_COMMUNICATION_BACKEND"] = _BACKENDS[spec.communication_backend]
    if has_ranks(spec):
        env |= {"ALVEARY_RANKS": view.socket.rpartition("/")[0], "ALVEARY_PYTHON": python, "ALVEARY_LIB": view.lib}
    if spec.launcher == c.LAUNCHER_TORCHRUN and spec.max_restarts:
        # Restarted workers would meet in their earlier store, find addresses of processes that have exited in it, and wait
        # for these for ever (seen with torch 2.13 and gloo): each start gets a store of its own.
        env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if spec.launcher == c.LAUNCHER_TORCHRUN and spec.process_count_per_node > 1:
        # As many threads as there are cores for each; torchrun would say 1, and warn.
        env.setdefault("OMP_NUM_THREADS", str(max(int(spec.resources.cpus / spec.process_count_per_node), 1)))
    if spec.launcher == c.LAUNCHER_MPI:
        # Open MPI refuses to run as root unless told otherwise.
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if team.count > 1 or spec.launcher == c.LAUNCHER_MPI:
        env |= {"MASTER_ADDR": team.hosts[0], "MASTER_PORT": str(team.port), "NODE_RANK": str(team.index), "NODE_COUNT": str(team.count)}
    if team.count == 1 and spec.launcher == c.LAUNCHER_TORCHRUN:
        # Gloo would look up the name of the machine.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The processes of a run reach each other without a proxy.
    exempt(env, team.hosts if team.count > 1 else ())
    if team.count > 1 and team.host.interface:
        # The name of the machine may resolve to an address that the others do not reach.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            env.setdefault(name, team.host.interface)
    return env | {f"ALVEARY_INPUT_{name.upper().replace('-', '_').replace('.', '_')}": path for name, path in view.inputs.items()}
