"""Stands between the trainer and a training process; standard library alone.

`python -I -S shim.py FD` beside the trainer: the order comes on stdin, the report goes to FD. `python -I -S shim.py
FOLDER SOCKET` as the first process of a container: the order is FOLDER/order.json, the report FOLDER/report.json,
stdout and stderr the pipes FOLDER/stdout and FOLDER/stderr; SOCKET is the trainer's, and its end is the trainer's death.

Starts {argv, cwd, env} in a session of its own, and waits. Everything the process
starts ends up below this process, however it detaches: it is a child subreaper (prctl(2), Linux 3.4). When the
process ends, what is left of its tree is killed and {"exit_code"} or {"signal"} is reported. When the trainer
dies, even by kill -9, the kernel sends this process SIGUSR1 and it kills the tree. SIGTERM is passed on to all; SIGUSR2 is SIGKILL to all.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading

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


def abandoned(*_):
    """The trainer is gone: nobody may go on in its name."""
    reap()
    os._exit(70)


def beside_the_trainer(libc):
    """Order and report over inherited descriptors."""
    trainer = os.getppid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
    if os.getppid() != trainer or trainer == 1:
        os._exit(70)  # the trainer died before the kernel was told whom to tell
    descriptor = int(sys.argv[1])
    order = json.loads(sys.stdin.buffer.readline())

    def report(text):
        os.write(descriptor, text)

    return order, report


def in_a_container():
    """Order and report in a folder that the trainer mounted."""
    folder, path = sys.argv[1:3]
    for number, name in ((1, "stdout"), (2, "stderr")):
        pipe = os.open(f"{folder}/{name}", os.O_WRONLY)
        os.dup2(pipe, number)
        os.close(pipe)
    trainer = socket.socket(socket.AF_UNIX)
    trainer.connect(path)

    def watch():
        try:
            while trainer.recv(4096):
                pass
        finally:
            os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=watch, daemon=True).start()
    with open(f"{folder}/order.json", "rb") as file:
        order = json.load(file)
    order["env"] = dict(os.environ) | order["env"]

    def report(text):
        with open(f"{folder}/report.json", "ab") as file:
            file.write(text)

    return order, report


def main():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGUSR1, abandoned)
    signal.signal(signal.SIGTERM, lambda *_: kill_tree(signal.SIGTERM))
    signal.signal(signal.SIGUSR2, lambda *_: kill_tree(signal.SIGKILL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order, say = in_a_container() if len(sys.argv) == 3 else beside_the_trainer(libc)
    report, devnull = {}, os.open(os.devnull, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(devnull, 0)
            os.closerange(3, 256)
            os.chdir(order["cwd"])
            os.execvpe(order["argv"][0], order["argv"], order["env"])
        except OSError as error:
            os.write(2, f"cannot start {order['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127)
    say(json.dumps({"pid": child}).encode() + b"\n")
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
    say(json.dumps(report).encode() + b"\n")


main()
