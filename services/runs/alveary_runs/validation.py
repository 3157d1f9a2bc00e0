"""What a run's specification must be, and the defaults that fill it."""

from __future__ import annotations

import re
from collections.abc import Callable

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.exit_reasons import word
from alveary_contracts.names import name_problem, normal_path, path_problem

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Reasons for which a RetryPolicy may ask for another attempt.
_RETRIED = (
    c.EXIT_REASON_EXITED,
    c.EXIT_REASON_SIGNAL,
    c.EXIT_REASON_OUT_OF_MEMORY,
    c.EXIT_REASON_DISK_FULL,
    c.EXIT_REASON_TIMEOUT,
    c.EXIT_REASON_STAGING_FAILED,
    c.EXIT_REASON_LAUNCH_FAILED,
    c.EXIT_REASON_UPLOAD_FAILED,
)
# Of a run; a share's number is a part of a socket's path.
MAX_NODE_COUNT = 1024
_PYTHON = re.compile(r"3\.\d{1,2}(\.\d{1,2})?")


def with_defaults(spec: c.RunSpec) -> c.RunSpec:
    """A copy with every default filled in, so that events say what will happen."""
    filled = c.RunSpec()
    filled.CopyFrom(spec)
    filled.experiment = spec.experiment or "default"
    filled.entry_script = normal_path(spec.entry_script)
    filled.process_count_per_node = spec.process_count_per_node or 1
    filled.node_count = spec.node_count or 1
    filled.max_attempts = spec.max_attempts or 3
    filled.grace_seconds = spec.grace_seconds or 10.0
    filled.resources.cpus = spec.resources.cpus or 1.0
    if spec.use_gpu and not spec.resources.gpus:
        filled.resources.gpus = filled.process_count_per_node
    if spec.resources.gpu_milli:
        filled.resources.gpus = spec.resources.gpus or 1
    if filled.launcher == c.LAUNCHER_UNSPECIFIED:
        filled.launcher = c.LAUNCHER_PLAIN
    return filled


def problems(
    spec: c.RunSpec, target: ev.ComputeSpec | None, targets: list[str], files: set[str] | None, *, internal: bool
) -> list[tuple[str, str]]:
    """(field, what is wrong and what to do) for each fault of a spec with defaults.

    `target` is None where there is no such target, `files` None where the snapshot is not known.
    """
    found: list[tuple[str, str]] = []
    say: Callable[[str, str], None] = lambda field, text: found.append((f"spec.{field}", text))  # noqa: E731
    if problem := name_problem(spec.experiment):
        say("experiment", problem)
    _program(spec, files, say, internal)
    _compute(spec, target, targets, say)
    env = spec.environment
    if env.python_version and not _PYTHON.fullmatch(env.python_version):
        say("environment.python_version", f"{env.python_version!r}: use a version like '3.11'")
    if env.interpreter and not env.user_managed:
        say("environment.interpreter", "only a user_managed environment names an interpreter")
    if env.interpreter and not env.interpreter.startswith("/"):
        say("environment.interpreter", f"{env.interpreter!r} must be an absolute path on the node")
    for name in ("conda_packages", "conda_channels", "apt_packages"):
        for package in getattr(env, name):
            if not package.strip() or package.strip().startswith("-") or any(ord(ch) < 32 for ch in package):
                say(f"environment.{name}", f"{package[:80]!r} is none: options and empty lines are refused")
    if env.user_managed and (env.conda_packages or env.apt_packages):
        say("environment.user_managed", "a user_managed environment installs nothing: remove the packages or user_managed")
    if env.user_managed and env.pip_packages:
        say("environment.pip_packages", "a user_managed environment installs nothing: remove the packages or user_managed")
    for package in env.pip_packages:
        if package.strip().startswith("-") or "\n" in package or not package.strip():
            say("environment.pip_packages", f"{package[:80]!r} is not a requirement: options and empty lines are refused")
    for name in env.environment_variables:
        if not _VARIABLE.fullmatch(name) or name.startswith("ALVEARY_"):
            say("environment.environment_variables", f"{name[:80]!r} cannot be set: use letters, digits, '_', and no ALVEARY_ prefix")
    names = [i.name for i in spec.inputs]
    for item in spec.inputs:
        if problem := name_problem(item.name):
            say("inputs", problem)
        if names.count(item.name) > 1:
            say("inputs", f"two inputs are called {item.name!r}")
    if not 0 <= spec.max_run_duration_seconds <= 21 * 86400:
        say("max_run_duration_seconds", f"{spec.max_run_duration_seconds:g}: 0 (no limit) to 21 days of seconds")
    for reason in spec.retry.on:
        if reason not in _RETRIED:
            say("retry.on", f"{word(reason)!r}: use {', '.join(map(word, _RETRIED))}; a lost node is always attempted again")
    if not 0 <= spec.retry.backoff_seconds <= 3600:
        say("retry.backoff_seconds", f"{spec.retry.backoff_seconds:g}: 0 to 3600")
    if spec.retry.exit_codes and c.EXIT_REASON_EXITED not in spec.retry.on:
        say("retry.exit_codes", "exit codes matter only where 'exited' is in retry.on")
    if not 1 <= spec.max_attempts <= 10:
        say("max_attempts", f"{spec.max_attempts}: 1 to 10")
    if not -1000 <= spec.priority <= 1000:
        say("priority", f"{spec.priority}: -1000 to 1000")
    if not 0 <= spec.grace_seconds <= 300:
        say("grace_seconds", f"{spec.grace_seconds:g}: 0 to 300")
    for key, value in [*spec.tags.items(), *spec.properties.items()]:
        if not key or len(key) > 256 or len(value) > 8192:
            say("tags", f"{key[:80]!r}: keys of 1 to 256 and values of up to 8192 characters")
        if key.startswith("alveary.") and not internal:
            say("properties", f"{key!r}: names that begin with 'alveary.' are the platform's own")
    return found


