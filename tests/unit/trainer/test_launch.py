"""What is started for a run: argv and environment."""

from __future__ import annotations

import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer import launch
from alveary_trainer.adapters.process import ProcessRuntime
from alveary_trainer.adapters.runtime import Host, StagingFailed, View

VIEW = View("/w", "/t", "/s/run.sock", "/lib", {"data-set": "/in"}, {"PATH": "/bin", "HOME": "/h"})
HOST = Host("10.0.0.2", "", 4711, "eth1", "10.0.0.0/24")


def team(index: int = 1, count: int = 2) -> launch.Team:
    return launch.Team(index, [f"10.0.0.{1 + i}" for i in range(count)], 4711, HOST)


def test_a_program_is_a_script_a_module_or_a_command_and_finds_its_inputs() -> None:
    inputs = {"d": "/in"}
    assert launch.program(c.RunSpec(entry_script="a.py", arguments=["--x", "{inputs.d}/y"]), "py", inputs) == [
        "py",
        "-u",
        "a.py",
        "--x",
        "/in/y",
    ]
    assert launch.program(c.RunSpec(module="m"), "py", inputs) == ["py", "-u", "-m", "m"]
    assert launch.program(c.RunSpec(command=["python", "b.py"]), "py", inputs) == ["py", "-u", "b.py"]
    assert launch.program(c.RunSpec(command=["make", "x"]), "py", inputs) == ["make", "x"]


def test_torchrun_meets_at_the_first_node_alone_or_with_others() -> None:
    spec = c.RunSpec(entry_script="a.py", launcher=c.LAUNCHER_TORCHRUN, process_count_per_node=2, max_restarts=3)
    alone = launch.torchrun(spec, "py", "/lib", team(0, 1), "r-1")
    assert {"--nnodes=1", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"} <= set(alone), "the machine's name is looked up"
    words = launch.torchrun(spec, "py", "/lib", team(), "r-1")
    assert {"--nnodes=2", "--nproc-per-node=2", "--max-restarts=3", "--rdzv-endpoint=10.0.0.1:4711", "--local-addr=10.0.0.2"} <= set(words)
    assert "is_host=0" in next(w for w in words if w.startswith("--rdzv-conf")) and words[-1] == "/lib/alveary_rank.py"
    assert "is_host=1" in next(w for w in launch.torchrun(spec, "py", "/lib", team(0), "r-1") if w.startswith("--rdzv-conf"))


def test_addresses_of_ipv6_are_told_from_their_ports() -> None:
    spec = c.RunSpec(entry_script="a.py", launcher=c.LAUNCHER_TORCHRUN, process_count_per_node=1)
    six = launch.Team(1, ["fd00::1", "fd00::2"], 4711, Host("fd00::2", "", 4711))
    words = launch.torchrun(spec, "py", "/lib", six, "r-1")
    assert {"--rdzv-endpoint=[fd00::1]:4711", "--local-addr=fd00::2"} <= set(words)
    assert launch.variables(spec, VIEW, "py", "r", 1, six)["MASTER_ADDR"] == "fd00::1"


@pytest.mark.parametrize(("address", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("no-such-host-", False)])
async def test_a_node_may_have_an_address_of_any_kind(address: str, local: bool) -> None:
    runtime = ProcessRuntime.__new__(ProcessRuntime)
    runtime._address = address
    if not local:
        with pytest.raises(StagingFailed, match=f"no address {address}: set ALVEARY_ADDRESS"):
            await runtime.host("g", 0, "bridge")
        return
    host = await runtime.host("g", 0, "bridge")
    assert (host.name, bool(host.network_scope), host.port > 0) == (address, True, True)


def test_processes_of_a_run_reach_each_other_without_the_nodes_proxy() -> None:
    view = View("/w", "/t", "/s/run.sock", "/lib", {}, {"https_proxy": "http://p:1", "no_proxy": "a"})
    spec = c.RunSpec(environment=c.Environment(environment_variables={"NO_PROXY": "b"}))
    assert launch.variables(spec, view, "py", "r", 1, team())["no_proxy"] == "a,b,localhost,127.0.0.1,::1,10.0.0.1,10.0.0.2"
    assert "no_proxy" not in launch.variables(spec, VIEW, "py", "r", 1, team())


def test_mpirun_has_all_nodes_by_names_that_its_agent_knows() -> None:
    spec = c.RunSpec(launcher=c.LAUNCHER_MPI, process_count_per_node=3)
    words = launch.mpirun(spec, "/usr/bin/mpirun", team(0))
    assert words[words.index("-np") + 1] == "6" and words[words.index("--host") + 1] == "localhost:3,alveary-1:3"
    assert words[words.index("btl_tcp_if_include") + 1] == "10.0.0.0/24"
    assert [launch.mpi_index(launch.mpi_host(i)) for i in (1, 12)] == [1, 12]
    for stranger in ("localhost", "node-1", "alveary-x"):
        with pytest.raises(ValueError, match="no node of this run"):
            launch.mpi_index(stranger)
    assert launch.mpi_daemon(["orted -x"])[-3:] == ["/bin/sh", "-c", "orted -x"]


def test_what_the_user_sets_comes_before_what_the_platform_would() -> None:
    environment = c.Environment(environment_variables={"NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "7", "PATH": "/evil"})
    spec = c.RunSpec(
        launcher=c.LAUNCHER_TORCHRUN, process_count_per_node=2, max_restarts=1, environment=environment, resources=c.Resources(cpus=8)
    )
    env = launch.variables(spec, VIEW, "py", "r", 2, team())
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"], env["OMP_NUM_THREADS"], env["PATH"]) == ("ib0", "eth1", "7", "/bin")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["NODE_RANK"], env["NODE_COUNT"]) == ("10.0.0.1", "4711", "1", "2")
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1" and env["ALVEARY_INPUT_DATA_SET"] == "/in" and env["ALVEARY_RANKS"] == "/s"
    plain = launch.variables(c.RunSpec(launcher=c.LAUNCHER_PLAIN), VIEW, "py", "r", 1, team(0, 1))
    assert not plain.keys() & {"MASTER_ADDR", "RANK", "OMP_NUM_THREADS", "ALVEARY_RANKS", "GLOO_SOCKET_IFNAME"}
    shared = c.RunSpec(launcher=c.LAUNCHER_TORCHRUN, process_count_per_node=4, resources=c.Resources(cpus=9))
    assert launch.variables(shared, VIEW, "py", "r", 1, team(0, 1))["OMP_NUM_THREADS"] == "2"
