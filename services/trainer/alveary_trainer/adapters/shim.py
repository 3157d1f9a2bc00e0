"""Stands between the trainer and a training process; standard library alone (`python -I -S shim.py FD`).

Reads one JSON line {argv, cwd, env} from stdin, starts it in a session of its own, and waits. Everything the process
starts ends up below this process, however it detaches: it is a child subreaper (prctl(2), Linux 3.4). When the
process ends, what is left of its tree is killed and {"exit_code"} or {"signal"} is written to FD. When the trainer
dies, even by kill -9, the kernel sends this process SIGUSR1 and it kills the tree. SIGTERM is passed on to all.
"""

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def descendants(root):
    """Pids below `root`, from /proc; children after their parents."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            parents.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def kill_tree(number):
    """Signal everything below this process; returns how many."""
    pids = descendants(os.getpid())
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it ended meanwhile, which is what was wanted
    return len(pids)


def reap():
    """Kill and collect all that is left. Bounded: each round kills all that exist, and only they can fork."""
    for _ in range(1000):
        if not kill_tree(signal.SIGKILL):
            return
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    trainer = os.getppid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)

    def abandoned(*_):
        reap()
        os._exit(70)

    signal.signal(signal.SIGUSR1, abandoned)
    signal.signal(signal.SIGTERM, lambda *_: kill_tree(signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != trainer or trainer == 1:
        os._exit(70)  # the trainer died before the kernel was told whom to tell
    status_fd = int(sys.argv[1])
    order = json.loads(sys.stdin.buffer.readline())
    report, devnull = {}, os.open(os.devnull, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(devnull, 0)
            os.closerange(3, 256)
            os.chdir(order["cwd"])
            os.execve(order["argv"][0], order["argv"], order["env"])
        except OSError as error:
            os.write(2, f"cannot start {order['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127)
    os.write(status_fd, json.dumps({"pid": child}).encode() + b"\n")
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        if pid == child:
            if os.WIFSIGNALED(status):
                report = {"signal": os.WTERMSIG(status)}
            else:
                report = {"exit_code": os.WEXITSTATUS(status)}
            break
    reap()
    os.write(status_fd, json.dumps(report).encode() + b"\n")


main()