def _program(spec: c.RunSpec, files: set[str] | None, say: Callable[[str, str], None], internal: bool) -> None:
    programs = [bool(spec.entry_script), bool(spec.command), bool(spec.module)]
    if sum(programs) != 1:
        say("entry_script", "exactly one of entry_script, command and module says what to run")
    if spec.module and not internal:
        say("module", "only the platform itself runs modules: use entry_script or command")
    if not spec.module and not spec.snapshot:
        say("snapshot", "a source directory is needed: upload it with PrepareSnapshot and CommitSnapshot")
    elif spec.snapshot and files is None:
        say("snapshot", f"{spec.snapshot[:80]!r} was never committed: call CommitSnapshot first")
    if spec.entry_script:
        if problem := path_problem(spec.entry_script):
            say("entry_script", problem)
        elif files is not None and spec.entry_script not in files:
            near = ", ".join(sorted(f for f in files if f.endswith(".py"))[:5]) or "no Python file at all"
            say("entry_script", f"{spec.entry_script!r} is not in the source directory; it has {near}")


def _compute(spec: c.RunSpec, target: ev.ComputeSpec | None, targets: list[str], say: Callable[[str, str], None]) -> None:
    if target is None:
        others = ", ".join(sorted(targets)) or "none yet"
        say("compute_target", f"there is no compute target {spec.compute_target!r}; there are: {others}")
        return
    node = target.node_resources
    # It may not be known what the machines have that join a target: then the queue says what is missing.
    known = target.kind == c.TARGET_KIND_LOCAL or node.cpus > 0
    if not 1 <= spec.node_count <= MAX_NODE_COUNT:
        say("node_count", f"{spec.node_count}: 1 to {MAX_NODE_COUNT}")
    elif not spec.pack_nodes and (spec.min_node_count or spec.node_count) > target.max_nodes:
        say(
            "node_count",
            f"{spec.min_node_count or spec.node_count} nodes were asked for; {spec.compute_target!r} has at most {target.max_nodes}",
        )
    if not 0 <= spec.min_node_count <= spec.node_count:
        say("min_node_count", f"{spec.min_node_count}: 0 (all of them) to node_count, which is {spec.node_count}")
    if not 0 <= spec.max_restarts <= 100:
        say("max_restarts", f"{spec.max_restarts}: 0 to 100")
    if spec.max_restarts and spec.launcher != c.LAUNCHER_TORCHRUN:
        say(
            "max_restarts",
            "only torchrun restarts workers (distributed_training=PyTorchConfiguration()); `retry` makes new attempts of any run",
        )
    if not 1 <= spec.process_count_per_node <= 1024:
        say("process_count_per_node", f"{spec.process_count_per_node}: 1 to 1024")
    if spec.process_count_per_node > 1 and spec.launcher not in (c.LAUNCHER_TORCHRUN, c.LAUNCHER_MPI):
        say(
            "process_count_per_node",
            "more than one process needs torchrun or mpirun (distributed_training=PyTorchConfiguration() or MpiConfiguration())",
        )
    if known and spec.use_gpu and not node.gpus:
        say(
            "use_gpu",
            f"use_gpu was asked for, but the nodes of {spec.compute_target!r} have no GPU: set use_gpu=False or choose another target",
        )
    elif spec.resources.gpus < 0 or (known and spec.resources.gpus > node.gpus):
        say("resources.gpus", f"{spec.resources.gpus} GPUs per node were asked for; a node of {spec.compute_target!r} has {node.gpus}")
    if spec.resources.gpu_milli and not target.gpu_sharing:
        say("resources.gpu_milli", f"a part of a GPU was asked for; {spec.compute_target!r} gives whole ones: create it with gpu_sharing")
    if not 0 <= spec.resources.gpu_milli < 1000 or (spec.resources.gpu_milli and spec.resources.gpus != 1):
        say("resources.gpu_milli", f"{spec.resources.gpu_milli} of {spec.resources.gpus} GPUs: 1 to 999 thousandths of one GPU")
    if spec.resources.gpu_models and not spec.resources.gpus:
        say("resources.gpu_models", "GPU models were named, but no GPU was asked for")
    if spec.resources.cpus <= 0 or (known and spec.resources.cpus > node.cpus):
        say("resources.cpus", f"{spec.resources.cpus:g} CPUs were asked for; a node of {spec.compute_target!r} has {node.cpus:g}")
    if spec.resources.shm_bytes < 0 or (known and spec.resources.shm_bytes > node.memory_bytes):
        say(
            "resources.shm_bytes",
            f"{spec.resources.shm_bytes}: 0 (the run's memory, at least 2 GiB) to the {node.memory_bytes} bytes of a node's memory",
        )
    if spec.resources.memory_bytes < 0 or (known and spec.resources.memory_bytes > node.memory_bytes):
        say(
            "resources.memory_bytes",
            f"{spec.resources.memory_bytes / 2**30:.1f} GiB were asked for; a node of {spec.compute_target!r} has {node.memory_bytes / 2**30:.1f} GiB",
        )
